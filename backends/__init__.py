"""Backends: graph -> callable. Installed as ``fxmask.backends``."""

from __future__ import annotations

if __name__ != "fxmask.backends":  # see passes/__init__.py
    raise ImportError(f"import fxmask.backends, not {__name__}")

from collections.abc import Callable
from typing import Any

from torch import fx

from fxmask.backends.eager import compile_eager
from fxmask.backends.inductor import compile_inductor
from fxmask.errors import BackendError

Backend = Callable[[fx.GraphModule], Callable[..., Any]]

BACKENDS: dict[str, Backend] = {"eager": compile_eager, "inductor": compile_inductor}


def get_backend(name: str) -> Backend:
    """The function that compiles one step graph.

    Raises:
        BackendError: there is no backend of that name.
    """
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; choose one of {sorted(BACKENDS)}")
    return BACKENDS[name]
