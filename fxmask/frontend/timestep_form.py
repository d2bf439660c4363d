"""Which form of the timestep a graph takes: one per sample, or a single one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from fxmask.errors import CaptureError
from fxmask.frontend.subject import Subject
from fxmask.frontend.verify import same_values
from fxmask.ir.calls import BoundCall, Signature
from fxmask.ir.outputs import flatten_output

logger = logging.getLogger(__name__)


def choose_timestep_form(
    subject: Subject, signature: Signature, example_inputs: Mapping[str, Any]
) -> tuple[Signature, BoundCall]:
    """One timestep per sample if the model computes the same with it, else the form that was given."""
    given = dict(example_inputs).get(signature.timestep) if signature.timestep else None
    if isinstance(given, torch.Tensor):
        signature = replace(signature, timestep_type=str(given.dtype).removeprefix("torch."))
    bound = signature.bind((), example_inputs)
    if isinstance(given, torch.Tensor) and given.dim() > 0 and given.numel() > 1:
        return signature, bound
    single = replace(signature, batched_timestep=False)
    if signature.timestep is None or given is None:
        return single, bound
    expected = flatten_output(subject(example_inputs))[0]
    for candidate in (signature, single, replace(single, one_timestep=True)):
        trial = candidate.bind((), example_inputs)
        try:
            got = flatten_output(subject(trial.arguments))[0]
        except Exception as error:
            logger.debug("timestep form %s refused: %s", candidate.batched_timestep, error)
            continue
        if len(got) == len(expected) and all(same_values(a, b) for a, b in zip(got, expected, strict=True)):
            return candidate, trial
    again = flatten_output(subject(example_inputs))[0]
    if not all(same_values(a, b) for a, b in zip(again, expected, strict=True)):
        raise CaptureError(
            f"{type(subject.model).__name__} gives another result when called twice with the same arguments: it draws random "
            "numbers or keeps state between calls, and neither can be cached"
        )
    raise CaptureError(
        f"{type(subject.model).__name__} computes something else when argument {signature.timestep!r} is a tensor instead of "
        f"{given!r}; pass the timestep as a tensor, or name another argument with roles={{...: 'timestep'}}"
    )
