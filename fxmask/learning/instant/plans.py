"""Plans of forecasts of the whole output from recorded runs, the best first, each with an estimate of its error.

    moments --rules x placements--> screened by second moments --> replayed with the sampler --> ranked

Nothing here calls the denoiser: a replay gives the sampler the recorded predictions at full steps and what is formed of them at
the others. What the denoiser would have answered to the error is no more than a constant, see ``FEEDBACK``: mostly it corrects;
strong guidance may do the opposite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from fxmask.errors import InputError, OutcomeError
from fxmask.ir.forecast import INPUT, Forecast, Source
from fxmask.ir.mask import Mask
from fxmask.ir.outputs import sampled_part
from fxmask.ir.program import Program
from fxmask.learning.costs import StepCosts
from fxmask.learning.effort import Limits
from fxmask.learning.instant.fitting import BENDS, Placement, Rule, deviation_of, fitted, heeded, spaced
from fxmask.learning.instant.moments import FORGETTING, Moments, together
from fxmask.learning.instant.response import replayed, response_of
from fxmask.learning.outcome import TOLERANCE, Outcome
from fxmask.learning.schedule import Origin, Schedule, Terms
from fxmask.passes.rectify import rectify
from fxmask.sampling.sampler import Sampler

REPLAYED = 6  # plans that are replayed, of all that the moments screen
# dB: a placement by a single image must be better by so much than a regular one to be likely so on others, with a
# deterministic sampler and with one whose noise is another one for each image.
HANDICAP, STOCHASTIC_HANDICAP = 1.5, 2.5
# dB, likewise, of rules other than three predictions: four fit one image better and are less alike on others.
DOUBTS = {2: 1.0, 4: 1.5}
FEW = 16  # steps, below which all this counts more: what one image says of a single forecast is mostly chance
SAMPLES = 1.0  # dB, of noisy samples as sources with a deterministic sampler
RIDGES = (1e-5, 1e-3)
LONG = 200  # steps, from which on full steps are only spaced: placing them takes T^3
SMALLEST = 1e-15  # relative mean square error


class Planned(Protocol):
    """What can be made a mask of a program."""

    def mask(self, program: Program, run: Sampler, facts: Mapping[str, object] | None) -> Mask:
        """The mask, for the timesteps of ``run``."""
        ...


@dataclass(frozen=True)
class InstantPlan:
    """Full steps, and what each other step reads, of one number of full steps.

    Attributes:
        computed: full steps.
        rule: of the forecasts.
        terms: by formed step, indices into the values of ``Moments`` and coefficients.
        placed: whether full steps were placed by dynamic programming, rather than spaced.
        decibels: estimated mean over images of the final samples' relative square error, in dB; smaller is better.
        error: estimated relative L2 error of the final samples.
    """

    computed: tuple[int, ...]
    rule: Rule
    terms: Mapping[int, tuple[list[int], list[float]]]
    placed: bool
    decibels: float = math.nan
    error: float = math.nan

    def coefficients(self, block: str, steps: int) -> dict[tuple[int, str], Terms]:
        """By (step, block) what the forecasts of ``block`` read."""
        result: dict[tuple[int, str], Terms] = {}
        for step, (read, values) in self.terms.items():
            sources: list[Source] = [j if j < steps else (INPUT, j - steps) for j in read]
            result[step, block] = tuple(zip(sources, values, strict=True))
        return result

    def schedule(self, block: str, steps: int) -> Schedule:
        """The same for a learner that goes on from it."""
        loads = tuple(frozenset() if i in self.computed else frozenset([block]) for i in range(steps))
        origin = Origin.PLACED if self.placed else Origin.BENT
        return Schedule(loads, self.rule.sources, self.rule.samples, origin=origin, family="output")

    def mask(self, program: Program, run: Sampler, facts: Mapping[str, object] | None) -> Mask:
        """As a mask of a program, for the timesteps of ``run``."""
        block, steps = output_of(program), run.num_steps
        rows = torch.tensor([[i in self.computed] for i in range(steps)])
        terms = self.coefficients(block, steps)
        return Mask(rows, run.timesteps, (block,), Forecast(terms) if terms else None, program.fingerprint, facts)


class InstantLearner:
    """Fits plans on recorded runs of one sampler.

    Args:
        runs: recorded, of one sampler and number of steps.
        program: the captured denoiser; without it, it is taken that forecasts may read noisy samples.

    Attributes:
        runs: these.
        responses: of their samplers.

    Raises:
        InputError: there are none, or they do not belong together.
    """

    def __init__(self, runs: Sequence[Sampler], program: Program | None = None) -> None:
        if not runs:
            raise InputError("a plan needs at least one recorded run")
        if any(run.timesteps != runs[0].timesteps for run in runs):
            raise InputError("recorded runs have different timesteps; a plan is for one sequence of them")
        for run in runs:
            _refuse_changing(run)
        self.runs = list(runs)
        self.responses = [response_of(run) for run in runs]
        self._moments = [Moments.of(run, response) for run, response in zip(runs, self.responses, strict=True)]
        self._reads_samples = self._moments[0].has_samples and (program is None or reads_samples(program))
        self._placements: dict[Rule, Placement] = {}
        self._plans: dict[int, list[InstantPlan]] = {}

    @property
    def steps(self) -> int:
        """T."""
        return self.runs[0].num_steps

    @property
    def scale(self) -> float:
        """Mean square of the final samples, of which the moments are shares."""
        return sum(m.scale for m in self._moments) / len(self._moments)

    @property
    def moments(self) -> Moments:
        """Of all runs."""
        return together(self._moments, FORGETTING)

    def moments_of(self, runs: Sequence[Sampler]) -> Moments:
        """Of some runs, measured now where they are not among its own."""
        known = {id(run): moments for run, moments in zip(self.runs, self._moments, strict=True)}
        return together([known[id(run)] if id(run) in known else Moments.of(run) for run in runs], FORGETTING)

    def rules(self, simplest: bool = False) -> list[Rule]:
        """What forecasts may read here; also the latest prediction alone, if the ``simplest`` step graphs are wanted."""
        samples = (0, 2) if self._reads_samples else (0,)
        found = [Rule(sources, s, ridge) for sources in (2, 3, 4) for s in samples for ridge in RIDGES]
        return [*found, Rule(1)] if simplest else found

    def plans(self, count: int, keeps: Callable[[InstantPlan], bool] | None = None) -> list[InstantPlan]:
        """Plans of ``count`` full steps, the one that is likely to be best first.

        With several runs every plan's error is estimated on each run with coefficients of the others.

        Args:
            count: how many steps compute everything, 1 to T.
            keeps: which plans may be taken.
        """
        if keeps is not None:
            return self._tried(count, keeps)
        if count not in self._plans:
            self._plans[count] = self._tried(count, None)
        return self._plans[count]

    def _tried(self, count: int, keeps: Callable[[InstantPlan], bool] | None) -> list[InstantPlan]:
        if count >= self.steps:
            return [InstantPlan(tuple(range(self.steps)), Rule(), {}, False, 10 * math.log10(SMALLEST), 0.0)]
        moments, screened = self.moments, []
        for rule in self.rules(simplest=keeps is not None):
            tried = [(spaced(self.steps, count, bend), False) for bend in BENDS]
            if self.steps <= LONG:
                tried.append((self.placement(replace(rule, sources=3)).best(count), True))
            for computed, placed in tried:
                terms = fitted(moments, rule, computed)
                error = moments.error(deviation_of(moments, terms))
                screened.append((error, InstantPlan(tuple(computed), rule, terms, placed)))
        screened = [(error, plan) for error, plan in screened if keeps is None or keeps(plan)]
        screened.sort(key=lambda pair: pair[0])
        chosen: list[InstantPlan] = []
        for regular in (False, True):  # the best few of both kinds
            chosen += [plan for _, plan in screened if plan.placed is regular][:REPLAYED]
        judged = [self._judged(plan) for plan in _distinct(chosen)]
        stochastic = self.runs[0].stochastic
        handicap = STOCHASTIC_HANDICAP if stochastic else HANDICAP
        doubt: float = max(1.0, FEW / self.steps) ** 1.5 / math.sqrt(sum(run.batch_size for run in self.runs))

        def likely(plan: InstantPlan) -> float:
            other: float = DOUBTS.get(plan.rule.sources, 0.0) + (0.0 if stochastic or not plan.rule.samples else SAMPLES)
            return plan.decibels + doubt * (handicap * plan.placed + other)

        return sorted(judged, key=likely)

    def placement(self, rule: Rule) -> Placement:
        """Where full steps are best by a rule."""
        if rule not in self._placements:
            self._placements[rule] = Placement(self.moments, rule)
        return self._placements[rule]

    def _judged(self, plan: InstantPlan) -> InstantPlan:
        """The plan with its errors estimated by replays."""
        errors = []
        for n, run in enumerate(self.runs):
            terms = plan.terms
            if len(self.runs) > 1:
                others = together([m for k, m in enumerate(self._moments) if k != n])
                terms = fitted(others, plan.rule, plan.computed)
            errors.append(replayed_errors(run, terms))
        found = torch.cat(errors).clamp_min(SMALLEST)
        return replace(plan, decibels=float(10 * found.log10().mean()), error=float(found.mean().sqrt()))

    def best(self, outcome: Outcome, share: float, keeps: Callable[[InstantPlan], bool] | None = None) -> InstantPlan:
        """The plan for an outcome.

        Args:
            outcome: what was asked for.
            share: what a formed step costs, as a share of a full one.
            keeps: which plans may be taken.

        Raises:
            OutcomeError: the budget cannot be met by forming whole steps; says what is the least.
        """
        if outcome.max_error is not None:
            return self._within(outcome.max_error, keeps)
        plans = self.plans(count_of_full_steps(self.steps, outcome.budget, share), keeps)
        if not plans:
            raise OutcomeError(
                f"macs={outcome.budget:.4g} (speedup={1 / outcome.budget:.4g}) cannot be met within {TOLERANCE:.0%} by "
                "forecasts of the whole output within these limits; allow more graphs or cache, or take effort='quick'"
            )
        return plans[0]

    def _within(self, max_error: float, keeps: Callable[[InstantPlan], bool] | None) -> InstantPlan:
        """The plan with fewest full steps whose estimated error is at most so much, by bisection."""
        low, high = 1, self.steps
        best = self.plans(self.steps)[0]
        while low < high:
            middle = (low + high) // 2
            plan = next((p for p in self.plans(middle, keeps) if p.error <= max_error), None)
            if plan is None:
                low = middle + 1
            else:
                best, high = plan, middle
        return best


def count_of_full_steps(steps: int, budget: float, share: float) -> int:
    """Most full steps within a fraction of the full run's cost, when a formed step costs ``share`` of a full one.

    Raises:
        OutcomeError: not even one is.
    """
    count = math.floor((budget * (1 + TOLERANCE) - share) / (1 - share) * steps + 1e-9) if share < 1 else 0
    least = (1 + (steps - 1) * share) / steps
    if count < 1:
        raise OutcomeError(
            f"speedup={1 / budget:.4g} (macs={budget:.4g}) is out of reach: when only the first of {steps} steps computes "
            f"everything, speedup={1 / least:.4g} (macs={least:.4g}) is the most. Ask for less, or take more steps"
        )
    return min(count, steps)


def output_of(program: Program) -> str:
    """Name of the block that is the whole output.

    Raises:
        InputError: there is none.
    """
    name = next((block.name for block in program.blocks if block.kind == "output"), None)
    if name is None:
        raise InputError(
            f"{type(program.model).__name__} has no block that is its whole output, which effort='instant' forecasts; "
            "take effort='quick'"
        )
    return name


def reads_samples(program: Program) -> bool:
    """Whether the whole output is one value like the sample, so that a forecast of it may read samples."""
    block = program.block(output_of(program))
    value, sample = (program.node(b.values[0]).meta["val"] for b in (block, program.input_block))
    return len(block.values) == 1 and value.shape == sample.shape and value.dtype == sample.dtype


def formed_share(program: Program, prices: Mapping[str, float] | None = None) -> float:
    """What a step costs that forms the whole output, as a share of a full step.

    Args:
        program: the captured denoiser.
        prices: what each node costs a step, if not its multiply-accumulates.
    """
    return StepCosts(program, prices).cost(frozenset([output_of(program)]))


def keeper(program: Program, run: Sampler, limits: Limits) -> Callable[[Planned], bool] | None:
    """Which plans keep to bounds of graphs and cached bytes; ``None`` if all do."""
    if limits == Limits():
        return None
    return lambda plan: limits.keeps(rectify(program, plan.mask(program, run, None)))


@torch.no_grad()
def replayed_errors(run: Sampler, terms: Mapping[int, tuple[list[int], list[float]]]) -> torch.Tensor:
    """Relative square errors float64 ``[B]`` of the final samples when recorded predictions are formed by ``terms``."""
    outputs = []
    for i, lane in run.order:
        known = run.outputs[i][lane]
        if i not in terms:
            outputs.append(known)
            continue
        total = torch.zeros_like(known, dtype=torch.float32 if known.dtype.itemsize < 4 else known.dtype)
        for j, c in zip(*terms[i], strict=True):
            value = run.outputs[j][lane] if j < run.num_steps else run.calls[j - run.num_steps][lane][run.sample]
            if value.shape != known.shape:
                value = sampled_part(value, known)
            total += c * value
        share = heeded(i, terms, run.num_steps)
        outputs.append((known + share * (total - known)).to(known.dtype))
    return relative_squares(replayed(run, outputs), run)


def relative_squares(final: torch.Tensor, run: Sampler) -> torch.Tensor:
    """Square errors float64 ``[B]`` of final samples, relative to the mean square of the run's own."""
    squares = (final.double() - run.final.double()).square().flatten(1).mean(dim=1).cpu()
    return squares / run.final.double().square().mean().cpu().clamp_min(1e-30)


def _refuse_changing(run: Sampler) -> None:
    """Refuse a run whose predictions change their form midway.

    Raises:
        InputError: says at which step.
    """
    first = [tuple(x.shape) for x in run.outputs[0]]
    for step, outputs in enumerate(run.outputs):
        shapes = [tuple(x.shape) for x in outputs]
        if shapes != first:
            raise InputError(
                f"the predictions at step {step} have shapes {shapes}, before that {first}: guidance starts or stops midway, "
                "and forecasts of the whole output cannot go over that. Let it last to the last step"
            )


def _distinct(plans: Sequence[InstantPlan]) -> list[InstantPlan]:
    seen: dict[tuple[tuple[int, ...], Rule], InstantPlan] = {}
    for plan in plans:
        seen.setdefault((plan.computed, plan.rule), plan)
    return list(seen.values())
