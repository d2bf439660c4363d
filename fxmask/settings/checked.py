"""Checks of plans' full steps, in the form that the runtime takes."""

from __future__ import annotations

from collections.abc import Sequence

from fxmask.ir.mask import Mask
from fxmask.ir.program import Program
from fxmask.learning.instant.checks import fitted_checks, lanes_of
from fxmask.learning.instant.fitting import Rule, fitted
from fxmask.learning.instant.levels import ReusePlan
from fxmask.learning.instant.parts import PartsLearner, learner_of
from fxmask.learning.instant.plans import InstantLearner, InstantPlan
from fxmask.passes.rectify import rectify
from fxmask.runtime.checks import Check, Checks
from fxmask.sampling.sampler import Sampler


def checks_of(learner: InstantLearner | PartsLearner, plan: InstantPlan | ReusePlan, max_error: float | None) -> Checks | None:
    """Checks of a plan's full steps, for the runtime."""
    if isinstance(learner, PartsLearner):
        return _checks_of_parts(learner, plan, max_error) if isinstance(plan, InstantPlan) else None
    if isinstance(plan, ReusePlan):
        plan = plan.as_forecasts(learner.moments)
    found = fitted_checks(learner, plan)
    if not found:
        return None
    run = learner.runs[-1]
    alone = len(run.outputs[0]) == 1  # lanes that are called one by one are checked one by one
    lanes = lanes_of(learner.responses[-1].mixing) if alone else (1.0,)
    by_step = {c.step: Check(c.sources, c.coefficients, c.expected, c.share) for c in found}
    return Checks(by_step, plan.error, lanes, max_error)


def checks_of_mask(
    runs: Sequence[Sampler], program: Program, mask: Mask, error: float, max_error: float | None
) -> Checks | None:
    """Checks of the full steps of any mask: those of forecasts between the same full steps, with the mask's own error."""
    if mask.lanes:
        return None  # a forecast of one lane is not compared with what another would say
    plan = rectify(program, mask)
    computed = tuple(i for i, step in enumerate(plan.steps) if step.macs == plan.full_macs)
    learner = learner_of(list(runs), program)
    if len(computed) < 3 or len(computed) == len(plan.steps) or isinstance(learner, PartsLearner):
        return None
    terms = fitted(learner.moments, Rule(), computed)
    return checks_of(learner, InstantPlan(computed, Rule(), terms, placed=False, error=error), max_error)


def _checks_of_parts(learner: PartsLearner, plan: InstantPlan, max_error: float | None) -> Checks | None:
    """Those of the longest part: how lanes are combined differs between parts."""
    number, (first, _) = max(enumerate(learner.bounds), key=lambda pair: pair[1][1] - pair[1][0])
    found = checks_of(learner.learners[number], learner.part_of(plan, number), max_error)
    if found is None:
        return None
    by_step = {
        first + step: Check(tuple(first + j for j in c.sources), c.coefficients, c.expected, c.share)
        for step, c in found.by_step.items()
    }
    return Checks(by_step, plan.error, found.lanes, max_error)
