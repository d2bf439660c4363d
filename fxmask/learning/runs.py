"""Measured errors of runs: a level is formed at some steps in a row, and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from fxmask.learning.levels import Level
from fxmask.learning.schedule import Origin, Schedule
from fxmask.learning.student import Student

MAX_RUN = 3  # longer runs are extrapolated


def measure_runs(student: Student, level: Level, starts: int, bar: Callable[[], None] = lambda: None) -> torch.Tensor:
    """Relative errors float64 ``[T, R]`` of runs of 1..R formed steps from each step on; infinite where there is none.

    About ``starts`` first steps are tried, with the last three and the first two among them; those between are
    interpolated. Mean of the logarithm over images, as in ``Student.score``.
    """
    steps = student.num_steps
    inner = [round(1 + k * (steps - 2) / max(1, starts - 1)) for k in range(starts)]
    tried = sorted({*inner, 1, 2, steps - 3, steps - 2, steps - 1} & set(range(1, steps)))
    stored = _stored(level, steps)
    base = student.rollout(stored, keep=True)
    lengths = {first: MAX_RUN if k % 2 == 0 or first >= steps - 3 else 1 for k, first in enumerate(tried)}
    known: dict[int, dict[int, float]] = {length: {} for length in range(1, MAX_RUN + 1)}
    for state in student.states(stored, base, tried, range(len(student.trajectories)), open_end=True):
        first = state.step
        for length in range(1, min(lengths[first], steps - first) + 1):
            run = [level if first <= i < first + length else None for i in range(steps)]
            rolled = student.rollout(level.schedule(run, Origin.PLACED, level.name), None, state)
            known[length][first] = 10 ** (student.score(rolled) / 10)
            bar()
    table = torch.full((steps, MAX_RUN), math.inf, dtype=torch.float64)
    for length, errors in known.items():
        for i in range(1, steps - length + 1):
            table[i, length - 1] = _between(errors, i)
    return table


def _stored(level: Level, steps: int) -> Schedule:
    """Full steps that store what the level reads."""
    return level.schedule([None] * (steps - 1) + [level], Origin.PLACED, level.name)


def _between(known: Mapping[int, float], step: int) -> float:
    """Geometric interpolation."""
    if step in known:
        return known[step]
    below = max((k for k in known if k < step), default=min(known))
    above = min((k for k in known if k > step), default=max(known))
    share = 0.0 if above == below else (step - below) / (above - below)
    return math.exp((1 - share) * math.log(known[below] + 1e-30) + share * math.log(known[above] + 1e-30))


def run_error(runs: torch.Tensor, first: int, length: int) -> float:
    """Error of a run; beyond what was measured, the growth from the last two lengths goes on as a power law."""
    if length == 0:
        return 0.0
    known = min(length, MAX_RUN)
    while known > 1 and not math.isfinite(float(runs[first, known - 1])):
        known -= 1
    error = float(runs[first, known - 1])
    power = 2.0
    if known > 1:
        growth = math.log(max(1.0, error / max(1e-30, float(runs[first, known - 2]))))
        power = min(6.0, max(1.0, growth / math.log(known / (known - 1))))
    return float(error * (length / known) ** power)
