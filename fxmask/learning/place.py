"""Where schedules come from: measured errors, then exact dynamic programming.

A *level* is a set of blocks that are formed together (the whole output, a stage, all branches). Two things are measured on
recorded runs, by running the network, never guessed:

    run[i, r]      error of the final samples when a level is formed at the r steps from i on, and nowhere else. Errors of
                   neighbouring steps add up in step, so runs are measured whole; it is not the sum of its steps' errors
    probe[i, b, a] <u, J_b (v_b(i-a) - v_b(i))> for random u: the output error, to first order, when block b has its
                   value of a steps ago; squares over u and images estimate its square norm (Hutchinson)

Full steps are placed by dynamic programming over the runs between them. A mask of its own for every block comes from
dynamic programming over the age of the block's value, with probes scaled so that all branches together have the measured
error of a run. Both are exact for that model of the error. What is really good is decided later, on rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from fxmask.learning.levels import Level, count_full
from fxmask.learning.runs import run_error
from fxmask.learning.schedule import Origin, Schedule
from fxmask.learning.student import Student

GRAIN = 0.025  # of a step's MACs, to which ``place_mixed`` rounds
SLACK = 0.02  # of the budget, within which ``place_mixed`` stays
LONGEST = 12  # formed steps in a row that it may choose


def place(student: Student, levels: Sequence[tuple[Level, torch.Tensor]], budget: float) -> Schedule | None:
    """Full steps, and a level for each run between them, where the measured runs say.

    Exact dynamic programming over (position, full steps so far). With several levels, those of one cost.

    Args:
        student: whose program.
        levels: what may be formed, each with its errors of runs ``[T, R]``.
        budget: fraction of the full run's MACs.
    """
    dearest = max((level for level, _ in levels), key=lambda level: student.cost(level.loads))
    steps, count = student.num_steps, count_full(student, dearest, budget)
    if count is None:
        return None
    best = [[math.inf] * (count + 1) for _ in range(steps + 1)]  # best[i][n]: steps before i are done, n of them full
    came: dict[tuple[int, int], tuple[int, Level]] = {}
    best[0][0] = 0.0
    for first in range(steps):
        errors = [_cheapest(levels, first + 1, length) for length in range(steps - first)]
        for n in range(count):
            if best[first][n] == math.inf:
                continue
            for length, (error, level) in enumerate(errors):
                after = first + 1 + length
                if best[first][n] + error < best[after][n + 1]:
                    best[after][n + 1] = best[first][n] + error
                    came[after, n + 1] = first, level
    loads: list[frozenset[str]] = [frozenset()] * steps
    position, n = steps, count
    while position:
        first, level = came[position, n]
        loads[first + 1 : position] = [level.loads] * (position - first - 1)
        position, n = first, n - 1
    name = " or ".join(level.name for level, _ in levels)
    history, samples = (max(getattr(level, field) for level, _ in levels) for field in ("history", "samples"))
    return Schedule(tuple(loads), history, samples, origin=Origin.PLACED, family=name)


def place_mixed(student: Student, levels: Sequence[tuple[Level, torch.Tensor]], budget: float) -> Schedule | None:
    """As ``place``, but the levels of the runs may differ in cost: some steps form more, others less.

    Exact dynamic programming over (position, MACs so far), with the MACs of a run rounded to ``GRAIN`` of a step.
    """
    steps, best = student.num_steps, _Table(student.num_steps, budget)
    for first in range(steps):
        for length in range(min(steps - first, LONGEST + 1)):
            for k, (level, runs) in enumerate(levels if length else levels[:1]):
                cost = 1 + length * level.cost(student)
                best.offer(first, first + 1 + length, cost, run_error(runs, first + 1, length), k)
    found = best.path()
    if found is None:
        return None
    chosen: list[Level | None] = [None] * steps
    for first, after, k in found:
        chosen[first + 1 : after] = [levels[k][0]] * (after - first - 1)
    history, samples = (max(getattr(level, field) for level, _ in levels) for field in ("history", "samples"))
    name = " or ".join(level.name for level, _ in levels)
    return replace(levels[0][0].schedule(chosen, Origin.MIXED, name), history=history, samples=samples)


class _Table:
    """Smallest errors of the steps before each position, by MACs spent so far (in grains)."""

    def __init__(self, steps: int, budget: float) -> None:
        self.most = int((budget * (1 + SLACK)) * steps / GRAIN)
        self.least = math.ceil((budget * (1 - SLACK)) * steps / GRAIN)
        self.errors = torch.full((steps + 1, self.most + 1), math.inf, dtype=torch.float64)
        self.errors[0, 0] = 0.0
        self.came = torch.full((steps + 1, self.most + 1, 3), -1, dtype=torch.long)  # first step, grains, level

    def offer(self, first: int, after: int, cost: float, error: float, level: int) -> None:
        """A way from one position to another; positions must be left in order."""
        grains = round(cost / GRAIN)
        if grains > self.most or not math.isfinite(error):
            return
        found = self.errors[first, : self.most + 1 - grains] + error
        better = found < self.errors[after, grains:]
        self.errors[after, grains:][better] = found[better]
        self.came[after, grains:][better] = torch.tensor([first, grains, level])

    def path(self) -> list[tuple[int, int, int]] | None:
        """(first step, position behind, level) of the runs of the best way to the end."""
        ends = self.errors[-1, self.least :]
        if not bool(ends.isfinite().any()):
            return None
        position, spent = len(self.errors) - 1, self.least + int(ends.argmin())
        runs = []
        while position:
            first, grains, level = self.came[position, spent].tolist()
            runs.append((first, position, level))
            position, spent = first, spent - grains
        return runs


def _cheapest(levels: Sequence[tuple[Level, torch.Tensor]], first: int, length: int) -> tuple[float, Level]:
    return min(((run_error(runs, first, length), level) for level, runs in levels), key=lambda pair: pair[0])
