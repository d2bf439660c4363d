"""Calls that hold all lanes in one batch, taken apart for a mask that has rows for each.

    call [L * N rows] --> L calls [N rows] --> L predictions --> prediction [L * N rows]

A step whose lanes all compute everything stays one call of the whole batch: the first part's call runs it, and the others take
what it has made of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fxmask._torch import pytree
from fxmask.frontend.recapture import recapture
from fxmask.ir.calls import BoundCall
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


def holds_lanes(bound: BoundCall, count: int) -> bool:
    """Whether the samples of a call are so many equal parts."""
    if bound.is_list or bound.batch_size % count:
        return False
    first, *others = bound.sample.chunk(count)
    return all(torch.equal(first, other) for other in others)


def program_of_a_lane(program: Program, plan: Plan) -> tuple[Program, Plan]:
    """The program of one part of the batch, and its plan, where the mask's lanes come as parts of one batch.

    Raises:
        CaptureError: the model cannot be captured for a part with the same blocks.
    """
    mask = plan.source
    if not mask.batched or not holds_lanes(program.example, len(mask.lanes)):
        return program, plan  # it is a part's already
    part = parts_of(program.example, (), program.example.arguments, len(mask.lanes))[0][1]
    small = recapture(program, program.signature.bind((), part), mask.blocks)
    return small, rectify(small, replace(mask, fingerprint=small.fingerprint), start=plan.start)


def parts_of(
    bound: BoundCall, args: Sequence[Any], kwargs: Mapping[str, Any], count: int
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of each lane: equal parts of every tensor that has a row for each sample of the batch."""
    rows = bound.batch_size

    def part(x: Any, k: int) -> Any:
        return x.chunk(count)[k] if isinstance(x, torch.Tensor) and x.dim() and x.shape[0] == rows else x

    return [
        (
            tuple(pytree.tree_map(lambda x, k=k: part(x, k), x) for x in args),
            {name: pytree.tree_map(lambda x, k=k: part(x, k), value) for name, value in kwargs.items()},
        )
        for k in range(count)
    ]


def joined(outputs: Sequence[Any]) -> Any:
    """Return values of the lanes as that of the whole batch."""
    flat = [flatten_output(output) for output in outputs]
    return flat[0][1]([torch.cat(tensors) for tensors in zip(*(tensors for tensors, _ in flat), strict=True)])
