"""Candidates and the plans that are made of them."""

from __future__ import annotations

from dataclasses import dataclass

from fxmask.ir.mask import Mask
from fxmask.learning.recorded_plans import Fits
from fxmask.learning.schedule import Coefficients, Schedule


@dataclass(frozen=True)
class Candidate:
    """A schedule and how good it is on the trajectories that it was made with.

    Attributes:
        schedule: what each step forms.
        coefficients: how.
        score: mean relative error of the final samples in dB, smaller is better.
        fits: of an instant plan: its coefficients by the recorded runs that they come from.
        rounds: of refinement that the coefficients have had.
    """

    schedule: Schedule
    coefficients: Coefficients
    score: float
    fits: Fits | None = None
    rounds: int = 0

    @property
    def is_instant(self) -> bool:
        """Whether recorded runs alone gave all coefficients of the output."""
        return self.fits is not None and not self.rounds

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
        error: relative L2 error of the final samples on noise that the coefficients were not fitted on.
        decibels: the same as mean over images, in dB.
        kind: where the schedule came from, for reports.
        units: work for this plan, in full sampling runs, what is shared included once.
        fewer_steps: ``decibels`` of so many steps of the scheduler's own grid as cost the same, which no mask can express;
            ``None`` where it is not known: noise is injected, or the recorded runs cannot take another number of steps.
    """

    mask: Mask
    mac_ratio: float
    error: float
    decibels: float
    kind: str
    units: float
    fewer_steps: float | None = None
