"""Calls that hold all lanes in one batch, taken apart for a mask that has rows for each.

    call [L * N rows] --> L calls [N rows] --> L predictions --> prediction [L * N rows]

A step whose lanes all compute everything stays one call of the whole batch: the first part's call runs it, and the others take
what it has made of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fxmask.frontend.recapture import recapture
from fxmask.ir.calls import BoundCall, parts_of_batch, repeats
from fxmask.ir.outputs import flatten_output
from fxmask.ir.plan import Plan
from fxmask.ir.program import Program
from fxmask.passes.rectify import rectify


@dataclass
class Whole:
    """The call that parts come from.

    Attributes:
        bound: the call.
        outputs: by part, what a step of the whole batch has already made of it.
    """

    bound: BoundCall
    outputs: dict[int, list[torch.Tensor]] = field(default_factory=dict)


def holds_lanes(bound: BoundCall, program: Program, count: int) -> bool:
    """Whether a call is a batch of so many lanes.

    One with as many rows as a lane is one lane alone, guidance that stops midway for example, unless its parts have one sample:
    then it is of fewer images. To see that waits for the device.

    Args:
        bound: the call.
        program: of a lane.
        count: how many lanes there are.
    """
    if bound.is_list or bound.batch_size % count:
        return False
    return bound.batch_size != program.batch_size or repeats(program.moving_part(bound.sample), count)


def program_of_a_lane(program: Program, plan: Plan) -> tuple[Program, Plan]:
    """The program of one part of the batch, and its plan, where the mask's lanes come as parts of one batch.

    Raises:
        CaptureError: the model cannot be captured for a part with the same blocks.
    """
    mask = plan.source
    example = program.example
    if not mask.batched or example.is_list or not repeats(program.moving_part(example.sample), len(mask.lanes)):
        return program, plan  # it is a part's already
    part = parts_of_batch(example.arguments, example.sample, len(mask.lanes))[0]
    small = recapture(program, program.signature.bind((), part), mask.blocks)
    return small, rectify(small, replace(mask, fingerprint=small.fingerprint), start=plan.start)


def joined(outputs: Sequence[Any]) -> Any:
    """Return values of the lanes as that of the whole batch."""
    flat = [flatten_output(output) for output in outputs]
    return flat[0][1]([torch.cat(tensors) for tensors in zip(*(tensors for tensors, _ in flat), strict=True)])
