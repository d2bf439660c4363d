"""How predictions at full steps can be checked by a forecast of them, fitted on the same runs as a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fxmask.learning.instant.fitting import deviation_of, solve
from fxmask.learning.instant.moments import Moments
from fxmask.learning.instant.plans import InstantLearner, InstantPlan

SOURCES = 3  # earlier full steps that a check reads
RIDGE = 1e-3
NOTICED = 0.05  # share of the largest one, below which a row is none of an image's


@dataclass(frozen=True)
class FittedCheck:
    """The forecast of one full step's prediction from those of earlier full steps.

    Attributes:
        step: that is checked.
        sources: steps whose predictions are read, the latest first.
        coefficients: of these.
        expected: root mean square of the difference, lanes combined, on the recorded runs.
        share: part of the estimated square error of the final samples that comes from the steps formed right before.
    """

    step: int
    sources: tuple[int, ...]
    coefficients: tuple[float, ...]
    expected: float
    share: float


def fitted_checks(learner: InstantLearner, plan: InstantPlan) -> list[FittedCheck]:
    """Checks of every full step that comes after formed ones; the errors of the last formed steps count with the last check."""
    moments = learner.moments
    computed = list(plan.computed)
    runs = [range(a + 1, b) for a, b in zip(computed, [*computed[1:], moments.steps], strict=True)]
    shares = [moments.error(deviation_of(moments, {i: plan.terms[i] for i in run if i in plan.terms})) for run in runs]
    checked = [k for k in range(2, len(computed)) if len(runs[k - 1])] or list(range(2, len(computed)))
    result = []
    for n, k in enumerate(checked):
        own = shares[(checked[n - 1] if n else 0) : k] if n else shares[:k]
        share = sum(own) + (sum(shares[k:]) if n == len(checked) - 1 else 0.0)
        result.append(_check(moments, computed, k, share, learner.scale))
    total = sum(check.share for check in result)
    if total <= 0:
        return []
    return [FittedCheck(c.step, c.sources, c.coefficients, c.expected, c.share / total) for c in result]


def _check(moments: Moments, computed: Sequence[int], k: int, share: float, scale: float) -> FittedCheck:
    step, read = computed[k], list(reversed(computed[max(0, k - SOURCES) : k]))
    coefficients = solve(moments.plain.numpy(), read, step, RIDGE).tolist()
    deviation = torch.zeros(len(moments.plain), dtype=torch.float64)
    deviation[step] = 1.0
    deviation[read] -= torch.tensor(coefficients, dtype=torch.float64)
    square = float(deviation @ moments.effective @ deviation)
    return FittedCheck(step, tuple(read), tuple(coefficients), math.sqrt(max(square * scale, 1e-30)), share)


def lanes_of(mixing: torch.Tensor) -> tuple[float, ...]:
    """How the rows of a call are combined for one image, lane by lane.

    Args:
        mixing: float64 ``[rows, final rows]`` of the recorded call, see ``Response``. The rows of one lane follow each other.
    """
    column = mixing[:, 0]
    found = (column.abs() > NOTICED * column.abs().max()).nonzero().flatten().tolist()
    rows, lanes = len(column), len(found)
    if rows % lanes == 0 and found == list(range(0, rows, rows // lanes)):
        return tuple(float(column[k]) for k in found)
    return (float(column.norm()),)
