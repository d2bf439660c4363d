"""Facts about modules."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from fxmask._torch import uncompiled
from fxmask.errors import InputError

HOOKED = "_fxmask_hooked"  # under which a copy of a denoiser with a hook around it keeps the denoiser


def require_denoiser(model: Any) -> torch.nn.Module:
    """The module itself, out of ``torch.compile``, PEFT and acceleration.

    Raises:
        InputError: it is no module, e.g. a whole pipeline; names the right call.
    """
    if isinstance(model, torch.nn.Module):
        return unwrapped(model)
    parts = {name: x for name, x in getattr(model, "__dict__", {}).items() if isinstance(x, torch.nn.Module)}
    message = f"model must be a torch.nn.Module, got {type(model).__name__}"
    if parts and not callable(model):
        message += f"; pass its {next(iter(parts))}"
    elif parts:
        message += (
            f", which holds {list(parts)}. Accelerate the pipeline: fxmask.accelerate(pipe). Or record a call of it with "
            "calls = fxmask.record_pipeline(pipe, ...), and pass that to fxmask.learn(fxmask.capture(calls.denoiser, "
            "calls.calls[0][0], calls.roles), calls)"
        )
    raise InputError(message)


def require_eval(model: Any) -> torch.nn.Module:
    """The denoiser that is meant; see ``require_denoiser``.

    Raises:
        InputError: likewise, or it is in training mode.
    """
    denoiser = require_denoiser(model)
    if denoiser.training:
        raise InputError(f"{type(denoiser).__name__} is in training mode; call model.eval() first")
    return denoiser


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The denoiser behind an accelerated model, a copy with a hook, ``torch.compile`` or PEFT; any other module itself."""
    while True:
        inner = uncompiled(module)
        inner = vars(inner).get(HOOKED) or inner
        wrapper: Any = inner
        if getattr(type(inner), "is_accelerated", False):
            inner = wrapper.original
        elif is_adapted(inner):
            inner = wrapper.get_base_model()
        if inner is module:
            return module
        module = inner


def is_adapted(module: torch.nn.Module) -> bool:
    """Whether a module is a PEFT model, whose adapters are inside of the model that it wraps."""
    return any(
        cls.__name__ in ("PeftModel", "PeftMixedModel") and cls.__module__.startswith("peft.") for cls in type(module).__mro__
    )


def module_device(model: torch.nn.Module) -> torch.device:
    """Device of the first parameter or buffer; CPU if there is none."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def module_dtype(model: torch.nn.Module) -> torch.dtype:
    """Type of the first floating-point parameter that is computed in, not only stored (float8); else the default type."""
    kinds = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next((kind for kind in kinds if kind.itemsize > 1), torch.get_default_dtype())
