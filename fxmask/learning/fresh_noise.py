"""Which of the refined plans is best, by noise that none of them has seen.

Where a sampler injects noise, images differ most in how hard they are, and a plan that was fitted on a few dozen may lead by
some dB on these and be behind plain reuse on others. Plans with rows for each lane have twice the coefficients of others, and
eight held-out images may prefer the wrong one. Fresh noise is recorded for conditioning that is known, a batch at a time, and
plans that are clearly behind are left out of the next one.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from typing import Any

from fxmask.ir.program import Program
from fxmask.learning.candidate import Candidate
from fxmask.learning.choice import margin
from fxmask.learning.forms import Forms
from fxmask.learning.measured import Measured
from fxmask.learning.own_rows import OwnRows
from fxmask.learning.pieces import split
from fxmask.learning.room import Room
from fxmask.learning.student import Student
from fxmask.sampling.sampler import Sampler

MOST = 8  # batches
CLEARLY = 2.0  # margins that a plan must be behind the best one to be left out


class FreshNoise:
    """Batches of fresh noise, recorded when they are first asked for.

    Args:
        program: the captured denoiser.
        runs: recorded, whose conditioning they have, by turns.
        measured: whose work this is, and whose journal keeps it.
        forms: programs of all runs.
        room: how many bytes a rollout may take.
        deployed: the program that will run, if that is another one.
        seed: of the noise.
        apart: searches plans with rows for each lane, if there are such.
    """

    def __init__(
        self,
        program: Program,
        runs: Sequence[Sampler],
        measured: Measured,
        forms: Forms,
        room: Room,
        deployed: Program | None,
        seed: int,
        apart: OwnRows | None = None,
    ) -> None:
        self._program, self._runs, self._measured, self._seed, self._apart = program, runs, measured, seed, apart
        self._given: tuple[Any, ...] = forms, room, deployed
        self._latest: tuple[int, Sampler] | None = None  # one at a time: recorded runs are large
        self._students: dict[bool, Student] = {}  # which roll out on it, without lanes and with

    def best(self, candidates: Sequence[Candidate], units: float) -> Candidate:
        """The best of some candidates; the first are expected to be.

        Args:
            candidates: refined or not, at least one, the best so far first.
            units: of work, after which no other batch is begun.

        Raises:
            InputError: nothing random is in the recorded runs, or there is no room for a rollout.
        """
        ends = self._measured.units + units
        errors = [self._measured_of(c).judged_images(c) for c in candidates]  # nothing was fitted on these either
        left = list(range(len(candidates)))
        for batch in range(MOST):
            if len(left) == 1 or (batch and self._measured.units >= ends):
                break
            for n in left:
                student = functools.partial(self._student, lanes=candidates[n].schedule.lanes > 1)
                errors[n] += self._measured_of(candidates[n]).on_fresh_noise(candidates[n], batch, student)
            best = min(left, key=lambda n: statistics.fmean(errors[n]))
            left = [n for n in left if not _is_behind(errors[n], errors[best])]
        return candidates[min(left, key=lambda n: statistics.fmean(errors[n]))]

    def _measured_of(self, candidate: Candidate) -> Measured:
        return self._apart.measured if self._apart is not None and candidate.schedule.lanes > 1 else self._measured

    def _student(self, batch: int, lanes: bool) -> Student:
        """Rolls out on a batch, which is recorded now."""
        recorded = 0.0
        if self._latest is None or self._latest[0] != batch:
            self._latest, self._students = None, {}
            known = self._runs[batch % len(self._runs)]
            self._latest = batch, known.renoised(self._program.model, 104_729 * (self._seed + 1) + batch)
            recorded = 1.0
        if lanes not in self._students:
            self._students[lanes] = self._student_of(self._latest[1], lanes)
        self._students[lanes].units += recorded
        return self._students[lanes]

    def _student_of(self, run: Sampler, lanes: bool) -> Student:
        forms, room, deployed = self._given
        if lanes and self._apart is not None:
            return Student(self._program, [self._apart.view_of(run)], room=room, deployed=deployed)
        pieces, places = split([run], forms, room, gradients=False, adjoints=False)
        return Student(self._program, pieces, forms=forms, room=room, deployed=deployed, places=places)


def _is_behind(errors: Sequence[float], best: Sequence[float]) -> bool:
    differences = [x - y for x, y in zip(errors, best, strict=True)]
    return statistics.fmean(differences) > CLEARLY * margin(differences)
