"""Compile a step graph with torch.compile (Inductor: C++ on a CPU, Triton on a GPU)."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

logger = logging.getLogger(__name__)


@functools.cache
def cpu_compiler_problem() -> str | None:
    """Why Inductor cannot compile C++ on this machine, or ``None`` if it can."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        return str(error).strip().splitlines()[0]
    except Exception as error:  # whatever else a broken toolchain raises: eager still works
        return f"{type(error).__name__}: {error}"
    return None


def compile_inductor(graph_module: fx.GraphModule) -> Callable[..., Any]:
    """Compile one step graph, for the static shapes it is first called with.

    Each graph is compiled through its own code object: many graphs behind one wrapper would share a recompile limit
    and silently run eagerly beyond it. Without a C++ compiler a CPU graph runs eagerly, with a warning.
    """
    on_cpu = all(p.device.type == "cpu" for p in list(graph_module.parameters()) + list(graph_module.buffers()))
    problem = cpu_compiler_problem() if on_cpu else None
    if problem is not None:
        warnings.warn(
            f"no working C++ compiler, so step graphs run eagerly: {problem}. "
            "Install g++ or clang, or set CXX, and accelerate again; or pass backend='eager' to silence this.",
            stacklevel=2,
        )
        return graph_module
    return torch.compile(graph_module, fullgraph=True, dynamic=False)
