"""Whether weights were written to, or put elsewhere.

All of them are looked at when a run begins, and in each step if they are few. Of many, that would take as long as the rest of a
step: some are looked at in each, others each time. What changes many weights (the strength of a LoRA, a merge) is seen in the
next step, a change of a single one within a few.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fxmask._torch import writes_to

FEW = 64  # weights that are all looked at in each step
PER_STEP = 16  # of more


class WeightsState(NamedTuple):
    """How weights are at one time, by the step (modulo their number) that they are looked at in.

    Attributes:
        writes: that were counted.
        places: addresses.
    """

    writes: list[int]
    places: list[list[int]]


class WeightWatch:
    """Watches weights.

    Args:
        weights: plain tensors or parameters.
        per_step: how many are looked at in each step, if they are more than ``few``.
        few: how many are all looked at.
    """

    def __init__(self, weights: Sequence[torch.Tensor], per_step: int = PER_STEP, few: int = FEW) -> None:
        self.weights = list({id(x): x for x in weights}.values())
        count = 1 if len(self.weights) <= few else -(-len(self.weights) // per_step)
        self._windows = [self.weights[k::count] for k in range(count)]
        self._counted = [[x for x in window if not x.is_inference()] for window in self._windows]

    def now(self) -> WeightsState:
        """How they are."""
        return WeightsState(list(map(writes_to, self._counted)), [[x.data_ptr() for x in window] for window in self._windows])

    def changed(self, before: WeightsState, step: int) -> bool:
        """Whether any of those that are looked at in this step was written to or put elsewhere."""
        k = step % len(self._windows)
        return writes_to(self._counted[k]) != before.writes[k] or self.moved(before, step)

    def moved(self, before: WeightsState, step: int) -> bool:
        """Whether any of them was put elsewhere."""
        k = step % len(self._windows)
        return [x.data_ptr() for x in self._windows[k]] != before.places[k]
