"""Example arguments for a denoiser: what can be inferred is inferred, the rest is asked for by name.

Shapes come from ``forward``'s signature, from the ``config`` keys in ``CONFIG``, and from trial: a copy of the model without
memory (fake tensors) is called with candidates, and the ones with which it gets furthest are kept. A captured graph needs
shapes only, so for that random conditioning will do; learning needs real conditioning and asks for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxmask._torch import pytree
from fxmask.errors import InputError
from fxmask.frontend.arguments import describe_value, refuse_unknown, required_names
from fxmask.frontend.infer import Trial, infer_call
from fxmask.frontend.shapes import CONFIG, first_config, sample_shapes, timestep_candidates
from fxmask.ir.calls import Signature
from fxmask.ir.outputs import first_tensor

logger = logging.getLogger(__name__)
ExampleInputs = Mapping[str, Any] | Callable[[int, torch.Generator], Mapping[str, Any]] | None


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


def on_device(arguments: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The arguments with all tensors on a device, where a sampler would put them."""
    placed: dict[str, Any] = pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), dict(arguments))
    return placed


def example_call(
    model: torch.nn.Module, timestep: torch.Tensor, conditioning: Mapping[str, Any], batch_size: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Arguments of one call that the model accepts, none of them invented but sample and timestep.

    Args:
        model: the denoiser.
        timestep: 0-d, as the scheduler gives it.
        conditioning: arguments that the user gave, on whatever device; may include sample and timestep.
        batch_size: B, where no sample was given.
        dtype: of the sample, where none was given.

    Raises:
        InputError: something can neither be inferred nor was given; names it and says in what form.
    """
    signature = Signature.of(model)
    call = on_device(conditioning, timestep.device)
    refuse_unknown(model, signature, call)
    missing = [
        name for name in required_names(signature) if name not in call and name not in (signature.sample, signature.timestep)
    ]
    if missing:
        raise InputError(
            f"{type(model).__name__}.forward needs {missing}, which cannot be inferred: random conditioning would be "
            f"the wrong distribution to learn from. Pass example_inputs={{{', '.join(f'{n!r}: ...' for n in missing)}}} "
            f"with tensors for a batch of {batch_size}, or a function (batch_size, generator) -> dict; or, of a pipeline, call "
            "fxmask.accelerate(pipe), which learns from the pipeline's own calls"
            + _hints(model, signature, call, batch_size, missing)
        )
    if signature.sample not in call:
        shape = _sample_shape(model, signature, call, batch_size)
        call[signature.sample] = torch.zeros(shape, dtype=dtype, device=timestep.device)
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
    _refuse_other_batch(signature, call, batch)
    raise InputError(
        f"{type(model).__name__} does not accept the inferred arguments.{hint} If the model is conditional, its "
        "conditioning cannot be inferred: pass it with example_inputs={name: tensor}, or as a function "
        "(batch_size, generator) -> dict. Tried "
        + "; ".join(problems)
        + _hints(model, signature, {n: v for n, v in call.items() if n != signature.sample}, batch, optional)
    )


def _hints(model: torch.nn.Module, signature: Signature, call: Mapping[str, Any], batch: int, names: Sequence[str]) -> str:
    """Shapes and types of arguments with which the model would run, as text."""
    try:
        found = infer_call(model, call, batch, signature)
    except InputError:
        return "; their shapes could not be found by trial either"
    lines = [f"{name}: {describe_value(found[name])}" for name in names if name in found]
    return ". It would run with " + "; ".join(lines) if lines else ""


def _sample_shape(model: torch.nn.Module, signature: Signature, call: Mapping[str, Any], batch_size: int) -> tuple[int, ...]:
    """The sample's shape where the config has channels and size; which order and rank is found by trial."""
    if (
        isinstance(first_config(model, "channels"), int)
        and (first_config(model, "size") or first_config(model, "height")) is not None
    ):
        first, *others = sample_shapes(model, batch_size)
        if not others or _runs(model, signature, {**call, signature.sample: torch.zeros(first)}, batch_size):
            return first
        try:
            return tuple(infer_call(model, call, batch_size, signature)[signature.sample].shape)
        except InputError as error:
            _refuse_other_batch(signature, call, batch_size)
            given = ", ".join(f"{name}: {describe_value(value)}" for name, value in call.items()) or "nothing"
            raise InputError(
                f"the shape of {signature.sample!r} cannot be inferred: {type(model).__name__} runs with none that its config "
                f"suggests, such as {list(first)}, and example_inputs of {given}. Change these, or pass "
                f"example_inputs={{{signature.sample!r}: tensor}} too, of shape [batch, channels, ...] ({error})"
            ) from None
    raise InputError(
        f"the shape of {signature.sample!r} cannot be inferred: {type(model).__name__} has no config with "
        f"{CONFIG['channels'][0]} and {CONFIG['size'][0]} that fit. Pass example_inputs={{{signature.sample!r}: tensor}} "
        f"of shape [batch, channels, ...]{_hints(model, signature, call, batch_size, [signature.sample])}"
    )


def _refuse_other_batch(signature: Signature, call: Mapping[str, Any], batch: int) -> None:
    """Refuse conditioning none of which is for the batch of the sample: that is why a model does not run."""
    tensors = {n: x for n, x in call.items() if isinstance(x, torch.Tensor) and x.dim() and n != signature.sample}
    if tensors and all(len(x) % batch for x in tensors.values()):
        given = ", ".join(f"{name}: {describe_value(x)}" for name, x in tensors.items())
        raise InputError(
            f"example_inputs are not for a batch of {batch}, which is what is recorded ({given}). Pass tensors for a batch of "
            f"{batch}, or a function (batch_size, generator) -> dict that makes them"
        )


def _runs(model: torch.nn.Module, signature: Signature, call: dict[str, Any], batch: int) -> bool:
    try:
        trial = Trial(model, signature)
    except Exception:  # a model that cannot be copied is not tried
        logger.debug("no trial", exc_info=True)
        return True
    name = signature.timestep
    forms = timestep_candidates(batch) if name is not None and name not in call else [None]
    return any(trial.run(call if form is None else {**call, str(name): form}) for form in forms)
