"""Shapes and layouts of a stored graph, computed again: what is recorded of them must be what its operators give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxmask._torch import FakeTensorMode


def check_values(module: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> None:
    """Run a graph on tensors without memory, and compare every value with ``meta["val"]``.

    Args:
        module: the graph, with its weights.
        inputs: what it is called with.

    Raises:
        ValueError: a recorded shape, layout, type or device is another one; names the node.
        Exception: whatever operators raise for arguments that they do not take.
    """
    mode = FakeTensorMode()
    placeholders = module.graph.find_nodes(op="placeholder")
    with torch.no_grad(), mode:
        fakes = [_like(x, node.meta["val"]) for x, node in zip(inputs, placeholders, strict=True)]
        _Comparison(module, mode).run(*fakes)


def _like(x: torch.Tensor, recorded: torch.Tensor) -> torch.Tensor:
    """An input in the layout that it was captured with; a saved one is contiguous."""
    return torch.empty_strided(x.shape, recorded.stride(), dtype=x.dtype, device=x.device)


class _Comparison(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(module)
        self._mode = mode
        self.extra_traceback = False

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self._mode.from_tensor(value, static_shapes=True) if isinstance(value, torch.Tensor) else value

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "output" and "val" in n.meta and _form(value) != _form(n.meta["val"]):
            raise ValueError(f"{n.name} is {_form(n.meta['val'])}, but its operator gives {_form(value)}")
        return value


def _form(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(map(int, value.shape)), tuple(map(int, value.stride())), str(value.dtype), value.device.type
    if isinstance(value, (list, tuple)):
        return tuple(map(_form, value))
    return value
