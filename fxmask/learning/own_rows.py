"""Plans in which the lanes of guidance have rows of their own: one is computed more rarely, and formed from the others too.

    lane a   # . # . # # ...        . is formed from the lane's own latest values, and from what the other lane has
    lane b   # . . # . # ...        computed at this very step and at the steps where this one was fresh

Or lanes share what attention adds: at some steps one computes it and the others form theirs from it (Yuan et al.,
"DiTFastAttn", 2024), and what that saves is spent on more steps that are computed.

Batched guidance is learned from as if its lanes were called one by one (``SplitLanes``), first the one that guidance weighs
most: what it has computed is there when the others are formed. The plans are candidates beside those in which all lanes are
alike, judged on the same images.
"""

from __future__ import annotations

import functools
import logging
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from fxmask.ir.liveness import live_nodes
from fxmask.ir.macs import count_attention_macs
from fxmask.ir.program import Program
from fxmask.learning.candidate import Candidate
from fxmask.learning.constraints import is_met, keeps_limits
from fxmask.learning.effort import Effort, Limits
from fxmask.learning.finalists import refine_finalists
from fxmask.learning.lane_moments import LaneMoments, Rows, indices, shares
from fxmask.learning.levels import Level
from fxmask.learning.local_search import neighbour
from fxmask.learning.measured import Measured
from fxmask.learning.schedule import Origin, Schedule, lane_sources
from fxmask.learning.student import Student, output_blocks
from fxmask.sampling.sampler import Sampler
from fxmask.sampling.split_lanes import SplitLanes, split_lanes

logger = logging.getLogger(__name__)
Known = Sequence[tuple[Level, torch.Tensor]]  # levels with errors of their runs ``[T, R]``
FAMILY, SHARED = "output, lanes apart", "output, shared attention"
SOFTMAX = (torch.ops.aten._softmax.default, torch.ops.aten.softmax.int)  # of an attention that is written out
HISTORY, SAMPLES = 3, 2  # fresh values of the lane itself, and noisy samples, that a forecast reads
FEWEST = 2  # calls of a lane that are computed, the first ones
STARTS = 6  # schedules that the moments improve
GAIN = 0.02  # dB: local search goes on from a neighbour that is better by this much
FAILURES = 60
BEHIND = 0.25  # dB: by so much at most the best rollout may be behind the best without lanes, or the rest is not tried


def views_of(trajectories: Sequence[Sampler], program: Program) -> list[Sampler] | None:
    """The runs with a call for every lane; ``None`` if there is one lane, or batches do not come apart."""
    if all(len(step) > 1 for t in trajectories for step in t.calls):
        return list(trajectories) if len({len(step) for t in trajectories for step in t.calls}) == 1 else None
    views = [split_lanes(t, program.model) for t in trajectories]
    found = [view for view in views if view is not None]
    if len(found) != len(views) or len({view.count for view in found}) != 1:
        return None
    turns = turns_of(found[0])
    return [view.in_order_of(turns) for view in found]


def turns_of(view: Sampler) -> tuple[int, ...]:
    """Lanes by how much guidance weighs their predictions, the most first."""
    weights = [round(abs(share), 3) for share in shares(view)]
    return tuple(sorted(range(len(weights)), key=lambda lane: -weights[lane]))


class OwnRows:
    """Searches plans with rows for each lane.

    Args:
        measured: measures schedules with several lanes.
        limits: that plans keep.
        seed: of local search.
    """

    is_stochastic = False

    def __init__(self, measured: Measured, limits: Limits, seed: int) -> None:
        self.measured = measured
        self.limits = limits
        self._seed = seed
        self.student: Student = measured.student
        self.lanes = len(self.student.trajectories[0].calls[0])
        self._output = frozenset(block.name for block in output_blocks(self.student.program))
        self._samples = SAMPLES if all(map(self.student.reads_samples, self._output)) else 0

    @property
    def can_form(self) -> bool:
        """Whether there is a whole output to forecast."""
        return len(self._output) == 1

    def view_of(self, run: Sampler) -> Sampler:
        """Another recorded run with a call for every lane."""
        known = self.student.trajectories[0]
        return SplitLanes(run, known.count, known.turns) if isinstance(known, SplitLanes) else run

    def best(
        self,
        budget: float,
        alike: Sequence[Candidate],
        effort: Effort,
        units: float,
        crossed: bool = False,
        known: Known = (),
    ) -> Candidate | None:
        """The best one for a fraction of the full run's MACs; ``None`` if there is none, or none that is worth refining.

        Args:
            budget: the fraction.
            alike: plans without lanes to start from, on the same images.
            effort: how much of it is refined.
            units: of work at most, in full sampling runs.
            crossed: whether it will be judged by cross-validation, which takes work too.
            known: measured errors of runs without lanes.
        """
        measured, started = self.measured, self.measured.units
        pool: list[Candidate] = []
        for schedule in self._screened(budget, [c.schedule for c in alike], effort, known):
            if pool and measured.units - started > units / 2:
                break
            self._add(pool, schedule, budget)
        if not pool:
            return None
        behind = min(c.score for c in pool) - min((c.score for c in alike if not c.rounds), default=math.inf)
        if behind > BEHIND:  # refinement and local search have brought both about as far
            logger.debug("lanes apart are %.2f dB behind: no more of them is tried", behind)
            return None
        self._search(pool, budget, started + units / 2)
        logger.debug("lanes apart: %s", [(round(c.score, 2), c.schedule.description) for c in pool])
        found = sorted(pool, key=lambda c: c.score)[: effort.finalists]
        refined = refine_finalists(
            measured,
            found,
            self.limits,
            rounds=effort.rounds,
            ends=started + units,
            stochastic=self.is_stochastic,
            crossed=crossed,
        )
        return min(refined, key=lambda c: measured.of_all(c.score, measured.judged(c)[0]))

    def _screened(self, budget: float, alike: Sequence[Schedule], effort: Effort, known: Known) -> Iterable[Schedule]:
        """What to roll out: the schedules without lanes, and those that the moments of the recorded runs say are best."""
        starts = [*map(self._apart, alike), *self._even(budget)]
        found: dict[Rows, float] = {}
        formed = [s for s in starts if s.formed == self._output and is_met(budget, self.student.spent(s))]
        ranked = sorted(
            {self._rows(s): self.moments.error(self._rows(s), self._read) for s in formed}.items(), key=lambda x: x[1]
        )
        for k, (rows, _) in enumerate(ranked[:STARTS]):
            error, better = self.moments.improved(rows, self._read, self._seed + k)
            found[better] = error
        chosen = sorted(found, key=found.__getitem__)
        logger.debug("screened: %s, starts %s", [found[x] for x in chosen], [e for _, e in ranked])
        shared = [schedule for base in alike[:1] for schedule in self._sharing(budget, base)]
        return list(dict.fromkeys([*(self._schedule(rows) for rows in chosen), *shared, *starts[: len(alike)]]))

    @functools.cached_property
    def moments(self) -> LaneMoments:
        """Of the recorded runs."""
        return LaneMoments.of(self.student.trajectories)

    def _rows(self, schedule: Schedule) -> Rows:
        return tuple(not loads for loads in schedule.loads)

    def _schedule(self, rows: Rows) -> Schedule:
        loads = tuple(frozenset() if on else self._output for on in rows)
        return Schedule(loads, HISTORY, self._samples, lanes=self.lanes, origin=Origin.PLACED, family=FAMILY)

    def _read(self, rows: Rows, row: int) -> list[int]:
        sources = lane_sources(rows, row, self.lanes, HISTORY, self._samples)
        return indices(sources, len(rows), self.lanes)

    def _even(self, budget: float) -> Iterator[Schedule]:
        """Shares of the calls that each lane computes, the most equal first, and for each of them which lane has fewer."""
        steps, lanes = self.student.num_steps, self.lanes
        share = self.student.cost(self._output) if self._output else 1.0
        if share >= 1 or budget <= share:
            return
        count = round((budget - share) / (1 - share) * steps * lanes)
        for more in range(-(-count // lanes), steps + 1):
            rest = count - more
            for rare in range(lanes) if lanes <= 2 else (0,):
                counts = [more if lane != rare else rest - more * (lanes - 2) for lane in range(lanes)]
                if not all(FEWEST <= n <= steps for n in counts):
                    continue
                if rare and counts[0] == counts[-1]:
                    continue
                yield self._placed(counts)

    def _sharing(self, budget: float, base: Schedule) -> Iterator[Schedule]:
        """One more step computed than in a schedule without lanes, paid by attention that lanes share at others."""
        shared, steps = attention_branches(self.student.program), self.student.num_steps
        computed = {step for step, loads in enumerate(base.loads) if not loads}
        formed = {loads for loads in base.loads if loads}
        saved = (1 - self.student.cost(shared)) * (self.lanes - 1) / self.lanes
        if not shared or saved <= 0 or formed != {self._output}:
            return
        computed.add(min(set(range(steps)) - computed, key=lambda step: (-_gap(computed, step), step)))
        over = len(computed) + (steps - len(computed)) * self.student.cost(self._output) - budget * steps
        candidates = sorted(computed)[FEWEST:]
        count = round(over / saved)
        if not 0 < count <= len(candidates):
            return
        for chosen in dict.fromkeys([tuple(candidates[-count:]), tuple(candidates[:count])]):
            loads = tuple(
                self._output if step not in computed else shared if lane and step in chosen else frozenset()
                for step in range(steps)
                for lane in range(self.lanes)
            )
            yield Schedule(loads, HISTORY, self._samples, lanes=self.lanes, origin=Origin.EVEN, family=SHARED)

    def _apart(self, schedule: Schedule) -> Schedule:
        """Lanes that do the same, but each with coefficients of its own, which read the other's values too."""
        loads = tuple(loads for loads in schedule.loads for _ in range(self.lanes))
        return replace(schedule, loads=loads, blend=0, lanes=self.lanes, family=f"{schedule.family}, lanes apart")

    def _placed(self, counts: Sequence[int]) -> Schedule:
        """Each lane's first calls, and the rest at equal distances."""
        steps = self.student.num_steps
        computed = [_evenly(steps, n) for n in counts]
        loads = tuple(
            frozenset() if step in computed[lane] else self._output for step in range(steps) for lane in range(self.lanes)
        )
        return Schedule(loads, HISTORY, self._samples, lanes=self.lanes, origin=Origin.EVEN, family=FAMILY)

    def _add(self, pool: list[Candidate], schedule: Schedule, budget: float) -> Candidate | None:
        """Evaluate a schedule that meets the budget and keeps the limits."""
        if any(c.schedule == schedule for c in pool) or not is_met(budget, self.student.spent(schedule)):
            return None
        if not keeps_limits(self.student, self.limits, schedule):
            return None
        pool.append(self.measured.evaluate(schedule))
        return pool[-1]

    def _search(self, pool: list[Candidate], budget: float, ends: float) -> None:
        """Local search from the best schedule, until so many units are spent."""
        rng, failures = random.Random(self._seed), 0
        current = min(pool, key=lambda c: c.score)
        while self.measured.units < ends and failures < FAILURES:
            schedule = self._neighbour(current.schedule, rng)
            found = None if schedule is None else self._add(pool, schedule, budget)
            failures += 1
            if found is not None and found.score < current.score - GAIN:
                current, failures = found, 0

    def _neighbour(self, schedule: Schedule, rng: random.Random) -> Schedule | None:
        return neighbour(schedule, rng)


def attention_branches(program: Program) -> frozenset[str]:
    """The residual branches that hold an attention of their own."""
    graph = program.graph_module.graph
    found = {node for node in live_nodes(graph, ())[0] if count_attention_macs(node) or node.target in SOFTMAX}
    return frozenset(b.name for b in program.branches if found - set(live_nodes(graph, b.values)[0]))


def _gap(computed: set[int], step: int) -> int:
    """How far the nearest computed step before is."""
    return step - max((x for x in computed if x < step), default=-1)


def _evenly(steps: int, count: int) -> set[int]:
    """So many of the steps: the first ones, and the others at equal distances."""
    rest = max(1, count - FEWEST)
    chosen = set(range(FEWEST)) | {FEWEST + round(k * (steps - FEWEST) / rest) for k in range(count - FEWEST)}
    return chosen if len(chosen) == count else set(range(count))
