"""Learning which block runs at which step: plans of every kind are made, refined, and judged on real rollouts.

The seam: ``learn(program, calls, outcome) -> Mask``. Nothing outside this module knows how a mask was chosen.

    1. every level (whole output, stages, all branches) at equal distances: fixed reuse and fixed forecasts are points here,
       and so is "fewer steps", which is the whole output held
    2. for the best levels, errors of runs are measured and full steps placed by dynamic programming; the branches also get
       a mask each (``candidates``)
    3. local search: neighbours of the best schedules, each judged on a rollout
    4. coefficients are refined against the final samples (``Student.refine``; with a stochastic sampler there are more of
       them, for ``adjoint.refine_all``)
    5. the best few are compared on noise that none of this has seen; that decides, and a last step of refinement uses it

The work is counted in full sampling runs of the recorded trajectories (``effort``). Every measurement goes through a
journal, so that an interrupted run resumes where it was and several outcomes (``pareto``) share what is measured.
"""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from fxmask.adjoint import acts_by_element, refine_all, refinement_cost
from fxmask.candidates import (
    BENDS,
    Level,
    Probes,
    evenly,
    has_derivatives,
    levels_of,
    measure_probes,
    measure_runs,
    place,
    place_blocks,
    place_mixed,
)
from fxmask.distributed import Group
from fxmask.errors import InputError, OutcomeError
from fxmask.journal import Journal
from fxmask.latency import measure_latency, per_step
from fxmask.mask import Mask, clean_source
from fxmask.outcome import TOLERANCE, Outcome
from fxmask.paper import PaperOptions, learn_paper
from fxmask.passes.rectify import rectify
from fxmask.program import Program
from fxmask.student import Coefficients, Schedule, Student, Terms
from fxmask.trajectory import Trajectory

logger = logging.getLogger(__name__)

LEARNERS = ("default", "paper")
COSTS = ("macs", "latency")
HOPELESS = 8.0  # dB behind the best: not tried any further
MIXED = 3  # levels that one schedule may have
ROUNDS = 5  # of refinement at most for the best plan with a stochastic sampler
ENOUGH = 0.03  # dB: a round that gains less is the last one


@dataclass(frozen=True)
class Effort:
    """How much work a plan may take, in full sampling runs of the recorded trajectories.

    Attributes:
        units: in all, for one outcome; refinement stops there.
        kinds: how many levels are tried at equal distances, 0: all of them.
        starts: first steps at which runs are measured, 0: none.
        levels: for how many levels.
        search: units of local search.
        rounds: of refinement.
        finalists: how many schedules are refined and compared on held-out noise.
    """

    units: float
    kinds: int
    starts: int
    levels: int
    search: float
    rounds: int
    finalists: int


EFFORTS = {
    "default": Effort(units=120.0, kinds=0, starts=8, levels=2, search=15.0, rounds=2, finalists=3),
    "quick": Effort(units=18.0, kinds=3, starts=0, levels=0, search=0.0, rounds=1, finalists=1),
}


@dataclass(frozen=True)
class Candidate:
    """A schedule and how good it is on the trajectories that it was made with.

    Attributes:
        schedule: what each step forms.
        coefficients: how.
        score: mean relative error of the final samples in dB, smaller is better.
    """

    schedule: Schedule
    coefficients: Coefficients
    score: float


@dataclass(frozen=True)
class ParetoPoint:
    """One plan of several that were learned together.

    Attributes:
        mask: the plan's mask.
        mac_ratio: MACs of the full run over its MACs; with ``cost="latency"`` seconds over seconds, as measured by parts.
        error: relative L2 error of the final samples on held-out noise.
        decibels: the same as mean over images, in dB.
        kind: where the schedule came from.
        units: work for this plan, in full sampling runs, what is shared included once.
    """

    mask: Mask
    mac_ratio: float
    error: float
    decibels: float
    kind: str
    units: float


def learn(
    program: Program,
    calls: Trajectory | Sequence[Trajectory],
    speedup: float | None = None,
    macs: float | None = None,
    max_error: float | None = None,
    max_graphs: int | None = None,
    seed: int = 0,
    progress: bool = False,
    *,
    learner: str = "default",
    effort: str = "default",
    max_cache_bytes: int | None = None,
    checkpoint: str | Path | None = None,
    options: PaperOptions | None = None,
    cost: str = "macs",
    backend: str = "inductor",
) -> Mask:
    """Choose the mask, and its forecasts, that meet an outcome with the smallest error of the final samples.

    Args:
        program: the captured denoiser.
        calls: recorded sampling runs. Of several, the last quarter is kept for the final comparison; of one alone, runs
            with fresh noise are recorded for it.
        speedup: ratio of total MACs, e.g. 2.0, which is also the default outcome.
        macs: or the fraction of the full MACs to keep.
        max_error: or the largest relative L2 error of the final samples, on held-out noise. If nothing that saves MACs keeps
            it, the mask computes everything, with a warning.
        max_graphs: at most this many distinct step graphs.
        seed: of everything random. Same seed, same mask.
        progress: show a progress bar. Ctrl-C ends the learning and returns the best plan so far.
        learner: ``"default"``, or ``"paper"`` for the learner of arXiv 2603.19939.
        effort: ``"default"`` (120 full sampling runs of work, and the last step of refinement, at most 25)
            or ``"quick"`` (18).
        max_cache_bytes: bound of ``Plan.peak_cache_bytes``, at the captured batch size.
        checkpoint: a file that keeps what was measured; the same call goes on from it.
        options: of the paper's learner.
        cost: what a speed-up is a ratio of: ``"macs"``, or ``"latency"``, seconds measured on this machine
            (``fxmask.latency``). ``macs=`` is then a fraction of the full run's seconds.
        backend: what latencies are measured with.

    Raises:
        OutcomeError: the outcome is contradictory or out of reach; says what is reachable.
    """
    outcome = Outcome(speedup, macs, max_error)
    _check_choice("learner", learner, LEARNERS)
    _check_choice("effort", effort, tuple(EFFORTS))
    _check_choice("cost", cost, COSTS)
    if max_graphs is not None and max_graphs < 1:
        raise OutcomeError(f"max_graphs={max_graphs} must be at least 1")
    trajectories = _listed(calls)
    if learner == "paper":
        if cost != "macs":
            raise InputError(f"cost={cost!r} is not possible with learner='paper', which counts MACs; use the default learner")
        return learn_paper(program, trajectories[0], outcome, max_graphs, seed, progress, options or PaperOptions())
    limits = Limits(max_graphs, max_cache_bytes)
    search = Search(program, trajectories, EFFORTS[effort], limits, seed, progress, checkpoint, cost, backend)
    if outcome.max_error is not None:
        return search.meet_error(outcome.max_error).mask
    return search.best(outcome.budget).mask


def pareto(
    program: Program,
    calls: Trajectory | Sequence[Trajectory],
    speedups: Iterable[float] = (1.5, 2.0, 3.0),
    max_graphs: int | None = None,
    seed: int = 0,
    progress: bool = False,
    *,
    effort: str = "default",
    max_cache_bytes: int | None = None,
    checkpoint: str | Path | None = None,
    cost: str = "macs",
    backend: str = "inductor",
) -> tuple[ParetoPoint, ...]:
    """Plans for several speed-ups from one run of learning; what is measured is shared. Arguments as for ``learn``.

    ``fxmask.report.draw_pareto(points, axes)`` plots error against MACs.
    """
    _check_choice("effort", effort, tuple(EFFORTS))
    _check_choice("cost", cost, COSTS)
    wanted = [Outcome(speedup=s) for s in speedups]
    limits = Limits(max_graphs, max_cache_bytes)
    search = Search(program, _listed(calls), EFFORTS[effort], limits, seed, progress, checkpoint, cost, backend)
    return tuple(search.best(outcome.budget) for outcome in wanted)


def _check_choice(name: str, given: str, choices: Sequence[str]) -> None:
    if given not in choices:
        raise InputError(f"{name}={given!r} is unknown; choose one of {list(choices)}")


def _listed(calls: Trajectory | Sequence[Trajectory]) -> list[Trajectory]:
    trajectories = [calls] if isinstance(calls, Trajectory) else list(calls)
    if not trajectories:
        raise InputError("learning needs at least one recorded trajectory")
    return trajectories


@dataclass(frozen=True)
class Limits:
    """Bounds on a plan besides its MACs."""

    max_graphs: int | None = None
    max_cache_bytes: int | None = None


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
    """

    def __init__(
        self,
        program: Program,
        trajectories: Sequence[Trajectory],
        effort: Effort,
        limits: Limits,
        seed: int,
        progress: bool,
        checkpoint: str | Path | None = None,
        cost: str = "macs",
        backend: str = "inductor",
    ) -> None:
        group = Group.current()
        held = len(trajectories) // 4 if len(trajectories) >= 4 else (1 if len(trajectories) > 1 else 0)
        training, fresh = list(trajectories[: len(trajectories) - held]), list(trajectories[len(trajectories) - held :])
        if group.size > max(1, len(training)):
            raise InputError(f"{group.size} ranks need at least as many trajectories to learn from, got {len(training)}")
        training = group.share(training)
        if not held:
            fresh = [t.renoised(program.model, 7919 * (seed + 1) + n) for n, t in enumerate(training)]
        else:
            fresh = fresh if len(fresh) < group.size else group.share(fresh)
        self.student = Student(program, training, group)
        self.judge = Student(program, fresh, group if not held or held >= group.size else None)
        self.effort = effort
        self.limits = limits
        self.samples = 2 if any(t.stochastic for t in trajectories) else 0
        self.seed = seed
        self.cost = cost
        self.journal = Journal(checkpoint, group.agree(self._identity()), group)
        if cost == "latency":
            measure = lambda: measure_latency(self.student.program, backend)  # noqa: E731
            seconds = group.agree(self.journal.get(f"latency {backend}", measure, self.student))
            self.student.price_by(per_step(self.student.program, seconds))
        self.branches = [block.name for block in self.student.program.branches]
        self.levels = levels_of(self.student, self.samples)
        if effort.kinds:
            names = list(dict.fromkeys(level.name for level in self.levels))[: effort.kinds]
            self.levels = [level for level in self.levels if level.name in names]
        self._promising = self.levels
        self.progress = progress
        self._bar: Any = None

    def _identity(self) -> str:
        first = self.student.trajectories[0]
        parts = (self.student.program.fingerprint, first.timesteps, float(first.final.double().sum()), self.seed, self.limits)
        return repr((*parts, self.effort, self.samples)) + ("" if self.cost == "macs" else self.cost)

    # One budget

    def best(self, budget: float) -> ParetoPoint:
        """The best plan for a fraction of the full run's MACs.

        Raises:
            OutcomeError: no plan comes within 3 % of it; says what is the least.
        """
        self._check_reachable(budget)
        started = self._units
        pool: list[Candidate] = []
        with self._shown(f"learning {1 / budget:.3g}x"):
            try:
                for schedule in self._proposals(budget, pool):
                    self._add(pool, schedule, budget)
                self._search(pool, budget)
                finalists = self._refined(self._finalists(pool), self.effort.units - (self._units - started))
            except KeyboardInterrupt:
                if not pool:
                    raise
                logger.warning("learning was interrupted; using the best of %d plans so far", len(pool))
                return self._point(min(pool, key=lambda c: c.score), started)
        if not finalists:
            raise OutcomeError(
                f"macs={budget:.4g} (speedup={1 / budget:.4g}) cannot be met within {TOLERANCE:.0%} under {self.limits}; "
                "allow more graphs or more cache, or take more steps"
            )
        judged = [(c, self._point(c, started)) for c in finalists]
        # All images count: which images are hard differs more between batches than plans of nearly equal quality do.
        best, chosen = min(judged, key=lambda pair: self._of_all(pair[0].score, pair[1].decibels))
        self._compare_with_fewer_steps(chosen, budget)
        coefficients = best.coefficients
        try:
            coefficients = self._refitted(best, chosen.decibels)
        except KeyboardInterrupt:
            logger.warning("learning was interrupted before its last step of refinement")
        return replace(chosen, mask=self.student.mask(best.schedule, coefficients), units=self._units - started)

    def _of_all(self, score: float, judged: float) -> float:
        """Mean over the images that were learned from and those that were held out."""
        return (1 - self._held) * score + self._held * judged

    @property
    def _held(self) -> float:
        return self.judge.images / (self.judge.images + self.student.images)

    def _refitted(self, candidate: Candidate, judged: float) -> Coefficients:
        """The coefficients after a last Gauss-Newton step on the held-out noise, kept if all images are better for it.

        The step is as long as the share of the held-out images: the others have had theirs, and both have about the same
        second derivatives, so that this is the step for all images together.
        """
        schedule, coefficients = candidate.schedule, candidate.coefficients
        if self.effort.rounds < 2 or schedule.blend or not _is_refinable(coefficients):
            return coefficients  # with so many coefficients, the held-out noise has told when to stop

        def refit() -> Any:
            refined, score = self.judge.refine(schedule, coefficients, 1, self._tick, length=self._held)
            return [score, _dump(refined)]

        def check() -> float:
            return self.student.score(self.student.rollout(schedule, refitted))

        key = f"{_key(schedule)} {sorted(map(repr, coefficients.items()))}"
        score, terms = self.student.group.agree(self.journal.get(f"refit {key}", refit, self.judge))
        refitted = _load(terms)
        again = self.student.group.agree(self.journal.get(f"check refit {key}", check, self.student))
        return refitted if self._of_all(again, score) < self._of_all(candidate.score, judged) else coefficients

    def _check_reachable(self, budget: float) -> None:
        least = min((self.student.cost(level.loads) for level in self.levels), default=1.0)
        steps = self.student.num_steps
        least = (1 + (steps - 1) * least) / steps
        if not self.levels or (budget < least / (1 + TOLERANCE)):
            raise OutcomeError(
                f"speedup={1 / budget:.4g} (macs={budget:.4g}) is out of reach: when only the first of {steps} steps computes "
                f"everything, speedup={1 / least:.4g} (macs={least:.4g}) is the most. Ask for less, or take more steps"
            )

    def _proposals(self, budget: float, pool: list[Candidate]) -> Iterator[Schedule | None]:
        """Schedules to try; what comes later depends on how the earlier ones did."""
        for level in self._promising:
            yield evenly(self.student, level, budget)
        ranked = sorted(pool, key=lambda c: c.score)
        if ranked:
            level = self._level_of(ranked[0])
            for bend in BENDS:
                yield evenly(self.student, level, budget, bend)
        if not self.effort.starts or not ranked:
            return
        near = [c.schedule.kind.removesuffix(", even") for c in ranked if c.score < ranked[0].score + HOPELESS]
        if self._promising is self.levels:  # what is hopeless at one budget is not tried at the others
            self._promising = [x for x in self.levels if x.name in near]
        names = list(dict.fromkeys(c.schedule.kind.removesuffix(", even") for c in ranked))[: self.effort.levels]
        if self.samples:  # levels of different cost may be mixed
            names = list(dict.fromkeys([*names, *near]))[:MIXED]
        measured: list[tuple[Level, torch.Tensor]] = []
        for name in names:
            level = self._level_of(next(c for c in ranked if c.schedule.kind == f"{name}, even"))
            runs = self._runs(level)
            measured.append((level, runs))
            yield place(self.student, [(level, runs)], budget)
            if name == "branches" and self._differentiable:
                for period in (0, 6, 4, 3, 2):
                    yield place_blocks(self.student, self._probes, self.branches, runs, budget, period)
        if len(measured) > 1 and max(self.student.cost(level.loads) for level, _ in measured) < 0.1:
            yield place(self.student, measured, budget)
        for chosen in (measured, measured[:2]) if self.samples and len(measured) > 1 else ():
            yield place_mixed(self.student, chosen, budget)

    def _level_of(self, candidate: Candidate) -> Level:
        name = candidate.schedule.kind.removesuffix(", even")
        return next(x for x in self.levels if x.name == name and x.history == candidate.schedule.history)

    def _runs(self, level: Level) -> torch.Tensor:
        key = f"runs {level.name} {level.history}"
        measure = lambda: measure_runs(self.student, level, self.effort.starts, self._tick).tolist()  # noqa: E731
        rows = self.journal.get(key, measure, self.student)
        return torch.tensor(self.student.group.agree(rows), dtype=torch.float64)

    @functools.cached_property
    def _probes(self) -> Probes:
        """Of all branches."""
        measure = lambda: [x.tolist() for x in measure_probes(self.student, self.branches)]  # noqa: E731
        rows = self.student.group.agree(self.journal.get("probes", measure, self.student))
        return Probes(*(torch.tensor(x, dtype=torch.float64) for x in rows))

    def _add(self, pool: list[Candidate], schedule: Schedule | None, budget: float) -> Candidate | None:
        """Evaluate a schedule, brought to the budget, and add it to the pool, if it keeps the limits."""
        if schedule is None:
            return None
        schedule = self._trimmed(schedule, budget)
        if schedule is None or any(c.schedule == schedule for c in pool) or not self._allowed(schedule):
            return None
        candidate = self._evaluate(schedule)
        pool.append(candidate)
        self._show(pool)
        return candidate

    def _evaluate(self, schedule: Schedule) -> Candidate:
        def roll() -> Any:
            rolled = self.student.rollout(schedule)
            return [self.student.score(rolled), _dump(rolled.coefficients)]

        score, terms = self.student.group.agree(self.journal.get(f"roll {_key(schedule)}", roll, self.student))
        self._tick()
        return Candidate(schedule, _load(terms), score)

    def _trimmed(self, schedule: Schedule, budget: float) -> Schedule | None:
        """The schedule within the tolerance of the budget: branches of one more step are formed, or computed."""
        student = self.student
        spent = student.spent(schedule)
        if _is_met(budget, spent):
            return schedule
        loads = list(schedule.loads)
        # too dear: the later of two neighbouring full steps is least missed. Too cheap: the middle of the longest run
        if spent > budget:
            full = [i for i in range(1, len(loads)) if not loads[i]]
            order = sorted(full, key=lambda i: (bool(loads[i - 1]), -i))
        else:
            order = sorted((i for i in range(1, len(loads)) if loads[i]), key=lambda i: -_run_length(loads, i))
        for i in order:
            chosen: frozenset[str] = frozenset() if spent > budget else frozenset(self.branches)
            for name in self.branches:
                trial = chosen ^ {name}
                loads[i] = trial
                now = student.spent(replace(schedule, loads=tuple(loads)))
                if _is_met(budget, now):
                    return replace(schedule, loads=tuple(loads))
                if (now < budget) == (spent > budget):
                    continue  # one block too many; a smaller one may fit
                chosen = trial
            loads[i] = chosen
            spent_now = student.spent(replace(schedule, loads=tuple(loads)))
            if (spent_now < budget) == (spent > budget):
                break
        return None

    def _allowed(self, schedule: Schedule, coefficients: Coefficients | None = None) -> bool:
        """Whether a plan of this schedule keeps the limits. Only which coefficients are 0 or 1 matters for that, at most."""
        if self.limits == Limits():
            return True
        student = self.student
        dummies: dict[tuple[int, str], Any] = {}
        keys = coefficients or [(i, name) for i, loads in enumerate(schedule.loads) for name in loads]
        for i, name in keys:
            sources = [s for s, _ in coefficients[i, name]] if coefficients else student.sources(schedule, i, name)
            plain = len(sources) == 1 and (not coefficients or sources[0] == i)
            dummies[i, name] = tuple((s, 1.0 if plain else 0.5) for s in sources)
        plan = rectify(student.program, student.mask(schedule, dummies))
        graphs, cached = self.limits.max_graphs, self.limits.max_cache_bytes
        return (graphs is None or plan.distinct_graphs <= graphs) and (cached is None or plan.peak_cache_bytes <= cached)

    def _search(self, pool: list[Candidate], budget: float) -> None:
        """Local search from the two best schedules of different kinds."""
        rng = random.Random(self.seed)
        starts = self._finalists(pool)[:2]
        for start in starts:
            current, began, failures = start, self._units, 0
            search = self.effort.search / (2 if self.samples else 1)  # refinement gains more there
            while self._units - began < search / len(starts) and failures < 60:
                schedule = _neighbour(current.schedule, rng)
                if schedule is None or not _is_met(budget, self.student.spent(schedule)):
                    failures += 1
                    continue
                found = self._add(pool, schedule, budget)
                failures += 1
                if found is not None and found.score < current.score - 0.02:
                    current, failures = found, 0

    def _finalists(self, pool: Sequence[Candidate]) -> list[Candidate]:
        """The best schedules, one of each family first."""
        ranked = sorted(pool, key=lambda c: c.score)
        families: dict[str, Candidate] = {}
        for candidate in ranked:
            families.setdefault(candidate.schedule.kind.split(",")[0], candidate)
        first = list(families.values())
        return (first + [c for c in ranked if c not in first])[: self.effort.finalists]

    def _refined(self, finalists: Sequence[Candidate], units: float) -> list[Candidate]:
        """The finalists, and those of few coefficients with these refined, the best first, while units are left.

        With a stochastic sampler, where fits along the way say less about the final samples, each is refined by one round
        and the best of them by more, as long as the held-out noise is better for it.
        """
        found, refined = list(finalists), []
        ends = self._units + units
        for candidate in sorted(finalists, key=lambda c: c.score):
            if _is_refinable(candidate.coefficients):
                better = self._refine(self._freed(candidate), 1 if self.samples else self.effort.rounds, ends)
                if better and (not better.schedule.blend or self._judged(better)[0] < self._judged(candidate)[0]):
                    refined.append(better)
        best = min(refined, key=lambda c: c.score, default=None)
        for _ in range(ROUNDS if self.samples and self.effort.rounds > 1 else 0):
            better = best and self._refine(best, 1, ends)
            if not best or not better or better.score > best.score - ENOUGH:
                break
            if better.schedule.blend and self._judged(better)[0] > self._judged(best)[0]:
                break
            best = better
            refined.append(better)
        return found + refined

    def _refine(self, candidate: Candidate, rounds: int, ends: float) -> Candidate | None:
        """The candidate with its coefficients refined, by fewer rounds or not at all where units would pass ``ends``."""
        schedule, coefficients = candidate.schedule, candidate.coefficients
        together = bool(schedule.blend) and self._has_adjoints  # all coefficients, by their adjoints
        cost = refinement_cost(self.student, schedule) if together else self.student.refinement_cost(schedule, coefficients)
        rounds = min(rounds, int((ends - self._units) / cost)) if cost else 0
        if rounds < 1:
            return None

        again = f" from {sorted(map(repr, coefficients.items()))}" if self.samples else ""
        seed = random.Random(f"{self.seed}{again}").randrange(1 << 31)  # other directions in every round

        def refine() -> Any:
            if together:
                refined, score = refine_all(self.student, schedule, coefficients, seed)
            else:
                refined, score = self.student.refine(schedule, coefficients, rounds, self._tick)
            self._tick()
            return [score, _dump(refined)]

        score, terms = self.student.group.agree(
            self.journal.get(f"refine {rounds} {_key(schedule)}{again}", refine, self.student)
        )
        return Candidate(schedule, _load(terms), score)

    @functools.cached_property
    def _differentiable(self) -> bool:
        return has_derivatives(self.student.program)

    @functools.cached_property
    def _has_adjoints(self) -> bool:
        return all(acts_by_element(t) for t in self.student.trajectories) and self._differentiable

    def _freed(self, candidate: Candidate) -> Candidate:
        """With a stochastic sampler, the same candidate with more coefficients to refine, if some of its steps compute part.

        Reused blocks do not see the noise that was injected since. They may be scaled, and read an older value too; the
        output is blended with the one before and with noisy samples. What is nearest at each step, block by block, is not
        best in the end, so all of it starts as plain reuse.
        """
        student, schedule, output = self.student, candidate.schedule, self.student.output
        partial = any(loads and output not in loads for loads in schedule.loads)
        if not self.samples or output is None or not student.reads_samples(output) or not partial:
            return candidate
        freed = replace(schedule, samples=max(2, schedule.samples), blend=1)
        coefficients: dict[tuple[int, str], Terms] = {}
        for i, loads in enumerate(schedule.loads):
            for name in sorted(loads | ({output} if student.blends(freed, i) else set())):
                given = dict(candidate.coefficients.get((i, name), ()))
                sources = list(dict.fromkeys([*given, *student.sources(freed, i, name)]))
                coefficients[i, name] = tuple((s, given.get(s, 0.0) if given else float(s == sources[0])) for s in sources)
        result = replace(candidate, schedule=freed, coefficients=coefficients)
        return result if self._allowed(freed, coefficients) else candidate

    def _point(self, candidate: Candidate, started: float) -> ParetoPoint:
        """The candidate on held-out noise."""
        decibels, error = self._judged(candidate)
        mask = self.student.mask(candidate.schedule, candidate.coefficients)
        ratio = 1 / self.student.spent(candidate.schedule)
        return ParetoPoint(mask, ratio, error, decibels, candidate.schedule.kind, self._units - started)

    def _judged(self, candidate: Candidate) -> tuple[float, float]:
        """Score and relative error on held-out noise."""

        def roll() -> Any:
            rolled = self.judge.rollout(candidate.schedule, candidate.coefficients)
            return [self.judge.score(rolled), self.judge.relative_error(rolled)]

        key = f"judge {_key(candidate.schedule)} {sorted(map(repr, candidate.coefficients.items()))}"
        decibels, error = self.student.group.agree(self.journal.get(key, roll, self.judge))
        return decibels, error

    def _compare_with_fewer_steps(self, point: ParetoPoint, budget: float) -> None:
        """Warn if the scheduler's own grid with fewer steps, which no mask can express, is better on held-out noise."""
        first = self.judge.trajectories[0]
        if first.stochastic or not first.can_change_steps:
            return
        steps = max(1, round(budget * self.student.num_steps))
        fewer = [t.with_steps(self.judge.program.model, steps) for t in self.judge.trajectories]
        score = self.judge.score_of(fewer)
        if score < point.decibels - 0.1:
            logger.warning(
                "%d steps of the scheduler's own grid are %.1f dB better than the best plan at the same MACs; set "
                "num_inference_steps=%d and ask for a smaller speed-up from there",
                steps,
                point.decibels - score,
                steps,
            )

    def meet_error(self, max_error: float) -> ParetoPoint:
        """The cheapest plan whose error on held-out noise is at most ``max_error``, by bisection of the budget.

        If there is none, the one that computes everything, with a warning.
        """
        steps = self.student.num_steps
        low, high = 1.5 / steps, 1.0
        found: ParetoPoint | None = None
        nearest = float("inf")
        for _ in range(6):
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
            everything = Schedule((frozenset(),) * steps, kind="everything")
            logger.warning("no plan that saves anything keeps max_error=%g; the best had %.3g", max_error, nearest)
            return ParetoPoint(self.student.mask(everything, {}), 1.0, 0.0, -300.0, "everything", self._units)
        return found

    # Progress

    @property
    def _units(self) -> float:
        judged = self.judge.units * self.judge.images / self.student.images
        return self.student.units + judged + self.journal.replayed

    def _shown(self, title: str) -> Any:
        self._bar = tqdm(total=None, desc=title, unit="rollout", disable=not self.progress)
        return self._bar

    def _tick(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def _show(self, pool: Sequence[Candidate]) -> None:
        best = min(pool, key=lambda c: c.score)
        if self._bar is not None:
            self._bar.set_postfix(
                error=f"{best.score:.2f} dB",
                macs=f"{self.student.spent(best.schedule):.3f}",
                kind=best.schedule.kind,
                refresh=False,
            )


def _is_refinable(coefficients: Coefficients) -> bool:
    """Whether few blocks are forecast, so that there are few degrees of freedom for the cost of a step of each."""
    return len({name for (_, name), terms in coefficients.items() if len(terms) > 1}) <= 3


def _is_met(budget: float, spent: float) -> bool:
    """Whether a schedule meets the budget, with a margin to what is promised."""
    return abs(spent / budget - 1) <= TOLERANCE * 0.9


def _neighbour(schedule: Schedule, rng: random.Random) -> Schedule | None:
    """Two steps close to each other exchange what they form, or one block's; or a step does as another one does."""
    steps = len(schedule.loads)
    loads = list(schedule.loads)
    i = rng.randrange(1, steps)
    j = i + rng.choice((-3, -2, -1, 1, 2, 3))
    if not 1 <= j < steps or loads[i] == loads[j]:
        return None
    kind = rng.random()
    different = sorted(loads[i] ^ loads[j])
    if kind < 0.5 or len(different) == 1:
        loads[i], loads[j] = loads[j], loads[i]
    elif kind < 0.85:
        some = frozenset(rng.sample(different, rng.randint(1, max(1, len(different) // 3))))
        loads[i], loads[j] = loads[i] ^ some, loads[j] ^ some
    else:
        loads[i] = loads[j]
    return replace(schedule, loads=tuple(loads), kind=schedule.kind.split(",")[0] + ", searched")


def _run_length(loads: Sequence[frozenset[str]], i: int) -> int:
    low = high = i
    while low > 0 and loads[low - 1]:
        low -= 1
    while high + 1 < len(loads) and loads[high + 1]:
        high += 1
    return min(i - low, high - i) + 1


def _key(schedule: Schedule) -> str:
    rows = [sorted(loads) for loads in schedule.loads]
    blend = f", blended with {schedule.blend}" if schedule.blend else ""
    return repr((rows, schedule.history, schedule.samples)) + blend


def _dump(coefficients: Coefficients) -> list[Any]:
    return [[i, block, terms] for (i, block), terms in coefficients.items()]


def _load(rows: Iterable[Any]) -> dict[tuple[int, str], Any]:
    return {(i, block): tuple((clean_source(s, block), c) for s, c in terms) for i, block, terms in rows}
