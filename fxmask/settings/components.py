"""Which of a pipeline's modules are its denoisers, and how one is put in the place of another."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fxmask._torch import uncompiled
from fxmask.errors import InputError
from fxmask.frontend.modules import unwrapped
from fxmask.ir.calls import TIMESTEP_NAMES
from fxmask.sampling.twin import is_pipeline

# Of a pipeline's modules, those that diffusers' pipelines call at every step, about in the order in which they do.
DENOISERS: tuple[str, ...] = (
    "prior_prior",
    "prior",
    "transformer",
    "transformer_2",
    "unconditional_transformer",
    "unet",
    "unet_2",
)
DENOISERS += ("decoder", "super_res_first", "super_res_last", "dit", "model")
# Words in names of classes that are given a timestep and denoise nothing: what is beside a denoiser, or before and after.
BESIDE = ("ControlNet", "Adapter", "Autoencoder", "VAE", "VQ", "Projection", "Refiner", "Upsampl", "Decoder3D", "Vocoder")


def denoisers_of(pipe: Any, component: str | Sequence[str] | None = None) -> tuple[str, ...]:
    """Names of the pipeline's denoisers, the one that is called first coming first where that is known.

    Args:
        pipe: the pipeline.
        component: those that are meant, if the usual ones are not.

    Raises:
        InputError: nothing in it is one, or several could be.
    """
    modules = [name for name, value in vars(pipe).items() if isinstance(value, torch.nn.Module)]
    if component is not None:
        names = (component,) if isinstance(component, str) else tuple(component)
        for name in names:
            if not isinstance(component_of(pipe, name), torch.nn.Module):
                raise InputError(f"component={name!r} is no module of {type(pipe).__name__}; it has {modules}")
        return names
    found = [name for name in DENOISERS if name in modules]
    if len(found) > 1:  # others of these names may be something else
        found = [name for name in found if _takes_timestep(getattr(pipe, name))] or found[:1]
    if not found:
        found = [name for name in modules if _takes_timestep(getattr(pipe, name))] or (modules if len(modules) == 1 else [])
        found = found if len(found) == 1 else []
    if not found:
        found = [f"{name}.{own}" for name, part in _pipelines(pipe) for own in _denoisers_or_none(part)]
    if not found:
        raise InputError(
            f"which of the modules of {type(pipe).__name__} is called at every step is not known; pass component=, one of "
            f"{modules}, or several of them"
        )
    return tuple(found)


def _denoisers_or_none(pipe: Any) -> tuple[str, ...]:
    try:
        return denoisers_of(pipe)
    except InputError:
        return ()


def _takes_timestep(module: torch.nn.Module) -> bool:
    module = unwrapped(module)
    if any(word in type(module).__name__ for word in BESIDE):
        return False
    return not {*TIMESTEP_NAMES, "timestep_ratio"}.isdisjoint(inspect.signature(module.forward).parameters)


def _pipelines(pipe: Any) -> Iterator[tuple[str, Any]]:
    """Pipelines among a pipeline's attributes, by name."""
    for name, value in vars(pipe).items():
        if not isinstance(value, torch.nn.Module) and is_pipeline(value):
            yield name, value


def component_of(pipe: Any, name: str) -> Any:
    """A pipeline's part by name, ``"prior_pipe.prior"`` in one of its own pipelines; ``None`` if there is none."""
    for part in name.split("."):
        pipe = getattr(pipe, "__dict__", {}).get(part)
    return pipe


def accelerated_in(pipe: Any, name: str) -> Any:
    """The same, out of ``torch.compile``: what is accelerated stays so inside of it."""
    found = component_of(pipe, name)
    return uncompiled(found) if isinstance(found, torch.nn.Module) else found


def put(pipe: Any, name: str, model: torch.nn.Module) -> None:
    """Put a module in the place of a pipeline's part, wherever else the pipeline and its own pipelines hold that.

    Pipelines keep a module in their attribute only; some forbid to register it again.
    """
    before = component_of(pipe, name)
    for part in (pipe, *(inner for _, inner in _pipelines(pipe))):
        for own, value in list(vars(part).items()):
            if value is before:
                part.__dict__[own] = model


def original_of(pipe: Any, name: str) -> torch.nn.Module:
    """A pipeline's denoiser, without what accelerates it."""
    model: torch.nn.Module = unwrapped(component_of(pipe, name))
    return model
