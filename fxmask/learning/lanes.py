"""What searches plans with rows for each lane, for one run of learning."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fxmask.errors import CaptureError, InputError
from fxmask.ir.program import Program
from fxmask.learning.effort import Limits
from fxmask.learning.held_lanes import HeldLanes
from fxmask.learning.journal import Journal
from fxmask.learning.measured import Measured
from fxmask.learning.own_rows import OwnRows, views_of
from fxmask.learning.progress import Progress
from fxmask.learning.room import Room
from fxmask.learning.student import Student
from fxmask.sampling.sampler import Sampler
from fxmask.sampling.split_lanes import SplitLanes

logger = logging.getLogger(__name__)


def own_rows(
    program: Program,
    learned: Sequence[Sampler],
    held_out: Sequence[Sampler],
    journal: Journal,
    progress: Progress,
    limits: Limits,
    seed: int,
    deployed: Program | None = None,
    room: Room | None = None,
    starts: int = 0,
    adjoints: bool = True,
) -> OwnRows | None:
    """The search for this sampler; ``None`` if there is one lane, or a part cannot be captured alike.

    Args:
        program: the captured denoiser.
        learned: runs that are learned from.
        held_out: runs that judge.
        journal: keeps what is measured.
        progress: is told of every rollout.
        limits: that plans keep.
        seed: of local search.
        deployed: the program that will run, if that is another one.
        room: how many bytes its values may take; without bound, if not given.
        starts: first steps at which runs are measured; if not 0, coefficients may be refined by adjoints.
        adjoints: whether there is room for backward passes through whole runs.
    """
    views = views_of([*learned, *held_out], program)
    if views is None:
        return None
    try:
        student, judge = (
            Student(program, runs, deployed=deployed, room=room) for runs in (views[: len(learned)], views[len(learned) :])
        )
    except (InputError, CaptureError) as error:
        logger.info("lanes have no rows of their own: %s", error)
        return None
    split = views[0]
    order = f"lanes {split.turns}: " if isinstance(split, SplitLanes) else "lanes: "
    measured = Measured(student, judge, journal, progress, starts=starts, seed=seed, adjoints=adjoints, view=order)
    found = (HeldLanes if student.stochastic else OwnRows)(measured, limits, seed)
    return found if found.can_form else None
