"""What a run in use is to find out: whether reused blocks would serve it better than forecasts of the whole output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fxmask.ir.forecast import Term


@dataclass(frozen=True)
class Trial:
    """What is compared at the full steps of a run.

    Attributes:
        levels: names of the blocks that are reused together, by a name for them.
        previous: by full step, the one before it, whose values it is given.
        forecasts: by full step, what a forecast of its prediction reads: earlier predictions and samples, with coefficients.
        lanes: how the rows of a call are combined for one image, see ``fxmask.ir.combine.root_mean_square``.
    """

    levels: Mapping[str, frozenset[str]]
    previous: Mapping[int, int]
    forecasts: Mapping[int, tuple[Term, ...]]
    lanes: tuple[float, ...] = (1.0,)
