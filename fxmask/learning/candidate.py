"""Candidates and the plans that are made of them."""

from __future__ import annotations

from dataclasses import dataclass

from fxmask.ir.mask import Mask
from fxmask.learning.schedule import Coefficients, Schedule


@dataclass(frozen=True)
class Candidate:
    """A schedule and how good it is on the trajectories that it was made with.

    Attributes:
        schedule: what each step forms.
        coefficients: how.
        score: mean relative error of the final samples in dB, smaller is better.
    """

    schedule: Schedule
    coefficients: Coefficients
    score: float

    @property
    def is_refinable(self) -> bool:
        """Whether few blocks are forecast, so that there are few degrees of freedom for the cost of a step of each."""
        return len({name for (_, name), terms in self.coefficients.items() if len(terms) > 1}) <= MOST_REFINED


MOST_REFINED = 3


@dataclass(frozen=True)
class ParetoPoint:
    """One plan of several that were learned together.

    Attributes:
        mask: the plan's mask.
        mac_ratio: MACs of the full run over its MACs; with ``cost="latency"`` seconds over seconds, as measured by parts.
        error: relative L2 error of the final samples on held-out noise.
        decibels: the same as mean over images, in dB.
        kind: where the schedule came from, for reports.
        units: work for this plan, in full sampling runs, what is shared included once.
    """

    mask: Mask
    mac_ratio: float
    error: float
    decibels: float
    kind: str
    units: float
