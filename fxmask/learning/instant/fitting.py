"""Coefficients of forecasts of the whole output in closed form, and where its full steps should be.

A *rule* says what a forecast may read; for a rule and a set of full steps everything follows from the moments: coefficients by
least squares shrunk towards plain reuse, and the error of the final samples by the sampler's response. Full steps are placed by
dynamic programming over the last two of them: what lies between two neighbours is formed from these and one more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fxmask.learning.instant.moments import Moments

# Of an error in the middle of a run, what is left after a full step has seen it: measured, 0.33 to 0.65 of it without guided
# clipping. The last steps have nobody after them.
FEEDBACK = 0.6
BENDS = (0.75, 1.0, 1.35, 1.8)  # 1: at equal distances; larger: denser at the beginning


@dataclass(frozen=True)
class Rule:
    """What a forecast of the whole output may read, and how far it is held back.

    Attributes:
        sources: fresh predictions, at most.
        samples: noisy samples, the present one first.
        ridge: how much it is shrunk towards the latest value, as a share of the sources' mean square.
    """

    sources: int = 3
    samples: int = 0
    ridge: float = 1e-5


def read_by(rule: Rule, computed: Sequence[int], step: int, steps: int) -> list[int]:
    """Indices of the values that a step's forecast reads, the latest prediction first.

    Args:
        rule: of the forecast.
        computed: full steps, in order.
        step: that is formed.
        steps: T; samples come after the T predictions.
    """
    earlier = [j for j in reversed(computed) if j < step]
    return [*earlier[: rule.sources], *(steps + j for j in [step, *earlier][: rule.samples])]


def solve(gram: np.ndarray, read: Sequence[int], step: int, ridge: float) -> np.ndarray:
    """Coefficients ``[n]`` of the values that are read, for the prediction of a step."""
    found: np.ndarray = _solve_all(gram, np.asarray(read)[None], np.asarray([step]), ridge)[0]
    return found


def _solve_all(gram: np.ndarray, read: np.ndarray, targets: np.ndarray, ridge: float) -> np.ndarray:
    """The same for several steps at once: coefficients ``[S, n]`` of ``read`` ``[S, n]`` for ``targets`` ``[S]``."""
    inner = gram[read[:, :, None], read[:, None, :]]
    identity = np.eye(read.shape[1])
    scale = ridge * np.trace(inner, axis1=1, axis2=2) / read.shape[1] + 1e-30
    right = gram[read, targets[:, None]] - inner[:, :, 0]
    moved: np.ndarray = np.linalg.solve(inner + scale[:, None, None] * identity, right[:, :, None])[:, :, 0]
    moved[:, 0] += 1.0
    return moved


def fitted(moments: Moments, rule: Rule, computed: Sequence[int]) -> dict[int, tuple[list[int], list[float]]]:
    """By formed step: what it reads and with which coefficients."""
    gram, steps = moments.plain.numpy(), moments.steps
    result = {}
    for step in sorted(set(range(steps)) - set(computed)):
        read = read_by(rule, computed, step, steps)
        result[step] = read, solve(gram, read, step, rule.ridge).tolist()
    return result


def heeded(step: int, terms: Mapping[int, object], steps: int) -> float:
    """How much of the error of a formed step is left in the end: full steps after it see it, and correct some of it."""
    return FEEDBACK if any(later not in terms for later in range(step + 1, steps)) else 1.0


def deviation_of(moments: Moments, terms: dict[int, tuple[list[int], list[float]]]) -> torch.Tensor:
    """Shares ``[V]`` of the values in the final samples' error, to first order."""
    total = torch.zeros(len(moments.plain), dtype=torch.float64)
    for step, (read, coefficients) in terms.items():
        weight = moments.weights[step] * heeded(step, terms, moments.steps)
        total[step] -= weight
        total.index_add_(0, torch.tensor(read), weight * torch.tensor(coefficients, dtype=torch.float64))
    return total


def spaced(steps: int, count: int, bend: float, doubled: bool = True) -> list[int]:
    """Full steps at equal distances, or bent.

    Args:
        steps: T.
        count: how many full steps.
        bend: 1: at equal distances; larger: denser at the beginning.
        doubled: the first two steps are among them where there are three or more: a forecast wants two values.
    """
    computed: list[int] = []
    for k in range(count):
        wanted = round((k / count) ** bend * steps)
        computed.append(min(max(wanted, computed[-1] + 1 if computed else 0), steps - count + k))
    if doubled and count > 2:
        computed = sorted({0, 1, *computed})
        while len(computed) > count:
            computed.remove(computed[len(computed) // 2])
    return computed


class Placement:
    """Where full steps are best, by a rule, on some moments. Exact for the sum of the errors between neighbours.

    Args:
        moments: of recorded runs.
        rule: of forecasts.
    """

    def __init__(self, moments: Moments, rule: Rule) -> None:
        self.steps = moments.steps
        self._costs = _costs_between(moments, rule)

    def best(self, count: int) -> list[int]:
        """So many full steps, the first among them."""
        steps = self.steps
        errors = np.full((steps + 1, steps), np.inf)  # [last but one, last]; the index T: there is none
        errors[steps, 0] = 0.0
        came = []
        for _ in range(count - 1):
            total = errors[:, :, None] + self._costs[:, :, :steps]
            came.append(total.argmin(axis=0))
            following = np.full_like(errors, np.inf)
            following[:steps] = total.min(axis=0)
            errors = following
        ends = errors + self._costs[:, :, steps]
        before, last = (int(x) for x in np.unravel_index(int(ends.argmin()), ends.shape))
        path = [last]
        for table in reversed(came):
            path.append(before)
            before, last = int(table[before, last]), before
        return sorted(path)


def _costs_between(moments: Moments, rule: Rule) -> np.ndarray:
    """``[T + 1, T, T + 1]``: error of the steps between full steps j and k when p was the one before j, as ``[p, j, k]``.

    Of a third source it is assumed that it lies as far before p as p before j. Deviations between j and k are added before they
    are squared: errors of neighbours add up.
    """
    steps, plain, effective = moments.steps, moments.plain.numpy(), moments.effective.numpy()
    weights = moments.weights.numpy()
    costs = np.full((steps + 1, steps, steps + 1), np.inf)
    for j in range(steps):
        for p in range(j) if j else (steps,):
            known = [j] if p == steps else _with_more_before(j, p, rule.sources)
            costs[p, j, j + 1] = 0.0
            rest = np.arange(j + 1, steps)
            if not len(rest):
                continue
            moved = np.zeros((len(rest), len(plain)))
            moved[np.arange(len(rest)), rest] = -weights[rest]
            read = np.tile(np.asarray(known[: rule.sources]), (len(rest), 1))
            if rule.samples:
                inputs = [rest, *(np.full(len(rest), x) for x in known)][: rule.samples]
                read = np.concatenate([read, steps + np.stack(inputs, axis=1)], axis=1)
            found = _solve_all(plain, read, rest, rule.ridge)
            np.put_along_axis(moved, read, weights[rest][:, None] * found + np.take_along_axis(moved, read, 1), 1)
            total = np.cumsum(moved, axis=0)
            costs[p, j, j + 2 :] = np.einsum("nv,vw,nw->n", total, effective, total, optimize=True)
            costs[p, j, j + 2 : steps] *= FEEDBACK**2
    return costs


def _with_more_before(j: int, p: int, sources: int) -> list[int]:
    known = [j, p]
    while len(known) < sources and known[-1] > 0:
        known.append(max(0, known[-1] - (j - p)))
    return known
