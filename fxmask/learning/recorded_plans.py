"""Instant plans as candidates of a search.

Schedules are chosen on all recorded runs. Their coefficients come in closed form from any share of the runs, so that a plan can
be judged on images that it was not fitted on, and handed out with coefficients of all.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fxmask.errors import InputError, OutcomeError
from fxmask.ir.program import Program
from fxmask.learning.instant.fitting import fitted
from fxmask.learning.instant.moments import Moments
from fxmask.learning.instant.plans import InstantLearner, InstantPlan, count_of_full_steps, output_of
from fxmask.learning.schedule import Coefficients, Origin, Schedule, coefficients_from_data, coefficients_to_data
from fxmask.sampling.sampler import Sampler

logger = logging.getLogger(__name__)
MOST_RUNS = 16  # that plans are made of; more of them change little, and each is replayed for every plan


@dataclass(frozen=True)
class Fits:
    """Coefficients of one schedule in closed form, by the recorded runs that they come from.

    Attributes:
        learned: of those that are learned from.
        held_out: of those that are held out.
        everything: of both.
    """

    learned: Coefficients
    held_out: Coefficients
    everything: Coefficients

    def to_data(self) -> list[Any]:
        """As JSON."""
        return [coefficients_to_data(x) for x in (self.learned, self.held_out, self.everything)]

    @classmethod
    def from_data(cls, rows: Sequence[Any]) -> Fits:
        """From what ``to_data`` made."""
        return cls(*(coefficients_from_data(x) for x in rows))


class RecordedPlans:
    """Instant plans of some recorded runs.

    Args:
        program: the captured denoiser.
        learned: runs that are learned from, of all ranks.
        held_out: those that are held out.
    """

    def __init__(self, program: Program, learned: Sequence[Sampler], held_out: Sequence[Sampler]) -> None:
        self._program = program
        self._learned = list(learned)[:MOST_RUNS]
        self._held_out = list(held_out)[:MOST_RUNS]

    @functools.cached_property
    def _learner(self) -> InstantLearner | None:
        """Of all runs; ``None`` where outputs of lanes or steps differ in shape, or there is no output to forecast."""
        runs = (self._learned + self._held_out)[:MOST_RUNS]
        shapes = {output.shape[1:] for run in runs for lanes in run.outputs for output in lanes}
        try:
            output_of(self._program)
            return InstantLearner(runs, self._program) if len(shapes) == 1 else None
        except InputError as error:
            logger.info("no plans are made of recorded runs alone: %s", error)
            return None

    @functools.cached_property
    def _moments(self) -> tuple[Moments, Moments, Moments]:
        assert self._learner is not None
        made = self._learner
        return made.moments_of(self._learned), made.moments_of(self._held_out), made.moments

    def of_budget(self, budget: float, share: float, count: int) -> list[tuple[Schedule, Fits]]:
        """The likely best plans whose full steps come nearest to a budget, those just below it first.

        Args:
            budget: fraction of the full run's cost.
            share: what a formed step costs, as a share of a full one.
            count: how many plans for each number of full steps.
        """
        if self._learner is None:
            return []
        steps = self._learner.steps
        try:
            fewer = count_of_full_steps(steps, budget, share)
        except OutcomeError:
            return []
        nearest = min(steps, max(1, round((budget - share) / (1 - share) * steps)))
        return [
            self._fits(plan)
            for full in dict.fromkeys((fewer, nearest))
            if full < steps
            for plan in self._learner.plans(full)[:count]
        ]

    def _fits(self, plan: InstantPlan) -> tuple[Schedule, Fits]:
        assert self._learner is not None
        block, steps = output_of(self._program), self._learner.steps
        learned, held_out, everything = (
            replace(plan, terms=fitted(moments, plan.rule, plan.computed)).coefficients(block, steps)
            for moments in self._moments
        )
        return replace(plan.schedule(block, steps), origin=Origin.INSTANT), Fits(learned, held_out, everything)


def plans_to_data(plans: Sequence[tuple[Schedule, Fits]]) -> list[Any]:
    """Plans as JSON."""
    return [[[sorted(x) for x in s.loads], s.history, s.samples, s.origin.value, s.family, fits.to_data()] for s, fits in plans]


def plans_from_data(rows: Sequence[Any]) -> list[tuple[Schedule, Fits]]:
    """Plans from what ``plans_to_data`` made of them."""
    return [
        (
            Schedule(tuple(map(frozenset, loads)), history, samples, origin=Origin(origin), family=family),
            Fits.from_data(fits),
        )
        for loads, history, samples, origin, family, fits in rows
    ]
