"""Masks for benchmarks: random ones with a given ratio of MACs."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from fxmask.errors import FxmaskError
from fxmask.ir.mask import Mask
from fxmask.ir.program import Program


def random_mask(
    program: Program,
    num_steps: int,
    ratio: float,
    seed: int = 0,
    *,
    distinct: int | None = None,
    timesteps: Sequence[float] | None = None,
) -> Mask:
    """A mask of branches alone with a given ratio of MACs, in which nearly every row is another.

    Each step but the first computes as many randomly drawn branches as it may; what rounding leaves over goes to the next.

    Args:
        program: the captured denoiser.
        num_steps: T.
        ratio: MACs of the full run over those of the mask.
        seed: of the drawn branches.
        distinct: rows besides the first that are drawn; they take turns. All of them if not given. Learned masks have few
            distinct rows, and each costs a step graph or two to compile.
        timesteps: of the steps; those of ``timesteps_of`` if not given.

    Raises:
        FxmaskError: the denoiser's branches own too little for this ratio.
    """
    drawn = random.Random(seed)
    blocks = program.branches
    owned = sum(block.macs for block in blocks)
    wanted = program.macs * num_steps / ratio  # of all steps
    per_step = (wanted - program.macs) / max(1, num_steps - 1) - (program.macs - owned)
    if ratio > 1 and per_step < 0:
        raise FxmaskError(
            f"branches own {owned / program.macs:.0%} of the MACs, too little for {ratio:g}x in {num_steps} steps"
        )
    rows = torch.ones(num_steps, len(blocks), dtype=torch.bool)
    turn = distinct or num_steps
    left = 0.0
    for step in range(1, num_steps) if ratio > 1 else ():
        if step > turn:
            rows[step] = rows[step - turn]
            continue
        left += per_step
        rows[step] = False
        for b in drawn.sample(range(len(blocks)), len(blocks)):
            if blocks[b].macs <= left + 0.5 * blocks[b].macs:
                rows[step, b] = True
                left -= blocks[b].macs
    names = tuple(block.name for block in blocks)
    return Mask(rows, tuple(timesteps or timesteps_of(num_steps)), names, fingerprint=program.fingerprint)


def timesteps_of(num_steps: int) -> tuple[float, ...]:
    """Falling whole timesteps within the usual 1,000."""
    return tuple(float(round(999 - k * 999 / num_steps)) for k in range(num_steps))
