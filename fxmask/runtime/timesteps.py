"""Which step of a plan a timestep is, after the rounding of the types that it went through."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

# Largest relative error of a number after three roundings to a type: as it is made, scaled and cast.
ROUNDING = {torch.bfloat16: 3 * 2**-9, torch.float16: 3 * 2**-12}
BITS = {torch.bfloat16: 8, torch.float16: 11}  # of their significands
COUNTDOWN = 4e-6  # error of a float32 that was counted down, relative to where it began


class Timetable:
    """The timesteps of a plan.

    Args:
        timesteps: T floats, as they were recorded.
    """

    def __init__(self, timesteps: Sequence[float]) -> None:
        self.timesteps = tuple(timesteps)
        self._scale = max((abs(t) for t in timesteps), default=1.0)

    def step_of(self, value: float, types: Sequence[torch.dtype], expected: int | None) -> int | None:
        """The step at a timestep; ``None`` if there is none.

        Args:
            value: the timestep.
            types: what it may have been rounded to: its own type first, then the model's.
            expected: the step whose turn it is; it is preferred among those that rounding makes equal.
        """
        own = ROUNDING.get(types[0], 0.0) if types else 0.0
        if own and expected in self._near(value, own):
            return expected
        exact = self._near(value, 0.0)
        if not exact:
            loose = max([own, *(ROUNDING.get(t, 0.0) for t in types), *self._rounded_before(value)])
            exact = self._near(value, loose) if loose else []
        if expected in exact:
            return expected
        return min(exact, key=lambda i: abs(self.timesteps[i] - value)) if exact else None

    def tolerance(self, types: Sequence[torch.dtype]) -> float:
        """Relative error that a timestep in these types may have."""
        return max([COUNTDOWN, *(ROUNDING.get(t, 0.0) for t in types)])

    def _near(self, value: float, relative: float) -> list[int]:
        least = COUNTDOWN * self._scale
        return [i for i, t in enumerate(self.timesteps) if abs(t - value) <= relative * abs(t) + least]

    def _rounded_before(self, value: float) -> list[float]:
        """The types that hold this very number, so that it may have been rounded to them."""
        significand = math.frexp(value)[0]
        return [ROUNDING[t] for t, bits in BITS.items() if (significand * 2**bits).is_integer()]
