"""Refining coefficients by Gauss-Newton on the final samples, with derivatives by finite differences of partial rollouts.

There are only a few dozen coefficients. Where there are more, see ``adjoint``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from fxmask.learning.fit import damped_step
from fxmask.learning.schedule import Coefficients, Schedule, Terms, free_directions, moved_by
from fxmask.learning.student import Student

STEP = 1e-2  # of finite differences in the coefficients; values are combined with coefficients around 1
DAMPING = (1e-4, 1e-2, 1e-1, 1.0)  # tried at once, the best is taken
BETTER = 0.01  # dB: a round that gains less is the last one


def refine(
    student: Student,
    schedule: Schedule,
    coefficients: Coefficients,
    rounds: int = 2,
    bar: Callable[[], None] = lambda: None,
    length: float = 1.0,
) -> tuple[dict[tuple[int, str], Terms], float]:
    """Coefficients with a smaller error of the final samples, and its score; never worse than the given ones.

    Gauss-Newton on the images' errors, each image weighted by how small its error is already, as the mean PSNR is.
    Where a step forms many blocks, one coefficient per source is shared by all of them. A step of each round is
    ``length`` of the one that is best to first order.
    """
    base = student.rollout(schedule, coefficients, keep=True)
    nudge = step_for(student.program.example.sample.dtype)
    best, score = dict(base.coefficients), student.score(base)
    for _ in range(rounds):
        directions = free_directions(best)
        residual = student.residuals(base)
        weight = student.weights(base)
        if not directions:
            break
        parts = []
        for n, r in enumerate(residual):
            columns = []
            for state in student.states(schedule, base, [student.step_of(schedule, row) for row, _, _ in directions], [n]):
                for step, names, k in directions:
                    if student.step_of(schedule, step) == state.step:
                        other = student.rollout(schedule, moved_by(best, step, names, k, nudge), state)
                        columns.append((student.residual(other.finals[0], n) - r) / nudge)
                        if n == 0:
                            bar()
            jacobian = torch.stack([*columns, r])  # [P + 1, B, D]
            jacobian = (jacobian * weight[n].unsqueeze(1)).flatten(1)
            parts.append(jacobian @ jacobian.T)
        normal = student.group.sum(parts)
        trials = []
        for damping in DAMPING:
            trial = dict(best)
            for (step, names, k), amount in zip(directions, damped_step(normal, damping), strict=True):
                trial = moved_by(trial, step, names, k, length * amount)
            rolled = student.rollout(schedule, trial, keep=True)
            trials.append((student.score(rolled), trial, rolled))
        found, trial, rolled = min(trials, key=lambda t: t[0])
        if not found < score - BETTER:
            break
        score, best, base = found, trial, rolled
    return best, score


def step_for(dtype: torch.dtype) -> float:
    """Step of finite differences for values of a type: in half precision smaller ones drown in rounding."""
    return max(STEP, math.sqrt(torch.finfo(dtype).eps))


def refinement_cost(student: Student, schedule: Schedule, coefficients: Coefficients) -> float:
    """Units that one round of ``refine`` takes; 0 if there is nothing to refine."""
    count = len(schedule.loads)
    rest = [sum(student.cost(loads) for loads in schedule.loads[i:]) / count for i in range(count)]
    partial = sum(rest[step] for step, _, _ in free_directions(coefficients))
    return partial + (1 + len(DAMPING)) * rest[0] if partial else 0.0
