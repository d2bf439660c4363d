"""Weights that are stored in one type and converted while the model runs, as casts in the graph.

Hooks of diffusers and accelerate (layerwise casting) call ``module.to(compute type)`` before a layer's forward and
``module.to(storage type)`` after it. No tracer can follow that: it replaces parameters. Here each converted weight is a value
of its own, for as long as it is converted:

    %w = get_attr[layer.weight]: float8;  %c = to(%w, bfloat16);  %y = linear(%x, %c)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from fxmask._torch import tensor_stores

Slot = tuple[int, str]


@contextlib.contextmanager
def casts_recorded(model: torch.nn.Module) -> Iterator[None]:
    """Inside, ``to(dtype)`` of a module of the model converts values and no parameters; afterwards all is as before."""
    inside = {id(module) for module in model.modules()}
    stored: dict[Slot, tuple[dict[str, Any], torch.Tensor]] = {}
    convert: Any = torch.nn.Module.to

    def to(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        dtype = _only_dtype(args, kwargs)
        if dtype is None or id(module) not in inside:
            return convert(module, *args, **kwargs)
        for part in module.modules():
            for store in tensor_stores(part):
                _cast(store, dtype, stored)
        return module

    try:
        with mock.patch.object(torch.nn.Module, "to", to):
            yield
    finally:
        for (_, name), (store, before) in stored.items():
            store[name] = before


def _cast(store: dict[str, Any], dtype: torch.dtype, stored: dict[Slot, tuple[dict[str, Any], torch.Tensor]]) -> None:
    for name, x in list(store.items()):
        if x is None or not x.is_floating_point() or x.dtype == dtype:
            continue
        slot = (id(store), name)
        _, before = stored.setdefault(slot, (store, x))
        store[name] = before if before.dtype == dtype else before.to(dtype)


def _only_dtype(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype | None:
    """The type, if ``module.to`` is asked for nothing else."""
    given = [*args, *(value for name, value in kwargs.items() if name != "non_blocking")]
    return given[0] if len(given) == 1 and isinstance(given[0], torch.dtype) else None
