"""Whether weights were written to, or put elsewhere.

A write in place is counted by the tensor, and every count is looked at every time. Where a tensor lies is looked at for all of
them when a run begins, and for some of them, others each time, in each step: moving a weight in the middle of a run is rare,
and looking takes as long again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fxmask._torch import writes_to

PER_STEP = 16  # weights whose place is looked at in each step


class WeightsState(NamedTuple):
    """How weights are at one time.

    Attributes:
        writes: all that were counted.
        places: addresses, by the step (modulo their number) that they are looked at in.
    """

    writes: int
    places: list[list[int]]


class WeightWatch:
    """Watches weights.

    Args:
        weights: plain tensors or parameters.
    """

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        self.weights = list({id(x): x for x in weights}.values())
        self._counted = [x for x in self.weights if not x.is_inference()]
        count = max(1, -(-len(self.weights) // PER_STEP))
        self._windows = [self.weights[k::count] for k in range(count)]

    def now(self) -> WeightsState:
        """How they are."""
        return WeightsState(writes_to(self._counted), [[x.data_ptr() for x in window] for window in self._windows])

    def changed(self, before: WeightsState, step: int) -> bool:
        """Whether any was written to, or one of those that are looked at in this step was put elsewhere."""
        k = step % len(self._windows)
        return writes_to(self._counted) != before.writes or [x.data_ptr() for x in self._windows[k]] != before.places[k]

    def moved(self, before: WeightsState, step: int) -> bool:
        """Whether one of those that are looked at in this step was put elsewhere."""
        k = step % len(self._windows)
        return [x.data_ptr() for x in self._windows[k]] != before.places[k]
