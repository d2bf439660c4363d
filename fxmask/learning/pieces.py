"""Parts of recorded batches that learning takes one after the other, where a whole batch has no room."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fxmask.ir.graph import value_bytes
from fxmask.ir.program import Program
from fxmask.learning.forms import Forms
from fxmask.learning.room import Room, all_bytes, peak_bytes, tensor_bytes
from fxmask.sampling.sampler import Sampler, Splits

logger = logging.getLogger(__name__)
SLOTS = 4  # fresh values of a block that are held at most
DIRECTIONS = 3  # of backward passes, each with adjoints of what is held


class Place(NamedTuple):
    """Where a run comes from, so that its random numbers are the same whether its batch is in one piece or not.

    Attributes:
        run: number of the recorded run among this rank's.
        first: of its samples.
        size: how many they are.
        whole: samples of the whole batch.
    """

    run: int
    first: int
    size: int
    whole: int


def drawn_for(place: Place, drawn: torch.Tensor) -> torch.Tensor:
    """The part ``[B, ...]`` of what was drawn for the whole batch."""
    return drawn[place.first : place.first + place.size]


def split(
    runs: Sequence[Sampler], forms: Forms, room: Room, *, gradients: bool, adjoints: bool
) -> tuple[list[Sampler], list[Place]]:
    """The runs in pieces of so many samples as there is room for, and where each comes from.

    Args:
        runs: recorded.
        forms: programs of all runs; those of pieces are added.
        room: bytes.
        gradients: whether there will be backward passes through single calls.
        adjoints: whether there will be some through whole runs.

    Raises:
        InputError: there is no room for the smallest piece of a run; says how much that needs.
    """
    remedy = ", choose effort='quick', which passes nothing backwards with a sampler without noise" if gradients else ""
    pieces: list[Sampler] = []
    places: list[Place] = []
    for number, run in enumerate(runs):
        count = run.batch_size
        lanes = forms.of_run(run, number)
        needed = max(least_bytes(p, gradients=gradients, adjoints=adjoints) for p in dict.fromkeys(lanes))
        needed += kept_for_all_steps(run) if adjoints else 0
        sizes = [size for size in range(count, 0, -1) if count % size == 0]
        size = next((size for size in sizes if room.holds(needed * size // count)), 1)
        parts = [run] if size == count else _parts(run, size, lanes, forms, number)
        if len(parts) == 1 and size < count:
            size = count
            logger.info("recorded run %d cannot be taken apart into single samples", number)
        room.require(
            needed * size // count, f"{size} sample{'s' if size > 1 else ''} of a recorded run, the least it takes", remedy
        )
        if size < count:
            room.say(f"batches of {count} in pieces of {size}")
        pieces += parts
        places += [Place(number, size * k, size, count) for k in range(len(parts))]
    return pieces, places


def _parts(run: Sampler, size: int, lanes: Sequence[Program], forms: Forms, number: int) -> list[Sampler]:
    """The run in pieces, if the denoiser computes the same for a piece; else the run alone."""
    parts = [run.rows(k, k + size) for k in range(0, run.batch_size, size)] if isinstance(run, Splits) else [None]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts) or len(lanes) != 1 or not _computes_alone(found[-1], forms, number):
        return [run]
    return found


@torch.no_grad()
def _computes_alone(part: Sampler, forms: Forms, number: int) -> bool:
    """Whether the first prediction of some samples does not depend on the others of their batch."""
    (program,) = forms.of_run(part, number)
    tensors = program.signature.bind((), dict(part.calls[0][0])).tensors
    output, recorded = program.graph_module(*tensors.values())[0], part.outputs[0][0]
    scale = float(recorded.abs().max()) or 1.0
    return output.shape == recorded.shape and bool((output - recorded).abs().max() <= 1e-2 * scale)


def kept_for_all_steps(run: Sampler) -> int:
    """Bytes that a backward pass through a run keeps for all steps: predictions, samples, and derivatives by them."""
    return 3 * len(run.order) * tensor_bytes(run.outputs[0][0])


def least_bytes(program: Program, *, gradients: bool, adjoints: bool) -> int:
    """Bytes that one call of a program takes at least while learning from it, at its batch."""
    graph = program.graph_module.graph
    branches = [value for block in program.branches for value in block.values]
    held = sum(value_bytes(program.node(value)) for value in branches)
    if not gradients and not adjoints:
        return peak_bytes(graph) + held
    backward = peak_bytes(graph) + all_bytes(graph)
    return backward + ((2 + DIRECTIONS) * SLOTS * held if adjoints else 0)
