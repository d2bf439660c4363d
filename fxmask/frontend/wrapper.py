"""The denoiser as a function of a flat list of tensors, which is what can be traced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fxmask.frontend.casts import casts_recorded
from fxmask.ir.calls import BoundCall
from fxmask.ir.outputs import flatten_output

Tensors = tuple[torch.Tensor, ...]
MODEL = "model"  # the attribute under which a wrapper holds the denoiser


class Wrapper(torch.nn.Module):
    """Presents the model as a function from a flat list of tensors to a flat list of tensors."""

    def __init__(self, model: torch.nn.Module, bound: BoundCall) -> None:
        super().__init__()
        self.model = model
        self.bound = bound

    def forward(self, *tensors: torch.Tensor) -> Tensors:
        """The flat outputs of the model."""
        flat, _ = flatten_output(self.model(**self.bound.rebuild(tensors)))
        return tuple(flat)


class WrapperWithData(Wrapper):
    """Reads ``.data`` as ``.detach()``: a write through ``.data`` is seen by no tracer and would be lost.

    Weights that are converted for a layer's forward (``layer.to(dtype)``) become casts.
    """

    def forward(self, *tensors: torch.Tensor) -> Tensors:
        """The flat outputs of the model."""
        with _DataIsDetach(), casts_recorded(self.model):
            return super().forward(*tensors)


class _DataIsDetach(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].detach()
        return func(*args, **(kwargs or {}))


def distinct(tensors: Sequence[torch.Tensor]) -> Tensors:
    """The tensors with repeated objects copied: a tracer would take two arguments for one."""
    seen: set[int] = set()
    result = []
    for tensor in tensors:
        result.append(tensor.clone() if id(tensor) in seen else tensor)
        seen.add(id(tensor))
    return tuple(result)
