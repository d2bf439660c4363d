"""Arguments of a denoiser: which are needed, which are refused, how they are described."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from fxmask.errors import InputError
from fxmask.ir.calls import Signature


def refuse_unknown(model: torch.nn.Module, signature: Signature, call: Mapping[str, Any]) -> None:
    """Raise ``InputError`` for arguments that the model does not take."""
    accepted = signature.parameters.parameters
    unknown = [n for n in call if n not in accepted and not _accepts_any(signature.parameters)]
    if unknown:
        raise InputError(
            f"example_inputs has {unknown}, which {type(model).__name__}.forward does not take; it takes {list(accepted)}"
        )


def required_names(signature: Signature) -> list[str]:
    """Parameters without a default."""
    return [
        name
        for name, p in signature.parameters.parameters.items()
        if p.default is inspect.Parameter.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]


def needed_names(signature: Signature) -> set[str]:
    """Arguments without which a call cannot be made: the sample, the timestep, and those without a default."""
    roles = {signature.sample, signature.timestep} - {None}
    return {*required_names(signature), *(str(name) for name in roles)}


def describe_value(value: Any) -> str:
    """Type and shape of an argument, as text."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {describe_value(v)}" for k, v in value.items()) + "}"
    return repr(value)


def _accepts_any(parameters: inspect.Signature) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in parameters.parameters.values())
