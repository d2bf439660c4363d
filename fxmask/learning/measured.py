"""Everything that learning measures, by way of the journal: what was measured once is not measured again."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from fxmask.learning.adjoint import acts_by_element, refine_all, refinement_cost
from fxmask.learning.candidate import Candidate, ParetoPoint
from fxmask.learning.journal import Journal
from fxmask.learning.levels import Level
from fxmask.learning.probes import Probes, has_derivatives, measure_probes
from fxmask.learning.progress import Progress
from fxmask.learning.recorded_plans import Fits, RecordedPlans, plans_from_data, plans_to_data
from fxmask.learning.refine import refine
from fxmask.learning.refine import refinement_cost as rounds_cost
from fxmask.learning.runs import measure_runs
from fxmask.learning.schedule import Coefficients, Schedule, Terms, coefficients_from_data, coefficients_to_data, schedule_key
from fxmask.learning.student import Student
from fxmask.sampling.sampler import ChangesSteps

WORSE = 0.5  # dB: more than that, coefficients of two folds do not go together


class Measured:
    """Measurements of one run of learning.

    Args:
        student: on the noise that is learned from.
        judge: on held-out noise.
        journal: keeps the results.
        progress: is told of every rollout.
        starts: first steps at which runs are measured.
        seed: of random directions.
        adjoints: whether there is room for backward passes through whole runs.
        view: of the runs, which tells what is measured on them from what is on others; part of every key.
    """

    def __init__(
        self,
        student: Student,
        judge: Student,
        journal: Journal,
        progress: Progress,
        *,
        starts: int,
        seed: int,
        adjoints: bool = True,
        view: str = "",
    ) -> None:
        self._view = view
        self.student = student
        self.judge = judge
        self.progress = progress
        self._journal = journal
        self._starts = starts
        self._seed = seed
        self._adjoints = adjoints
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
        share = self.judge.images / self.student.images if student is self.judge else 1.0
        return self.student.group.agree(self._journal.get(self._view + key, measure, student, share))

    def latency(self, backend: str, measure: Callable[[], Any]) -> Any:
        """Seconds of every node."""
        return self._get(f"latency {backend}", measure, self.student)

    def instant_plans(self, budget: float, share: float, count: int, recorded: RecordedPlans) -> list[tuple[Schedule, Fits]]:
        """Plans of recorded runs alone, see ``RecordedPlans.of_budget``."""

        def make() -> Any:
            return plans_to_data(recorded.of_budget(budget, share, count))

        return plans_from_data(self._get(f"instant {count} {budget!r} {share!r}", make, self.student))

    def evaluate(self, schedule: Schedule, fits: Fits | None = None) -> Candidate:
        """The schedule, with coefficients fitted along the student's run where ``fits`` has none."""
        given = self.student.readable(schedule, fits.learned) if fits else {}

        def roll() -> Any:
            rolled = self.student.rollout(schedule, given)
            return [self.student.score(rolled), coefficients_to_data(rolled.coefficients)]

        score, terms = self._get(f"roll {schedule_key(schedule)}{_listed(given)}", roll, self.student)
        self.progress.tick()
        return Candidate(schedule, coefficients_from_data(terms), score, fits)

    def runs(self, level: Level) -> torch.Tensor:
        """Errors of runs of a level, see ``measure_runs``."""

        def measure() -> Any:
            return measure_runs(self.student, level, self._starts, self.progress.tick).tolist()

        # with an injected noise all forecasts of the output read samples, which the key has never said
        samples = "" if self.student.stochastic or not level.samples else f" {level.samples}"
        lanes = f" {level.lanes}" if level.lanes else ""
        key = f"runs {level.name} {level.history}{samples}{lanes}"
        return torch.tensor(self._get(key, measure, self.student), dtype=torch.float64)

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
        """Whether all coefficients can be refined at once.

        A deterministic sampler has them only where there is work for them.
        """
        wanted = self._adjoints and (self.student.stochastic or bool(self._starts))
        return wanted and all(acts_by_element(t) for t in self.student.trajectories) and self.differentiable

    def refine(self, candidate: Candidate, rounds: int, ends: float, *, again: bool, crossed: bool = False) -> Candidate | None:
        """The candidate with its coefficients refined, by fewer rounds or not at all where units would pass ``ends``.

        Args:
            candidate: to refine.
            rounds: at most.
            ends: units.
            again: whether a candidate may be refined more than once, with other directions each time.
            crossed: whether units must be left for the same on the held-out images, see ``crossed``.
        """
        schedule, coefficients = candidate.schedule, candidate.coefficients
        together = self.has_adjoints and (bool(schedule.blend) or not candidate.is_refinable)  # all of them, by adjoints
        cost = refinement_cost(self.student, schedule) if together else rounds_cost(self.student, schedule, coefficients)
        cost *= 1 + crossed * self.judge.images / self.student.images
        rounds = min(rounds, int((ends - self.units) / cost)) if cost else 0
        if rounds < 1:
            return None
        origin = f" from {sorted(map(repr, coefficients.items()))}" if again or candidate.fits else ""
        seed = random.Random(f"{self._seed}{origin}").randrange(1 << 31)

        def measure() -> Any:
            if together:
                refined, score = refine_all(self.student, schedule, coefficients, seed)
            else:
                refined, score = refine(self.student, schedule, coefficients, rounds, self.progress.tick)
            self.progress.tick()
            return [score, coefficients_to_data(refined)]

        score, terms = self._get(f"refine {rounds} {schedule_key(schedule)}{origin}", measure, self.student)
        return replace(candidate, coefficients=coefficients_from_data(terms), score=score, rounds=candidate.rounds + rounds)

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
        decibels, error, _ = self._judged(candidate)
        return decibels, error

    def judged_images(self, candidate: Candidate) -> list[float]:
        """Error of every held-out image, in dB."""
        return list(self._judged(candidate)[2])

    def _judged(self, candidate: Candidate) -> tuple[float, float, list[float]]:
        def roll() -> Any:
            rolled = self.judge.rollout(candidate.schedule, candidate.coefficients)
            return [self.judge.score(rolled), self.judge.relative_error(rolled), self.judge.decibels(rolled).tolist()]

        key = f"judge images {schedule_key(candidate.schedule)} {sorted(map(repr, candidate.coefficients.items()))}"
        decibels, error, images = self._get(key, roll, self.judge)
        return decibels, error, images

    def on_fresh_noise(self, candidate: Candidate, batch: int, student_of: Callable[[int], Student]) -> list[float]:
        """Error in dB of every image of a batch of fresh noise, see ``FreshNoise``."""

        def roll() -> Any:
            fresh = student_of(batch)
            images = fresh.decibels(fresh.rollout(candidate.schedule, candidate.coefficients)).tolist()
            self.student.units += fresh.units * fresh.images / self.student.images
            fresh.units = 0.0
            self.progress.tick()
            return images

        key = f"fresh {batch} {schedule_key(candidate.schedule)}{_listed(candidate.coefficients)}"
        return list(self._get(key, roll, self.student))

    def crossed(self, candidate: Candidate) -> tuple[list[float], Coefficients]:
        """Cross-validation of two folds: the images that were learned from, and those that were held out.

        Returns:
            The error of every image in dB, with coefficients from the other fold; and those that the held-out images give.
        """
        schedule, rounds = candidate.schedule, candidate.rounds
        given = self.judge.readable(schedule, candidate.fits.held_out) if candidate.fits else {}
        key = f"{rounds} {schedule_key(schedule)}{_listed(given)}"

        def fit() -> Any:
            terms = self.judge.rollout(schedule, given).coefficients
            if rounds:
                terms, _ = refine(self.judge, schedule, terms, rounds, self.progress.tick)
            return coefficients_to_data(terms)

        other: Coefficients = given
        if rounds or len(given) < sum(map(len, schedule.loads)):
            other = coefficients_from_data(self._get(f"fit on held-out images {key}", fit, self.judge))

        def roll() -> Any:
            return self.student.decibels(self.student.rollout(schedule, other)).tolist()

        images = self._get(f"judge on learned images {schedule_key(schedule)}{_listed(other)}", roll, self.student)
        return [*images, *self.judged_images(candidate)], other

    def of_both_folds(self, candidate: Candidate, other: Coefficients, bound: float) -> Coefficients:
        """The coefficients of a candidate for all images: the mean of what both folds gave, or its own.

        Args:
            candidate: judged by ``crossed``.
            other: what that returned.
            bound: its mean error in dB; the mean coefficients, which have seen all images, must not be worse.
        """
        share = self.held_share
        mean: dict[tuple[int, str], Terms] = {
            key: tuple((s, (1 - share) * c + share * d) for (s, c), (_, d) in zip(terms, other[key], strict=True))
            for key, terms in candidate.coefficients.items()
        }
        if candidate.is_instant and candidate.fits:
            mean.update(self.student.readable(candidate.schedule, candidate.fits.everything))

        def roll(student: Student) -> float:
            return student.score(student.rollout(candidate.schedule, mean))

        key = f"{schedule_key(candidate.schedule)}{_listed(mean)}"
        scores = [self._get(f"{name} {key}", functools.partial(roll, s), s) for name, s in self._students()]
        return mean if self.of_all(*scores) <= bound + WORSE else candidate.coefficients

    def _students(self) -> list[tuple[str, Student]]:
        return [("score of learned images", self.student), ("score of held-out images", self.judge)]

    def fewer_steps(self, steps: int, everywhere: bool) -> float | None:
        """Score of so many steps of the scheduler's own grid from the same noise; ``None`` where runs cannot take them.

        Args:
            steps: how many.
            everywhere: on all images, rather than the held-out ones.
        """
        students = self._students() if everywhere else self._students()[1:]
        changing = [[t for t in s.trajectories if isinstance(t, ChangesSteps) and t.can_change_steps] for _, s in students]
        if any(len(found) < len(s.trajectories) for found, (_, s) in zip(changing, students, strict=True)):
            return None

        def sample(student: Student, runs: Sequence[ChangesSteps]) -> float:
            return student.score_of([run.with_steps(student.program.model, steps) for run in runs])

        scores = [
            self._get(f"{steps} steps, {name}", functools.partial(sample, s, runs), s)
            for runs, (name, s) in zip(changing, students, strict=True)
        ]
        return self.of_all(*scores) if everywhere else scores[0]

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


def _listed(coefficients: Coefficients) -> str:
    """Coefficients as the end of a key."""
    return f" {sorted(map(repr, coefficients.items()))}" if coefficients else ""
