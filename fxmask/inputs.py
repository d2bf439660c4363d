"""Example arguments for a denoiser: what can be inferred is inferred, the rest is asked for by name."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fxmask.calls import Signature, first_tensor
from fxmask.errors import InputError

ExampleInputs = Mapping[str, Any] | Callable[[int, torch.Generator], Mapping[str, Any]] | None

# The only `config` keys that are ever read, and what for.
CONFIG_CHANNELS = ("in_channels",)
CONFIG_SIZE = ("sample_size",)


def module_device(model: torch.nn.Module) -> torch.device:
    """Device of the first parameter or buffer; CPU if there is none."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def module_dtype(model: torch.nn.Module) -> torch.dtype:
    """Type of the first floating-point parameter; the default type if there is none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


def resolve_conditioning(example_inputs: ExampleInputs, batch_size: int, generator: torch.Generator) -> dict[str, Any]:
    """The user's example inputs as a dict, calling them if they are a function of (batch size, generator).

    Raises:
        InputError: they are neither a mapping, nor a function that returns one.
    """
    if example_inputs is None:
        return {}
    given = example_inputs(batch_size, generator) if callable(example_inputs) else example_inputs
    if not isinstance(given, Mapping):
        raise InputError(
            "example_inputs must be a dict of forward arguments, or a function (batch_size, generator) -> dict; "
            f"got {type(given).__name__}"
        )
    return dict(given)


def example_call(
    model: torch.nn.Module, timestep: torch.Tensor, conditioning: Mapping[str, Any], batch_size: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Arguments of one call that the model accepts.

    Args:
        model: the denoiser.
        timestep: 0-d, as the scheduler gives it.
        conditioning: arguments that the user gave; may include sample and timestep.
        batch_size: B, where no sample was given.
        dtype: of the sample, where none was given.

    Raises:
        InputError: something can neither be inferred nor was given; names it and says in what form.
    """
    signature = Signature.of(model)
    call = dict(conditioning)
    unknown = [n for n in call if n not in signature.parameters.parameters and not _accepts_any(signature.parameters)]
    if unknown:
        raise InputError(
            f"example_inputs has {unknown}, which {type(model).__name__}.forward does not take; "
            f"it takes {list(signature.parameters.parameters)}"
        )
    if signature.sample not in call:
        call[signature.sample] = torch.zeros(_sample_shape(model, signature, batch_size), dtype=dtype, device=timestep.device)
    missing = [
        name
        for name, p in signature.parameters.parameters.items()
        if p.default is inspect.Parameter.empty
        and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        and name not in call
        and name != signature.timestep
    ]
    if missing:
        raise InputError(
            f"{type(model).__name__}.forward needs {missing}, which cannot be inferred: random conditioning would be "
            f"the wrong distribution to learn from. Pass example_inputs={{{', '.join(f'{n!r}: ...' for n in missing)}}} "
            f"with tensors for a batch of {len(call[signature.sample])}, or a function (batch_size, generator) -> dict"
        )
    if signature.timestep is None or signature.timestep in call:
        return call
    return _try_timestep_forms(model, signature, call, timestep)


def _try_timestep_forms(
    model: torch.nn.Module, signature: Signature, call: dict[str, Any], timestep: torch.Tensor
) -> dict[str, Any]:
    batch = len(call[signature.sample])
    name = signature.timestep
    assert name is not None
    problems = []
    for form in (timestep, timestep.expand(batch)):
        try:
            with torch.no_grad():
                first_tensor(model(**{**call, name: form}))
        except Exception as error:
            problems.append(f"{name} of shape {list(form.shape)}: {type(error).__name__}: {error}".splitlines()[0])
            continue
        return {**call, name: form}
    optional = [n for n, p in signature.parameters.parameters.items() if n not in call and n != name and p.default is None]
    hint = f" Arguments that were left at None: {optional}." if optional else ""
    raise InputError(
        f"{type(model).__name__} does not accept the inferred arguments.{hint} If the model is conditional, its "
        "conditioning cannot be inferred: pass it with example_inputs={name: tensor}, or as a function "
        "(batch_size, generator) -> dict. Tried " + "; ".join(problems)
    )


def _accepts_any(parameters: inspect.Signature) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in parameters.parameters.values())


def _sample_shape(model: torch.nn.Module, signature: Signature, batch_size: int) -> tuple[int, ...]:
    config = getattr(model, "config", None)
    channels = next((getattr(config, key, None) for key in CONFIG_CHANNELS), None)
    size = next((getattr(config, key, None) for key in CONFIG_SIZE), None)
    if not isinstance(channels, int) or not isinstance(size, (int, tuple, list)):
        raise InputError(
            f"the shape of {signature.sample!r} cannot be inferred: {type(model).__name__} has no config with "
            f"{CONFIG_CHANNELS[0]} and {CONFIG_SIZE[0]}. Pass example_inputs={{{signature.sample!r}: tensor}} of "
            "shape [batch, channels, ...]"
        )
    spatial = (size, size) if isinstance(size, int) else tuple(size)
    return (batch_size, channels, *spatial)
