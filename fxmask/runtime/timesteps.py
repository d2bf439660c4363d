"""Which step of a plan a timestep is, after the rounding of the types that it went through."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fxmask.ir.calls import BoundCall

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
        rounded = [ROUNDING[t] for t in types if t in ROUNDING and (t is types[0] or _fits(value, t))]
        if rounded and expected in self._near(value, max(rounded)):
            return expected
        found = self._near(value, 0.0)
        if not found:
            loose = [ROUNDING[t] for t in ROUNDING if t in types or _fits(value, t)]
            found = self._near(value, max(loose, default=0.0))
        if expected in found:
            return expected
        return min(found, key=lambda i: abs(self.timesteps[i] - value)) if found else None

    def tolerance(self, types: Sequence[torch.dtype]) -> float:
        """Relative error that a timestep in these types may have."""
        return max([COUNTDOWN, *(ROUNDING.get(t, 0.0) for t in types)])

    def _near(self, value: float, relative: float) -> list[int]:
        least = COUNTDOWN * self._scale
        return [i for i, t in enumerate(self.timesteps) if abs(t - value) <= relative * abs(t) + least]


def types_of(bound: BoundCall) -> list[torch.dtype]:
    """Types that the timestep of a call may have been rounded to: its own, and the sample's."""
    sample = bound.sample.dtype
    return [bound.timestep.dtype, sample] if isinstance(bound.timestep, torch.Tensor) else [torch.float64, sample]


def _fits(value: float, kind: torch.dtype) -> bool:
    """Whether a type holds this very number, so that it may have been rounded to it."""
    return math.ldexp(math.frexp(value)[0], BITS[kind]).is_integer()
