"""Why a model could not be captured, in one line that names the module."""

from __future__ import annotations

import traceback

import torch
from torch import fx

from fxmask.errors import CaptureError


def refuse_data_dependent(module: fx.GraphModule) -> None:
    """Sizes that depend on the values of tensors cannot be cached or compiled.

    Raises:
        CaptureError: names the operator and the module.
    """
    for node in module.graph.nodes:
        values = node.meta.get("val")
        for value in values if isinstance(values, (tuple, list)) else (values,):
            sizes = tuple(value.shape) if isinstance(value, torch.Tensor) else (value,)
            if any(isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) for size in sizes):
                stack = list(node.meta.get("nn_module_stack", {}).values())
                where = f" in module {stack[-1][0]!r}" if stack and stack[-1][0] else " in the model's own forward"
                raise CaptureError(f"data-dependent sizes: {node.target}{where} has a size that is known only when it runs")


def explain(error: BaseException, model: torch.nn.Module) -> str:
    """The reason of a failure in one line, and the module of the model where it happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
    where = _where(error, model)
    return f"{reason} [{where}]" if where else reason


def _where(error: BaseException, model: torch.nn.Module) -> str | None:
    """The innermost module of the model whose code the error passed through, or the line of code that it names."""
    paths = {id(module): path for path, module in model.named_modules()}
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        found = None
        for frame, line in traceback.walk_tb(current.__traceback__):
            owner = frame.f_locals.get("self")
            if isinstance(owner, torch.nn.Module) and id(owner) in paths:
                found = (owner, line)
        if found is not None:
            owner, line = found
            return f"in module {paths[id(owner)] or '(the model itself)'!r}, {type(owner).__name__}, line {line}"
        current = current.__cause__ or current.__context__
    places = [line.strip() for line in str(error).splitlines() if line.strip().startswith("File ")]
    return f"at {places[-1]}" if places else None
