"""Everything that learning measures, by way of the journal: what was measured once is not measured again."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import torch

from fxmask.learning.adjoint import acts_by_element, refine_all, refinement_cost
from fxmask.learning.candidate import Candidate, ParetoPoint
from fxmask.learning.journal import Journal
from fxmask.learning.levels import Level
from fxmask.learning.probes import Probes, has_derivatives, measure_probes
from fxmask.learning.progress import Progress
from fxmask.learning.refine import refine
from fxmask.learning.refine import refinement_cost as rounds_cost
from fxmask.learning.runs import measure_runs
from fxmask.learning.schedule import Coefficients, Schedule, coefficients_from_data, coefficients_to_data, schedule_key
from fxmask.learning.student import Student


class Measured:
    """Measurements of one run of learning.

    Args:
        student: on the noise that is learned from.
        judge: on held-out noise.
        journal: keeps the results.
        progress: is told of every rollout.
        starts: first steps at which runs are measured.
        seed: of random directions.
    """

    def __init__(
        self, student: Student, judge: Student, journal: Journal, progress: Progress, *, starts: int, seed: int
    ) -> None:
        self.student = student
        self.judge = judge
        self.progress = progress
        self._journal = journal
        self._starts = starts
        self._seed = seed
        self.branches = [block.name for block in student.program.branches]

    @property
    def units(self) -> float:
        """Work so far, in full sampling runs of the trajectories that are learned from."""
        judged = self.judge.units * self.judge.images / self.student.images
        return self.student.units + judged + self._journal.replayed

    @property
    def held_share(self) -> float:
        """Share of the held-out images among all."""
        return self.judge.images / (self.judge.images + self.student.images)

    def of_all(self, score: float, judged: float) -> float:
        """Mean over the images that were learned from and those that were held out."""
        return (1 - self.held_share) * score + self.held_share * judged

    def _get(self, key: str, measure: Callable[[], Any], student: Student) -> Any:
        """The result of ``measure``, alike on every rank."""
        return self.student.group.agree(self._journal.get(key, measure, student))

    def latency(self, backend: str, measure: Callable[[], Any]) -> Any:
        """Seconds of every node."""
        return self._get(f"latency {backend}", measure, self.student)

    def evaluate(self, schedule: Schedule) -> Candidate:
        """The schedule, with coefficients fitted along the student's run."""

        def roll() -> Any:
            rolled = self.student.rollout(schedule)
            return [self.student.score(rolled), coefficients_to_data(rolled.coefficients)]

        score, terms = self._get(f"roll {schedule_key(schedule)}", roll, self.student)
        self.progress.tick()
        return Candidate(schedule, coefficients_from_data(terms), score)

    def runs(self, level: Level) -> torch.Tensor:
        """Errors of runs of a level, see ``measure_runs``."""

        def measure() -> Any:
            return measure_runs(self.student, level, self._starts, self.progress.tick).tolist()

        return torch.tensor(self._get(f"runs {level.name} {level.history}", measure, self.student), dtype=torch.float64)

    @functools.cached_property
    def probes(self) -> Probes:
        """Of all branches."""

        def measure() -> Any:
            return [x.tolist() for x in measure_probes(self.student, self.branches)]

        rows = self._get("probes", measure, self.student)
        return Probes(*(torch.tensor(x, dtype=torch.float64) for x in rows))

    @functools.cached_property
    def differentiable(self) -> bool:
        """Whether the denoiser has derivatives."""
        return has_derivatives(self.student.programs[0][0])

    @functools.cached_property
    def has_adjoints(self) -> bool:
        """Whether all coefficients can be refined at once."""
        return all(acts_by_element(t) for t in self.student.trajectories) and self.differentiable

    def refine(self, candidate: Candidate, rounds: int, ends: float, *, again: bool) -> Candidate | None:
        """The candidate with its coefficients refined, by fewer rounds or not at all where units would pass ``ends``.

        Args:
            candidate: to refine.
            rounds: at most.
            ends: units.
            again: whether a candidate may be refined more than once, with other directions each time.
        """
        schedule, coefficients = candidate.schedule, candidate.coefficients
        together = bool(schedule.blend) and self.has_adjoints  # all coefficients, by their adjoints
        cost = refinement_cost(self.student, schedule) if together else rounds_cost(self.student, schedule, coefficients)
        rounds = min(rounds, int((ends - self.units) / cost)) if cost else 0
        if rounds < 1:
            return None
        origin = f" from {sorted(map(repr, coefficients.items()))}" if again else ""
        seed = random.Random(f"{self._seed}{origin}").randrange(1 << 31)

        def measure() -> Any:
            if together:
                refined, score = refine_all(self.student, schedule, coefficients, seed)
            else:
                refined, score = refine(self.student, schedule, coefficients, rounds, self.progress.tick)
            self.progress.tick()
            return [score, coefficients_to_data(refined)]

        score, terms = self._get(f"refine {rounds} {schedule_key(schedule)}{origin}", measure, self.student)
        return Candidate(schedule, coefficients_from_data(terms), score)

    def refit(self, candidate: Candidate) -> tuple[float, Coefficients, float]:
        """A Gauss-Newton step on the held-out noise: its score there, the coefficients, and their score where they come from.

        The step is as long as the share of the held-out images: the others have had theirs, and both have about the same
        second derivatives, so that this is the step for all images together.
        """
        schedule, coefficients = candidate.schedule, candidate.coefficients

        def measure() -> Any:
            refined, score = refine(self.judge, schedule, coefficients, 1, self.progress.tick, length=self.held_share)
            return [score, coefficients_to_data(refined)]

        key = f"{schedule_key(schedule)} {sorted(map(repr, coefficients.items()))}"
        score, terms = self._get(f"refit {key}", measure, self.judge)
        refitted = coefficients_from_data(terms)

        def check() -> float:
            return self.student.score(self.student.rollout(schedule, refitted))

        return score, refitted, self._get(f"check refit {key}", check, self.student)

    def judged(self, candidate: Candidate) -> tuple[float, float]:
        """Score and relative error on held-out noise."""

        def roll() -> Any:
            rolled = self.judge.rollout(candidate.schedule, candidate.coefficients)
            return [self.judge.score(rolled), self.judge.relative_error(rolled)]

        key = f"judge {schedule_key(candidate.schedule)} {sorted(map(repr, candidate.coefficients.items()))}"
        decibels, error = self._get(key, roll, self.judge)
        return decibels, error

    def point(self, candidate: Candidate, started: float) -> ParetoPoint:
        """The candidate as a plan, judged on held-out noise.

        Args:
            candidate: to judge.
            started: units when its learning began.
        """
        decibels, error = self.judged(candidate)
        mask = self.student.mask(candidate.schedule, candidate.coefficients)
        ratio = 1 / self.student.spent(candidate.schedule)
        return ParetoPoint(mask, ratio, error, decibels, candidate.schedule.description, self.units - started)
