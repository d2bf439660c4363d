"""A denoiser that returns NaN or infinity cannot be learned from: every mask of it looks as good as any other."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch

from fxmask._torch import pytree
from fxmask.errors import InputError
from fxmask.frontend.shadow import shadow_of
from fxmask.ir.weights import named_tensors
from fxmask.sampling.sampler import Call


def refuse_not_finite(
    model: torch.nn.Module,
    calls: Sequence[Sequence[Call]],
    outputs: Sequence[Sequence[torch.Tensor]],
    timesteps: Sequence[float],
) -> None:
    """Refuse a recorded run with predictions that are not finite.

    Args:
        model: the denoiser.
        calls: per step and lane the call's arguments.
        outputs: per step and lane the prediction, ``[B, ...]``.
        timesteps: of the steps.

    Raises:
        InputError: names the step, and the first module or weight that is not finite.
    """
    for step, (lanes, predictions) in enumerate(zip(calls, outputs, strict=True)):
        for call, prediction in zip(lanes, predictions, strict=True):
            if not is_finite(prediction):
                raise InputError(
                    f"{type(model).__name__} returns values that are not finite (NaN or infinity) at step {step}, timestep "
                    f"{timesteps[step]:g}{_where(model, call)}, so nothing can be learned from this run, and no sample is right"
                )


def is_finite(value: Any) -> bool:
    """Whether all floating-point tensors in a nested value hold numbers only."""
    tensors = [x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]
    return all(bool(x.isfinite().all()) for x in tensors if x.is_floating_point() or x.is_complex())


def _where(model: torch.nn.Module, call: Call) -> str:
    """The cause, as the end of a sentence."""
    weights = [name for name, x in named_tensors(model) if not is_finite(x.float() if x.itemsize == 1 else x)]
    if weights:
        return f": weights hold such values, {', '.join(weights[:3])}{', ...' if len(weights) > 3 else ''}"
    if not is_finite(dict(call)):
        return ": its arguments hold such values already"
    path, dtype = _first_module(model, call)
    if path is None:
        return ""
    half = dtype == torch.float16
    advice = "; float16 overflows beyond 65504: use torch.bfloat16, or float32 for that module" if half else ""
    return f": the first module with such a result is {path or '(the model itself)'!r}, in {dtype}{advice}"


@torch.no_grad()
def _first_module(model: torch.nn.Module, call: Call) -> tuple[str | None, torch.dtype | None]:
    """The module that was first to return what is not finite, and the type of its result."""
    found: list[tuple[str, torch.dtype]] = []

    def look(path: str, module: torch.nn.Module, args: Any, output: Any) -> None:
        if not found and not is_finite(output):
            found.append((path, next(x.dtype for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor))))

    shadow = shadow_of(model)  # so that nobody has to take the hooks away
    for path, module in shadow.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            module.register_forward_hook(functools.partial(look, path))
    with contextlib.suppress(Exception):  # a second run may fail; then no name
        shadow(**call)
    return found[0] if found else (None, None)
