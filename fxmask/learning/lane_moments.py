"""Second moments of recorded predictions lane by lane: where calls of each lane should be computed, before anything is run.

As ``instant.moments``, but every call is a value of its own, so that a forecast may read another lane, and errors of lanes are
added as guidance adds them: with predictions ``e_l`` of the lanes combined as ``sum_l m_l e_l``,

    error = sum over stretches between steps that compute all lanes of  || sum_i w_i sum_l m_l (formed_il - e_il) ||^2
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fxmask.ir.calls import moving_part
from fxmask.ir.forecast import Source
from fxmask.learning.fit import RIDGE
from fxmask.learning.instant.fitting import FEEDBACK
from fxmask.learning.instant.response import replayed, response_of
from fxmask.sampling.sampler import Sampler

Rows = tuple[bool, ...]  # by call, whether it is computed
TRIES = 1500  # schedules that are screened from each start
SMALL = 1e-3  # of the root mean square of a prediction: where samplers clip, larger steps tell of the clipping
SEEN = 1.0  # the same in half precision, in which smaller steps are lost


@dataclass(frozen=True)
class LaneMoments:
    """Moments of C calls and T samples, or of calls alone.

    Attributes:
        lanes: L.
        gram: float64 ``[C + T, C + T]``, of the predictions of all calls and the noisy samples.
        weights: float64 ``[C]``, how much an error of each call's prediction moves the final samples, with its sign.
    """

    lanes: int
    gram: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, views: Sequence[Sampler]) -> LaneMoments:
        """Those of some runs with a call for every lane, of samples only if they have the predictions' shape."""
        grams, weights = [], []
        for view in views:
            values = [x for step in view.outputs for x in step]
            samples = [moving_part(step[0][view.sample], values[0].shape) for step in view.calls]
            values += [x for x in samples if x.shape == values[0].shape]
            flat = torch.stack([x.flatten().to(torch.float32) for x in values]).double()
            grams.append(flat @ flat.T / view.final.double().square().sum().clamp_min(1e-30).cpu())
            weights.append(_weights(view))
        return cls(len(views[0].calls[0]), torch.stack(grams).mean(0).cpu().numpy(), np.mean(weights, axis=0))

    def error(self, rows: Rows, sources: Callable[[Rows, int], Sequence[int]]) -> float:
        """Estimated mean square error of the final samples.

        Args:
            rows: by call, whether it is computed.
            sources: the values that a call which is not computed reads.
        """
        total, moved = 0.0, np.zeros(len(self.gram))
        for first in range(0, len(rows), self.lanes):
            formed = [r for r in range(first, first + self.lanes) if not rows[r]]
            if not formed and moved.any():
                total += FEEDBACK**2 * float(moved @ self.gram @ moved)
                moved = np.zeros(len(self.gram))
            for r in formed:
                read = np.asarray(sources(rows, r))
                np.add.at(moved, read, self.weights[r] * self._solved(read, r))
                moved[r] -= self.weights[r]
        return total + float(moved @ self.gram @ moved)

    def _solved(self, read: np.ndarray, target: int) -> np.ndarray:
        """Ridge least squares, shrunk towards the first value that is read."""
        inner = self.gram[np.ix_(read, read)]
        ridge = RIDGE * np.trace(inner) / len(read) + 1e-30
        found: np.ndarray = np.linalg.solve(inner + ridge * np.eye(len(read)), self.gram[read, target] - inner[:, 0])
        found[0] += 1.0
        return found

    def improved(
        self, rows: Rows, sources: Callable[[Rows, int], Sequence[int]], seed: int, tries: int = TRIES
    ) -> tuple[float, Rows]:
        """Local search: a computed call and a formed one exchange what they do, as long as the error is smaller for it."""
        rng, best, error = random.Random(seed), rows, self.error(rows, sources)
        for _ in range(tries):
            computed = [r for r in range(1, len(rows)) if best[r]]
            formed = [r for r in range(1, len(rows)) if not best[r]]
            if not computed or not formed:
                break
            i, j = rng.choice(computed), rng.choice(formed)
            trial = tuple(not on if r in (i, j) else on for r, on in enumerate(best))
            found = self.error(trial, sources)
            if found < error:
                best, error = trial, found
        return error, best


def _weights(view: Sampler) -> np.ndarray:
    """How much each call's prediction moves the final samples: the step's weight, and the lane's share in guidance."""
    of_lanes = shares(view)
    return np.asarray([float(w) * share for w in response_of(view).weights for share in of_lanes])


def shares(view: Sampler) -> tuple[float, ...]:
    """With what factors guidance adds predictions of the lanes, by replays in which those of one step are nudged alike.

    With guidance at 4 these are -3 and 4, up to a factor. Where a nudge of all lanes moves nothing, they count alike.
    """
    lanes, step = len(view.calls[0]), (3 * view.num_steps) // 4
    generator = torch.Generator().manual_seed(0)
    shape = view.outputs[step][0].shape
    nudge = torch.randn(shape, generator=generator).to(view.outputs[step][0])
    step_size = SMALL if nudge.dtype in (torch.float32, torch.float64) else SEEN
    nudge *= step_size * view.outputs[step][0].float().square().mean().sqrt().to(nudge)
    moved = []
    for lane in range(lanes):
        outputs = [x + nudge if at == (step, lane) else x for at, x in zip(view.order, _flat(view), strict=True)]
        moved.append((replayed(view, outputs).double() - view.final.double()).flatten().cpu())
    whole = torch.stack(moved).sum(dim=0)
    size = float(whole @ whole)
    factors = tuple(float(x @ whole) / size if size else 1.0 for x in moved)
    return factors if all(map(math.isfinite, factors)) else (1.0,) * lanes


def _flat(view: Sampler) -> list[torch.Tensor]:
    return [x for step in view.outputs for x in step]


def indices(sources: Sequence[Source], calls: int, lanes: int) -> list[int]:
    """Values of ``LaneMoments`` that sources of the whole output stand for; the sample of a step is one for all lanes."""
    return [source if isinstance(source, int) else calls + source[1] // lanes for source in sources]
