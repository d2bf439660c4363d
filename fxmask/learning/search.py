"""Learning which block runs at which step: plans of every kind are made, refined, and judged on real rollouts.

    1. every level (whole output, stages, all branches) at equal distances: fixed reuse and fixed forecasts are points here,
       and so is "fewer steps", which is the whole output held
    2. for the best levels, errors of runs are measured and full steps placed by dynamic programming; the branches also get
       a mask each
    3. local search: neighbours of the best schedules, each judged on a rollout
    4. coefficients are refined against the final samples (``refine``; with a stochastic sampler there are more of them, for
       ``adjoint.refine_all``)
    5. the best few are compared on noise that none of this has seen; that decides, and a last step of refinement uses it

Plans of recorded runs alone (``instant``) are candidates beside them, refined and not. Of few images, half are held out, and
both halves judge what the other one gave; more is fitted only where that is better by more than the standard error.

The work is counted in full sampling runs of the recorded trajectories (``effort``). Every measurement goes through a
journal, so that an interrupted run resumes where it was and several outcomes (``pareto``) share what is measured.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch

from fxmask.errors import FxmaskError, InputError, OutcomeError
from fxmask.ir.fingerprint import fingerprint_1
from fxmask.ir.program import Program
from fxmask.learning.adjoint import acts_by_element
from fxmask.learning.candidate import Candidate, ParetoPoint
from fxmask.learning.choice import FEW, choose, is_ahead
from fxmask.learning.constraints import is_met, keeps_limits, trimmed
from fxmask.learning.effort import EFFORTS, Effort, Limits
from fxmask.learning.finalists import best_of_families, refine_finalists, refit_on_held_out
from fxmask.learning.forms import Forms
from fxmask.learning.fresh_noise import FreshNoise
from fxmask.learning.identity import identity_of
from fxmask.learning.journal import Journal
from fxmask.learning.lanes import own_rows
from fxmask.learning.levels import BENDS, Level, evenly, levels_of
from fxmask.learning.local_search import neighbour
from fxmask.learning.measured import Measured
from fxmask.learning.outcome import TOLERANCE
from fxmask.learning.own_rows import OwnRows
from fxmask.learning.pieces import Place, split
from fxmask.learning.place import place, place_mixed
from fxmask.learning.place_blocks import place_blocks
from fxmask.learning.prices import measure_latency, per_step
from fxmask.learning.progress import Progress
from fxmask.learning.ranks import Group
from fxmask.learning.recorded_plans import Fits, RecordedPlans
from fxmask.learning.room import Room
from fxmask.learning.schedule import Coefficients, Origin, Schedule
from fxmask.learning.student import Student, output_blocks
from fxmask.sampling.same_sampler import describe_difference
from fxmask.sampling.sampler import Sampler

logger = logging.getLogger(__name__)

HOPELESS = 8.0  # dB behind the best: not tried any further
MIXED = 3  # levels that one schedule may have
PERIODS = (0, 6, 4, 3, 2)  # at which masks of single blocks compute everything; 0: never
CHEAP = 0.1  # of a step: levels that cost less may take turns at equal cost
FAILURES = 60  # of local search in a row, after which it ends
GAIN = 0.02  # dB: local search goes on from a neighbour that is better by this much
NOTICED = 0.1  # dB: by so much fewer steps must be better to be mentioned
JUDGING = 6.0  # units that are kept for judging few images by turns
BISECTIONS = 6  # of the budget for an error

Pool = list[Candidate]


class Search:
    """One run of learning, for one or several budgets.

    Args:
        program: the captured denoiser.
        trajectories: all of them; with several ranks, each works on its share.
        effort: how much work.
        limits: bounds on the plan.
        seed: of local search and of fresh noise.
        progress: show a progress bar.
        checkpoint: file of the journal.
        cost: what budgets are fractions of, ``"macs"`` or ``"latency"``.
        backend: what latencies are measured with.
        room: how many bytes learning may take; without bound, if not given.
        deployed: the program that will run, if that is another one than is learned from.
        lanes: ``"own"``: plans in which the lanes of guidance have rows of their own are among the candidates; ``"alike"``:
            they are not.

    Raises:
        InputError: the trajectories do not belong together, or are too few for the ranks.
    """

    def __init__(
        self,
        program: Program,
        trajectories: Sequence[Sampler],
        *,
        effort: Effort,
        limits: Limits,
        seed: int,
        progress: bool,
        checkpoint: str | Path | None = None,
        cost: str = "macs",
        backend: str = "auto",
        room: Room | None = None,
        deployed: Program | None = None,
        lanes: str = "own",
    ) -> None:
        _check_together(trajectories)
        group = Group.current()
        forms = Forms(program, trajectories)
        for n, trajectory in enumerate(trajectories):
            forms.of_run(trajectory, n)
        self.few = sum(t.batch_size for t in trajectories) < FEW
        learned, held_out = _shares(program, trajectories, group, seed, self.few)
        self.recorded = RecordedPlans(program, learned, held_out)
        held_whole = list(held_out)
        training, judges = group.share(learned), group if len(held_out) >= group.size else None
        held_out = group.share(held_out) if judges else held_out
        self.effort = effort
        self.limits = limits
        self.seed = seed
        self.stochastic = any(t.stochastic for t in trajectories)
        room = room or Room()
        adjoints = self.stochastic and all(acts_by_element(t) for t in trajectories)
        training, places, adjoints = _split(training, forms, room, group, gradients=bool(effort.starts), adjoints=adjoints)
        held_out, held_places = split(held_out, forms, room, gradients=False, adjoints=False)
        student = Student(program, training, group, forms, room, deployed, places)
        judge = Student(program, held_out, judges, forms, room, deployed, held_places)
        self.progress = Progress(progress)
        self.crossed = self.few and not self.stochastic
        options = seed, limits, effort, 2 if self.stochastic else 0, cost
        identity = identity_of(program, trajectories, (*options, backend)) if checkpoint is not None and group.rank == 0 else ""
        old_identity = group.agree(_identity_1(student, *options))
        journal = Journal(checkpoint, group.agree(identity), group, old_identity)
        backwards = adjoints or not self.stochastic
        self.measured = Measured(student, judge, journal, self.progress, starts=effort.starts, seed=seed, adjoints=backwards)
        self.student, self.judge = student, judge
        self.apart: OwnRows | None = None
        if lanes == "own" and effort.lanes and cost == "macs" and group.size == 1:  # seconds are of calls that hold all lanes
            given = limits, seed, deployed, room, effort.starts, backwards
            self.apart = own_rows(program, learned, held_whole, journal, self.progress, *given)
        self._fresh: FreshNoise | None = None
        if (self.stochastic or self.apart is not None) and effort.fresh and group.size == 1:
            self._fresh = FreshNoise(program, learned, self.measured, forms, room, deployed, seed, self.apart)
        if cost == "latency":
            seconds = self.measured.latency(backend, lambda: measure_latency(student.deployed, backend))
            student.price_by(per_step(student.deployed, seconds))
        self.branches = self.measured.branches
        self.levels = levels_of(student, 2)
        if effort.kinds:
            names = list(dict.fromkeys(level.name for level in self.levels))[: effort.kinds]
            self.levels = [level for level in self.levels if level.name in names]
        self._promising = self.levels
        self._known: dict[frozenset[str], tuple[Level, torch.Tensor]] = {}  # levels whose runs were measured

    # One budget

    def best(self, budget: float) -> ParetoPoint:
        """The best plan for a fraction of the full run's MACs.

        Raises:
            OutcomeError: no plan comes within 3 % of it; says what is the least.
        """
        self._check_reachable(budget)
        measured = self.measured
        started = measured.units
        pool: Pool = []
        with self.progress.bar(f"learning {1 / budget:.3g}x", self.effort.units, lambda: measured.units):
            try:
                self._propose(pool, budget)
                self._search(pool, budget)
                finalists = refine_finalists(
                    measured,
                    self._finalists(pool),
                    self.limits,
                    rounds=self.effort.rounds,
                    ends=started + self.effort.units - (JUDGING if self.few else 0.0),
                    stochastic=self.stochastic,
                    crossed=self.crossed,
                )
            except KeyboardInterrupt:
                if not pool:
                    raise
                logger.warning("learning was interrupted; using the best of %d plans so far", len(pool))
                return measured.point(min(pool, key=lambda c: c.score), started)
        if not finalists:
            raise OutcomeError(
                f"macs={budget:.4g} (speedup={1 / budget:.4g}) cannot be met within {TOLERANCE:.0%} under {self.limits}; "
                "allow more graphs or more cache, or take more steps"
            )
        best, chosen = self._best_of_few(finalists, started) if self.few else self._best_of_many(finalists, started)
        chosen = replace(chosen, fewer_steps=self._compare_with_fewer_steps(chosen, budget))
        apart = self._best_of_lanes(budget, finalists, best)
        if apart is not None:
            return replace(apart, fewer_steps=chosen.fewer_steps, units=measured.units + apart.units - started)
        try:
            if self.effort.rounds >= 2 and not self.few:
                refitted = refit_on_held_out(measured, best, chosen.decibels)
                chosen = replace(chosen, mask=self.student.mask(best.schedule, refitted))
        except KeyboardInterrupt:
            logger.warning("learning was interrupted before its last step of refinement")
        return replace(chosen, units=measured.units - started)

    def _best_of_lanes(self, budget: float, finalists: Sequence[Candidate], best: Candidate) -> ParetoPoint | None:
        """The best plan whose lanes have rows of their own, starting from the finalists without.

        ``None`` if there is none that is better than the best of these on fresh noise, or on held-out images by more than the
        standard error. Of few images, every one judges coefficients that it had no part in.
        """
        if self.apart is None:
            return None
        units, searched = self.effort.lanes, self.apart.measured
        begun = searched.units
        with self.progress.bar(f"lanes apart, {1 / budget:.3g}x", units, lambda: searched.units - begun):
            try:
                known = list(self._known.values())
                candidate = self.apart.best(budget, finalists, self.effort, units, crossed=self.crossed, known=known)
                if candidate is None:
                    return None
                if not self.crossed:
                    return searched.point(candidate, begun) if self._is_better_on_noise(candidate, best) else None
                images, other = searched.crossed(candidate)
                if not is_ahead(images, self.measured.crossed(best)[0]):
                    return None
                return _of_both_folds(searched, candidate, images, other, begun)
            except KeyboardInterrupt:
                logger.warning("learning was interrupted; plans whose lanes differ are left out")
                return None
            except InputError as error:  # no room for a whole batch: its pieces are not taken apart
                logger.info("plans whose lanes differ are left out: %s", error)
                return None

    def _is_better_on_noise(self, apart: Candidate, best: Candidate) -> bool:
        """Whether a plan with rows for each lane is better than the best one without."""
        assert self.apart is not None
        found = self._best_on_fresh_noise([best, apart])
        if found is not None:
            return found is apart
        return is_ahead(self.apart.measured.judged_images(apart), self.measured.judged_images(best))

    def _best_on_fresh_noise(self, candidates: Sequence[Candidate]) -> Candidate | None:
        """The best candidate; ``None`` if they are not judged there."""
        if self._fresh is None:
            return None
        try:
            return self._fresh.best(candidates, self.effort.fresh)
        except (FxmaskError, RuntimeError) as error:  # no room, say; all that was learned must not be lost for it
            logger.warning("plans are not judged on fresh noise: %s", error)
            return None

    def _best_of_many(self, finalists: Sequence[Candidate], started: float) -> tuple[Candidate, ParetoPoint]:
        """All images count: which images are hard differs more between batches than plans of nearly equal quality do.

        With noise injected they differ so much that the images plans were fitted on say little of others: fresh ones judge.
        """
        judged = sorted(finalists, key=lambda c: self.measured.of_all(c.score, self.measured.judged(c)[0]))
        best = judged[0]
        if self.stochastic:
            try:
                best = self._best_on_fresh_noise(judged) or best
            except KeyboardInterrupt:
                logger.warning("learning was interrupted before plans were judged on fresh noise")
        return best, self.measured.point(best, started)

    def _best_of_few(self, finalists: Sequence[Candidate], started: float) -> tuple[Candidate, ParetoPoint]:
        """Every image judges coefficients that it had no part in; in doubt, what least was fitted for is taken.

        With a stochastic sampler, whose refinement asks the held-out images when to stop, these alone judge.
        """
        measured = self.measured
        first = next((c for c in finalists if c.is_instant), None)
        fitted = [0 if c is first else 1 if c.is_instant else 2 if not c.rounds else 3 for c in finalists]
        if not self.crossed:
            best = finalists[choose([measured.judged_images(c) for c in finalists], fitted)]
            return best, measured.point(best, started)
        crossed = [measured.crossed(c) for c in finalists]
        number = choose([images for images, _ in crossed], fitted)
        best = finalists[number]
        return best, _of_both_folds(measured, best, *crossed[number], started)

    def _finalists(self, pool: Pool) -> list[Candidate]:
        """The best candidates of all, those of less effort, and the two best instant plans: as chosen, and on rollouts."""
        quick = list(dict.fromkeys(level.name for level in self.levels))[: EFFORTS["quick"].kinds]
        plain = [c for c in pool if c.schedule.origin in (Origin.EVEN, Origin.BENT) and c.schedule.family in quick]
        instant = [c for c in pool if c.is_instant]
        chosen = [
            *instant[:1],
            *sorted(instant, key=lambda c: c.score)[:1],
            *best_of_families(plain, 1),
            *best_of_families(pool, self.effort.finalists),
        ]
        return [c for n, c in enumerate(chosen) if c not in chosen[:n]]

    def _check_reachable(self, budget: float) -> None:
        least = min((self.student.cost(level.loads) for level in self.levels), default=1.0)
        steps = self.student.num_steps
        least = (1 + (steps - 1) * least) / steps
        if not self.levels or (budget < least / (1 + TOLERANCE)):
            raise OutcomeError(
                f"speedup={1 / budget:.4g} (macs={budget:.4g}) is out of reach: when only the first of {steps} steps computes "
                f"everything, speedup={1 / least:.4g} (macs={least:.4g}) is the most. Ask for less, or take more steps"
            )

    # Schedules to try; what comes later depends on how the earlier ones did

    def _propose(self, pool: Pool, budget: float) -> None:
        """Fill the pool: instant plans, even schedules, then bent and placed ones of the best levels."""
        self._propose_instant(pool, budget)
        instant = len(pool)
        self._add_all(pool, (evenly(self.student, level, budget) for level in self._promising), budget)
        ranked = sorted(pool[instant:], key=lambda c: c.score)
        if not ranked:
            return
        level = self._level_of(ranked[0])
        self._add_all(pool, (evenly(self.student, level, budget, bend) for bend in BENDS), budget)
        if self.effort.starts:
            self._propose_placed(pool, ranked, budget)

    def _propose_instant(self, pool: Pool, budget: float) -> None:
        """Plans of recorded runs alone, the one first that an instant plan would be."""
        outputs = frozenset(block.name for block in output_blocks(self.student.program))
        share = self.student.cost(outputs) if outputs else 1.0
        if share < 1 and self.effort.instant:
            for schedule, fits in self.measured.instant_plans(budget, share, self.effort.instant, self.recorded):
                self._add(pool, schedule, budget, fits)

    def _propose_placed(self, pool: Pool, ranked: Sequence[Candidate], budget: float) -> None:
        """Full steps where the measured runs of the best levels say. ``ranked`` are the even schedules, the best first."""
        near = [c.schedule.family for c in ranked if c.score < ranked[0].score + HOPELESS]
        if self._promising is self.levels:  # what is hopeless at one budget is not tried at the others
            self._promising = [x for x in self.levels if x.name in near]
        names = list(dict.fromkeys(c.schedule.family for c in ranked))[: self.effort.levels]
        if self.stochastic:  # levels of different cost may be mixed
            names = list(dict.fromkeys([*names, *near]))[:MIXED]
        known: list[tuple[Level, torch.Tensor]] = []
        for name in names:
            level = self._level_of(next(c for c in ranked if c.schedule.family == name))
            runs = self.measured.runs(level)
            known.append((level, runs))
            self._known.setdefault(level.loads, known[-1])
            self._add(pool, place(self.student, [(level, runs)], budget), budget)
            if name == "branches" and self.measured.differentiable:
                probes = self.measured.probes
                for period in PERIODS:
                    self._add(pool, place_blocks(self.student, probes, self.branches, runs, budget, period), budget)
        if len(known) > 1 and max(self.student.cost(level.loads) for level, _ in known) < CHEAP:
            self._add(pool, place(self.student, known, budget), budget)
        for chosen in (known, known[:2]) if self.stochastic and len(known) > 1 else ():
            self._add(pool, place_mixed(self.student, chosen, budget), budget)

    def _level_of(self, candidate: Candidate) -> Level:
        """The level of an even schedule."""
        schedule = candidate.schedule
        form = schedule.family, schedule.history, schedule.samples
        return next(x for x in self.levels if (x.name, x.history, x.samples) == form)

    def _add_all(self, pool: Pool, schedules: Iterable[Schedule | None], budget: float) -> None:
        for schedule in schedules:
            self._add(pool, schedule, budget)

    def _add(self, pool: Pool, schedule: Schedule | None, budget: float, fits: Fits | None = None) -> Candidate | None:
        """Evaluate a schedule, brought to the budget, and add it to the pool, if it keeps the limits."""
        if schedule is None:
            return None
        schedule = trimmed(self.student, self.branches, schedule, budget)
        if schedule is None or any(c.schedule == schedule and c.fits == fits for c in pool):
            return None
        if not keeps_limits(self.student, self.limits, schedule):
            return None
        candidate = self.measured.evaluate(schedule, fits)
        pool.append(candidate)
        best = min(pool, key=lambda c: c.score)
        self.progress.show(
            best=f"{best.score:.1f} dB",
            ratio=f"{1 / self.student.spent(best.schedule):.2f}x",
            of=best.schedule.description,
        )
        return candidate

    def _search(self, pool: Pool, budget: float) -> None:
        """Local search from the two best schedules of different kinds."""
        rng = random.Random(self.seed)
        starts = best_of_families(pool, self.effort.finalists)[:2]
        for start in starts:
            current, began, failures = start, self.measured.units, 0
            search = self.effort.search / (2 if self.stochastic else 1)  # refinement gains more there
            while self.measured.units - began < search / len(starts) and failures < FAILURES:
                schedule = neighbour(current.schedule, rng)
                if schedule is None or not is_met(budget, self.student.spent(schedule)):
                    failures += 1
                    continue
                found = self._add(pool, schedule, budget)
                failures += 1
                if found is not None and found.score < current.score - GAIN:
                    current, failures = found, 0

    def _compare_with_fewer_steps(self, point: ParetoPoint, budget: float) -> float | None:
        """The score of the scheduler's own grid with fewer steps, which no mask can express, on the images that judge plans.

        Warns if it is better. ``None`` if it is not known.
        """
        if self.stochastic:
            return None
        steps = max(1, round(budget * self.student.num_steps))
        score = self.measured.fewer_steps(steps, everywhere=self.crossed)
        if score is not None and score < point.decibels - NOTICED:
            logger.warning(
                "%d steps of the scheduler's own grid are %.1f dB better than the best plan at the same MACs; set "
                "num_inference_steps=%d and ask for a smaller speed-up from there",
                steps,
                point.decibels - score,
                steps,
            )
        return score

    def meet_error(self, max_error: float) -> ParetoPoint:
        """The cheapest plan whose error on held-out noise is at most ``max_error``, by bisection of the budget.

        If there is none, the one that computes everything, with a warning.
        """
        steps = self.student.num_steps
        low, high = 1.5 / steps, 1.0
        found: ParetoPoint | None = None
        nearest = float("inf")
        total = BISECTIONS * self.effort.units
        with self.progress.bar(f"learning for an error of {max_error:g}", total, lambda: self.measured.units):
            for _ in range(BISECTIONS):
                middle = (low + high) / 2
                try:
                    point = self.best(middle)
                except OutcomeError:
                    low = middle
                    continue
                nearest = min(nearest, point.error)
                if point.error <= max_error:
                    found, high = point, middle
                    if point.error > max_error * (1 - TOLERANCE):
                        break
                else:
                    low = middle
        if found is None:
            everything = Schedule((frozenset(),) * steps, origin=Origin.EVERYTHING)
            logger.warning("no plan that saves anything keeps max_error=%g; the best had %.3g", max_error, nearest)
            mask = self.student.mask(everything, {})
            return ParetoPoint(mask, 1.0, 0.0, -300.0, everything.description, self.measured.units)
        return found


def _of_both_folds(
    measured: Measured, candidate: Candidate, images: Sequence[float], other: Coefficients, started: float
) -> ParetoPoint:
    """A candidate as a plan with coefficients of all images, judged by those that each image had no part in.

    Args:
        measured: measures.
        candidate: with coefficients of one fold.
        images: errors in dB, see ``Measured.crossed``.
        other: coefficients of the other fold.
        started: units when its learning began.
    """
    decibels, error = fmean(images), math.sqrt(fmean(10 ** (x / 10) for x in images))
    coefficients = measured.of_both_folds(candidate, other, decibels)
    mask = measured.student.mask(candidate.schedule, coefficients)
    ratio = 1 / measured.student.spent(candidate.schedule)
    return ParetoPoint(mask, ratio, error, decibels, candidate.schedule.description, measured.units - started)


def _check_together(trajectories: Sequence[Sampler]) -> None:
    """Refuse runs of different samplers.

    Raises:
        InputError: says which differ, and in what.
    """
    first = trajectories[0]
    for n, other in enumerate(trajectories):
        if other.num_steps != first.num_steps:
            raise InputError(
                f"recorded run {n} has {other.num_steps} steps, run 0 has {first.num_steps}; record all of them with one "
                "scheduler and num_inference_steps"
            )
        if other.timesteps != first.timesteps or other.order != first.order:
            raise InputError(
                f"recorded runs 0 and {n} have different timesteps or numbers of calls per step; record all of them with one "
                "scheduler and one set of pipeline arguments"
            )
        difference = describe_difference(first, other) if n else None
        if difference is not None:
            raise InputError(
                f"recorded runs 0 and {n} come from different samplers ({difference}); record all of them with one scheduler"
            )


def _shares(
    program: Program, trajectories: Sequence[Sampler], group: Group, seed: int, few: bool
) -> tuple[list[Sampler], list[Sampler]]:
    """The trajectories to learn from, and those that are held out, of all ranks.

    Of four or more the last quarter is held out, of two or three the last, of few images half of them, if that leaves something
    for every rank; for one alone, fresh noise is recorded.
    """
    count = len(trajectories)
    held = count // 4 if count >= 4 else (1 if count > 1 else 0)
    if group.size > max(1, count - held):
        raise InputError(f"{group.size} ranks need at least as many trajectories to learn from, got {count - held}")
    if few:
        held = max(held, min(count // 2, count - group.size))
    if not held:
        return list(trajectories), [t.renoised(program.model, 7919 * (seed + 1) + n) for n, t in enumerate(trajectories)]
    return list(trajectories[: count - held]), list(trajectories[count - held :])


def _split(
    runs: Sequence[Sampler], forms: Forms, room: Room, group: Group, *, gradients: bool, adjoints: bool
) -> tuple[list[Sampler], list[Place], bool]:
    """The runs in pieces that there is room for, and whether backward passes through whole runs have some too, on all ranks.

    Raises:
        InputError: there is no room for one sample without them.
    """
    if adjoints:
        try:
            pieces, places = split(runs, forms, room, gradients=True, adjoints=True)
            lacking = ""
        except InputError as error:
            lacking = str(error)
        if not group.sum([torch.tensor(float(bool(lacking)))]).item():
            return pieces, places, True
        logger.info("with this sampler coefficients are not refined by passes backwards through the run: %s", lacking)
    return (*split(runs, forms, room, gradients=gradients, adjoints=False), False)


def _identity_1(student: Student, seed: int, limits: Limits, effort: Effort, samples: int, cost: str) -> str:
    """What a checkpoint of the first version belongs to."""
    first = student.trajectories[0]
    program = student.program
    parts = (
        fingerprint_1(program.graph_module, program.blocks),
        first.timesteps,
        float(first.final.double().sum()),
        seed,
        limits,
    )
    return repr((*parts, effort, samples)) + ("" if cost == "macs" else cost)
