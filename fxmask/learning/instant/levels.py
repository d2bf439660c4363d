"""Reused branches or stages instead of forecasts of the whole output, where they serve a sampler better.

With injected noise the output of a step depends on noise that no earlier output knows of, while what deep blocks compute
changes slowly. How well they are reused is seen at single full steps: from the blocks' values at the full step before, a step
that reuses them costs a small share of a call, and the truth is there. Steps in between are estimated by how the output itself
changed over as long a time in the recorded run:

    square error of reuse at step i, from step j  ~  c(i) * square error of the output at i, forecast from j alone
    square error of final samples                 ~  sum over formed steps of (weight[i])^2 * square error at step i

``c`` comes from a call in use (``fxmask.runtime.trial``: no further call of the denoiser), or from a few further calls on a
recorded run (``probed``), where nothing is in use yet. The weights are those of the sampler with a denoiser in it that follows
its sample, see ``gains_of``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fxmask.errors import OutcomeError
from fxmask.ir.combine import root_mean_square
from fxmask.ir.forecast import INPUT, Forecast, Source
from fxmask.ir.mask import Mask
from fxmask.ir.outputs import sampled_part
from fxmask.ir.program import Program
from fxmask.ir.trial import Trial
from fxmask.learning.costs import StepCosts
from fxmask.learning.instant.checks import lanes_of
from fxmask.learning.instant.fitting import Rule, fitted, read_by, solve, spaced
from fxmask.learning.instant.moments import Moments
from fxmask.learning.instant.plans import InstantLearner, InstantPlan, count_of_full_steps, output_of
from fxmask.learning.instant.response import gains_of, response_of
from fxmask.learning.levels import named_levels
from fxmask.learning.outcome import Outcome
from fxmask.learning.schedule import Terms
from fxmask.learning.student import tensors_of
from fxmask.passes.cut_graph import CutGraph, cut_graph
from fxmask.sampling.sampler import Call, Sampler

MOST = 4  # levels that are compared with the whole output, the cheapest for the step
SHARE = 0.5  # of the budget that a step with reused blocks may cost
PROBED = 6  # full steps of a recorded run whose values are computed again
OPTIMISM = 3.0  # square error of forecasts on other images, beside that on the one they were fitted on: measured, 1.6 to 4
# Share of full steps, above which these are not at equal distances: measured, a denser beginning is 2 to 10 dB better then.
FREQUENT = 0.6
OUTPUT = "output"

Squares = Mapping[str, Mapping[tuple[int, int], float]]
"""By name of what is reused, or ``OUTPUT`` for forecasts, and by (step, full step before it): mean square errors."""


@dataclass(frozen=True)
class Reuse:
    """Blocks that are reused as they are between full steps.

    Attributes:
        name: for reports: ``"branches"``, or a stage's.
        loads: names of the blocks.
        share: what a step costs that reuses them, as a share of a full one.
    """

    name: str
    loads: frozenset[str]
    share: float


@dataclass(frozen=True)
class ReusePlan:
    """Full steps, and what is reused in between.

    Attributes:
        reuse: the blocks.
        like: the plan of forecasts with as many full steps, by which it is estimated.
        computed: full steps.
        error: estimated relative L2 error of the final samples.
    """

    reuse: Reuse
    like: InstantPlan
    computed: tuple[int, ...]
    error: float

    def as_forecasts(self, moments: Moments) -> InstantPlan:
        """Forecasts between the same full steps with the same error: what checks of these are fitted for."""
        terms = fitted(moments, self.like.rule, self.computed)
        return replace(self.like, computed=self.computed, terms=terms, error=self.error)

    def mask(self, program: Program, run: Sampler, facts: Mapping[str, object] | None) -> Mask:
        """As a mask of a program, for the timesteps of ``run``."""
        names = tuple(block.name for block in program.blocks if block.name in self.reuse.loads)
        rows = torch.tensor([[i in self.computed] * len(names) for i in range(run.num_steps)])
        return Mask(rows, run.timesteps, names, None, program.fingerprint, facts)


def reuses_of(program: Program, outcome: Outcome, prices: Mapping[str, float] | None = None) -> list[Reuse]:
    """What is worth comparing with forecasts of the whole output, for an outcome."""
    budget = outcome.budget if outcome.max_error is None else 0.5
    costs = StepCosts(program, prices)
    named = named_levels(program, costs.cost, costs.computed)
    found = [Reuse(name, loads, costs.cost(loads)) for loads, name in named.items() if name != OUTPUT]
    return sorted((r for r in found if r.share <= SHARE * budget), key=lambda r: r.share)[:MOST]


class ReuseErrors:
    """Errors of reused blocks and of forecasts on one scale.

    Args:
        learner: of the recorded runs.
        squares: what was measured.
        fresh: whether it was measured on other images than those that forecasts are fitted on.
    """

    def __init__(self, learner: InstantLearner, squares: Squares, fresh: bool) -> None:
        run = learner.runs[-1]
        self.learner = learner
        self.moments = learner.moments
        self.weights = response_of(run, gains=gains_of(run)).weights.square().numpy()
        self._base = _from_one(self.moments)
        self._factors = {
            name: self._factor(found, learner.scale) for name, found in squares.items() if name != OUTPUT and found
        }
        self._optimism = 1.0 + (OPTIMISM - 1.0) / sum(r.batch_size for r in learner.runs)
        if fresh and squares.get(OUTPUT):
            self._optimism = self._seen_optimism(squares[OUTPUT], learner.scale)

    def _factor(self, found: Mapping[tuple[int, int], float], scale: float) -> np.ndarray:
        """c ``[T]``: interpolated between the steps where it was measured, in logarithms."""
        steps = sorted(found)
        values = [math.log(max(found[i, j], 1e-30) / (scale * self._base[i, j])) for i, j in steps]
        factors: np.ndarray = np.exp(np.interp(np.arange(self.learner.steps), [i for i, _ in steps], values))
        return factors

    def _seen_optimism(self, found: Mapping[tuple[int, int], float], scale: float) -> float:
        """How much worse forecasts were than on the images that they were fitted on."""
        logs = [math.log(max(value, 1e-30) / (scale * self._base[i, j])) for (i, j), value in found.items()]
        return max(1.0, math.exp(sum(logs) / len(logs)))

    @property
    def names(self) -> list[str]:
        """Of what was measured."""
        return list(self._factors)

    def of_forecasts(self, plan: InstantPlan) -> float:
        """Weighted square error of a plan of forecasts."""
        squares = (self.weights[i] * _square_error(self.moments, i, *terms) for i, terms in plan.terms.items())
        return float(sum(squares)) * self._optimism

    def of_reuse(self, name: str, computed: Sequence[int]) -> float:
        """Weighted square error of reused blocks between full steps."""
        total, latest = 0.0, 0
        for step in range(self.learner.steps):
            if step in computed:
                latest = step
            else:
                total += self.weights[step] * self._factors[name][step] * self._base[step, latest]
        return total


def _from_one(moments: Moments) -> np.ndarray:
    """``[T, T]``: square error of the output at step i forecast from that at step j < i alone, and their samples."""
    found = np.full((moments.steps, moments.steps), np.inf)
    for i in range(moments.steps):
        for j in range(i):
            found[i, j] = max(_square_error(moments, i, *_fitted_from(moments, i, j)), 1e-30)
    return found


def _fitted_from(moments: Moments, step: int, before: int) -> tuple[list[int], list[float]]:
    """What a forecast of a step's output from one earlier step reads, and with which coefficients."""
    rule = Rule(1, 2 if moments.has_samples else 0)
    read = read_by(rule, [before], step, moments.steps)
    return read, solve(moments.plain.numpy(), read, step, rule.ridge).tolist()


def _square_error(moments: Moments, step: int, read: Sequence[int], coefficients: Sequence[float]) -> float:
    """Of a forecast, on the runs of the moments."""
    deviation = torch.zeros(len(moments.plain), dtype=torch.float64)
    deviation[step] = -1.0
    deviation.index_add_(0, torch.tensor(read), torch.tensor(coefficients, dtype=torch.float64))
    return max(0.0, float(deviation @ moments.effective @ deviation))


def best_plan(
    learner: InstantLearner,
    outcome: Outcome,
    share: float,
    reuses: Sequence[Reuse] = (),
    errors: ReuseErrors | None = None,
    keeps: Callable[[InstantPlan | ReusePlan], bool] | None = None,
) -> InstantPlan | ReusePlan:
    """The plan for an outcome, forecasts of the whole output or reused blocks.

    Args:
        learner: of the recorded runs.
        outcome: what was asked for.
        share: what a step costs that forms the whole output, as a share of a full one.
        reuses: what may be reused.
        errors: of these.
        keeps: which plans may be taken.

    Raises:
        OutcomeError: see ``InstantLearner.best``.
    """
    found: list[InstantPlan | ReusePlan] = []
    reason: OutcomeError | None = None
    try:
        found.append(learner.best(outcome, share, keeps))
    except OutcomeError as error:
        reason = error
    for reuse in reuses if errors is not None else ():
        assert errors is not None
        plan = _reused(errors, outcome, reuse) if reuse.name in errors.names else None
        if plan is not None and (keeps is None or keeps(plan)):
            found.append(plan)
    if not found:
        raise reason if reason is not None else OutcomeError("nothing can be formed")
    if outcome.max_error is None:
        return min(found, key=lambda plan: plan.error)
    return min(found, key=lambda plan: cost_of(plan, share, learner.steps))


def cost_of(plan: InstantPlan | ReusePlan, share: float, steps: int) -> float:
    """What a plan costs, as a share of the full run."""
    formed = plan.reuse.share if isinstance(plan, ReusePlan) else share
    count = len(plan.computed)
    return (count + (steps - count) * formed) / steps


def _reused(errors: ReuseErrors, outcome: Outcome, reuse: Reuse) -> ReusePlan | None:
    """The plan that reuses some blocks, or ``None`` where it cannot meet the outcome."""
    learner, steps = errors.learner, errors.learner.steps

    def plan(count: int) -> ReusePlan:
        like = learner.plans(count)[0]
        bends = (1.35,) if count > FREQUENT * steps else (1.0, 1.35)
        tried = [like.computed, *(tuple(spaced(steps, count, bend, doubled=False)) for bend in bends)]
        square, computed = min((errors.of_reuse(reuse.name, c), c) for c in tried)
        ratio = square / max(errors.of_forecasts(like), 1e-30)
        return ReusePlan(reuse, like, computed, like.error * math.sqrt(ratio))

    if outcome.max_error is None:
        try:
            return plan(count_of_full_steps(steps, outcome.budget, reuse.share))
        except OutcomeError:
            return None
    low, high = 1, steps
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if plan(middle).error <= outcome.max_error else (middle + 1, high)
    return plan(low) if low < steps else None


# Measured in a call in use


def trial_of(
    program: Program, learner: InstantLearner, plan: InstantPlan, reuses: Sequence[Reuse]
) -> tuple[Mask, Trial] | None:
    """A mask that does what a plan does, and keeps what is reused from one full step to the next, to be compared there.

    ``None`` where there is nothing to compare. The values are kept by a blend that leaves them what they are.
    """
    run, steps, output = learner.runs[-1], learner.steps, output_of(program)
    usable = _together(program, reuses)
    pairs = list(zip(plan.computed, plan.computed[1:], strict=False))
    if not usable or len(pairs) < 2:
        return None
    reused = frozenset().union(*(r.loads for r in usable))
    names = tuple(block.name for block in program.blocks if block.name == output or block.name in reused)
    terms = dict(plan.coefficients(output, steps))
    rows = torch.ones(steps, len(names), dtype=torch.bool)
    rows[[i for i in range(steps) if i not in plan.computed], names.index(output)] = False
    for before, step in pairs:
        terms |= {(step, name): ((step, 1.0), (before, 0.0)) for name in names if name != output}
    mask = Mask(rows, run.timesteps, names, Forecast(terms), program.fingerprint, None)
    moments = learner.moments
    forecasts = {step: _from_before(moments, step, before) for before, step in pairs}
    return mask, Trial({r.name: r.loads for r in usable}, {b: a for a, b in pairs}, forecasts, _lanes(learner))


def _lanes(learner: InstantLearner) -> tuple[float, ...]:
    return lanes_of(learner.responses[-1].mixing) if len(learner.runs[-1].outputs[0]) == 1 else (1.0,)


def _from_before(moments: Moments, step: int, before: int) -> Terms:
    """The forecast of a step's prediction from the full step before alone."""
    steps, (read, coefficients) = moments.steps, _fitted_from(moments, step, before)
    sources: list[Source] = [j if j < steps else (INPUT, j - steps) for j in read]
    return tuple(zip(sources, coefficients, strict=True))


def _together(program: Program, reuses: Sequence[Reuse]) -> list[Reuse]:
    """Those that one mask can list: no two blocks that cut the same value."""
    taken: dict[str, str] = dict.fromkeys(program.block(output_of(program)).values, output_of(program))
    found = []
    for reuse in reuses:
        values = {value: name for name in reuse.loads for value in program.block(name).values}
        if all(taken.get(value, name) == name for value, name in values.items()):
            taken.update(values)
            found.append(reuse)
    return found


# Measured on a recorded run


@torch.no_grad()
def probed(program: Program, learner: InstantLearner, plan: InstantPlan, reuses: Sequence[Reuse]) -> Squares:
    """Square errors of reused blocks at the step after some full steps of a plan, and at the last one before the next.

    Takes ``PROBED`` calls of the denoiser on the last recorded run's images, and a small share of one for each comparison.
    """
    run, lanes = learner.runs[-1], _lanes(learner)
    gaps = [(a, b) for a, b in zip(plan.computed, [*plan.computed[1:], learner.steps], strict=True) if b - a > 1]
    count = min(PROBED, len(gaps))
    chosen = [gaps[round(k * (len(gaps) - 1) / max(1, count - 1))] for k in range(count)]
    whole = cut_graph(program, frozenset(), sorted(frozenset().union(*(reuse.loads for reuse in reuses))))
    graphs = {reuse.name: cut_graph(program, reuse.loads, ()) for reuse in reuses}
    found: dict[str, dict[tuple[int, int], float]] = {name: {} for name in graphs}
    for a, b in chosen:
        for lane in range(len(run.calls[a])):
            results = whole(tensors_of(program, run.calls[a][lane]), [])
            values = dict(zip(whole.store, results[whole.num_outputs :], strict=True))
            for i in dict.fromkeys((a + 1, b - 1)):
                for name, graph in graphs.items():
                    made = sampled_part(_made(program, graph, run.calls[i][lane], values), run.final)
                    difference = made - sampled_part(run.outputs[i][lane], run.final)
                    square = float(root_mean_square(difference, lanes).double().square().mean())
                    found[name][i, a] = found[name].get((i, a), 0.0) + square / len(run.calls[a])
    return found


def _made(program: Program, graph: CutGraph, call: Call, values: Mapping[tuple[str, int], torch.Tensor]) -> torch.Tensor:
    return graph(tensors_of(program, call), [values[key] for key in graph.load])[0]
