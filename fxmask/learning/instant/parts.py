"""Plans of runs whose steps are not alike: guidance that starts or stops midway, two denoisers one after the other.

A run is taken apart where the form of its predictions changes. In each part forecasts read that part alone, and its first step
is a full one; how many full steps each part has is chosen for all of them together, by their errors in the final samples.

    run --forms--> parts --moments--> error of each part by its number of full steps --counts--> one plan each --> one plan
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from fxmask.errors import InputError, OutcomeError
from fxmask.ir.program import Program
from fxmask.learning.instant.fitting import Rule, deviation_of, fitted, spaced
from fxmask.learning.instant.plans import LONG, SMALLEST, InstantLearner, InstantPlan
from fxmask.learning.outcome import TOLERANCE, Outcome
from fxmask.sampling.sampler import Call, Loop, Sampler

BISECTIONS = 8  # of the budget for an error


@dataclass(frozen=True, eq=False)
class RunPart:
    """Some steps of a recorded run, as a run of their own; at the others its own predictions stand.

    Attributes:
        run: the whole.
        first: its first step here.
        end: after the last one.
    """

    run: Sampler
    first: int
    end: int

    @property
    def calls(self) -> Sequence[Sequence[Call]]:
        """Of these steps."""
        return self.run.calls[self.first : self.end]

    @property
    def outputs(self) -> Sequence[Sequence[torch.Tensor]]:
        """Of these steps."""
        return self.run.outputs[self.first : self.end]

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Of these steps."""
        return self.run.timesteps[self.first : self.end]

    @property
    def initial_noise(self) -> torch.Tensor:
        """Of the whole run."""
        return self.run.initial_noise

    @property
    def final(self) -> torch.Tensor:
        """Of the whole run."""
        return self.run.final

    @property
    def sample(self) -> str:
        """Name of the denoiser's sample argument."""
        return self.run.sample

    @property
    def num_steps(self) -> int:
        """How many these are."""
        return self.end - self.first

    @property
    def order(self) -> tuple[tuple[int, int], ...]:
        """(step, lane) of the calls of these steps."""
        return tuple((i - self.first, lane) for i, lane in self.run.order if self.first <= i < self.end)

    @property
    def stochastic(self) -> bool:
        """Whether the sampler injects noise."""
        return self.run.stochastic

    @property
    def batch_size(self) -> int:
        """B."""
        return self.run.batch_size

    def loop(self) -> Loop:
        """The sampler; yields the calls of these steps only."""
        return self._between(self.run.loop())

    def idle_loop(self) -> Loop:
        """The same for whoever does not read the calls."""
        return self._between(getattr(self.run, "idle_loop", self.run.loop)())

    def _between(self, whole: Loop) -> Loop:
        try:
            call = next(whole)
            for i, lane in self.run.order:
                inside = self.first <= i < self.end
                call = whole.send((yield call) if inside else self.run.outputs[i][lane])
        except StopIteration as end:
            final: torch.Tensor = end.value
            return final
        finally:
            whole.close()
        raise AssertionError("a recorded run has as many calls as predictions")

    def renoised(self, model: torch.nn.Module, seed: int) -> RunPart:
        """The same steps with other noise."""
        return RunPart(self.run.renoised(model, seed), self.first, self.end)

    def rollout(self, denoiser: Callable[..., object]) -> torch.Tensor:
        """The final samples with another denoiser at these steps."""
        loop = self.loop()
        try:
            call = next(loop)
            while True:
                made = denoiser(**call)
                call = loop.send(made if isinstance(made, torch.Tensor) else made[0])  # type: ignore[index]
        except StopIteration as end:
            final: torch.Tensor = end.value
            return final


def parts_of(run: Sampler) -> list[tuple[int, int]]:
    """First step and end of each part of a run in which predictions keep their form."""
    forms = [tuple(tuple(x.shape) for x in outputs) for outputs in run.outputs]
    starts = [i for i in range(len(forms)) if i == 0 or forms[i] != forms[i - 1]]
    return list(zip(starts, [*starts[1:], len(forms)], strict=True))


def learner_of(runs: Sequence[Sampler], program: Program | None = None) -> InstantLearner | PartsLearner:
    """What fits plans on recorded runs of one setting.

    Raises:
        InputError: there are none, or they do not belong together.
    """
    if runs and all(len(parts_of(run)) > 1 for run in runs):
        return PartsLearner(runs, program)
    return InstantLearner(runs, program)


@dataclass(frozen=True)
class Piece:
    """Steps that are alike, of one denoiser.

    Attributes:
        learner: of these steps.
        cost: of a full step.
        share: what a formed step costs, as a share of a full one.
    """

    learner: InstantLearner
    cost: float
    share: float

    @property
    def steps(self) -> int:
        """How many there are."""
        return self.learner.steps

    def spent(self, count: int) -> float:
        """With so many full steps."""
        return self.cost * (count + (self.steps - count) * self.share)

    def errors(self) -> list[float]:
        """Relative square error of the final samples by number of full steps, from 1 to all, as second moments tell."""
        rule, moments, found = Rule(), self.learner.moments, []
        for count in range(1, self.steps):
            placed = self.learner.placement(rule).best(count) if self.steps <= LONG else spaced(self.steps, count, 1.0)
            found.append(moments.error(deviation_of(moments, fitted(moments, rule, placed))))
        return [*found, 0.0]


def counts_within(pieces: Sequence[Piece], budget: float, per_step: bool = False) -> list[int]:
    """How many full steps each piece has, so that all together cost a fraction of what they cost in full.

    From one each, step by step where it helps most for what it costs; then steps change places as long as that helps.

    Args:
        pieces: of one run, or of several denoisers' runs.
        budget: the fraction.
        per_step: the same also where every step counts alike, as in what a plan says of itself.

    Raises:
        OutcomeError: not even one full step each is within it.
    """
    errors = [piece.errors() for piece in pieces]
    full, steps = sum(piece.spent(piece.steps) for piece in pieces), sum(piece.steps for piece in pieces)
    allowed = budget * (1 + TOLERANCE)
    counts = [1] * len(pieces)

    def spent(counts: Sequence[int]) -> float:
        pairs = list(zip(pieces, counts, strict=True))
        found = sum(piece.spent(count) for piece, count in pairs) / full
        return max(found, sum(piece.spent(count) / piece.cost for piece, count in pairs) / steps) if per_step else found

    def total(counts: Sequence[int]) -> float:
        return sum(own[count - 1] for own, count in zip(errors, counts, strict=True))

    if spent(counts) > allowed:
        raise OutcomeError(
            f"speedup={1 / budget:.4g} (macs={budget:.4g}) is out of reach: {len(pieces)} parts of the run, each of one form "
            f"and denoiser, need a full step each, so that speedup={1 / spent(counts):.4g} (macs={spent(counts):.4g})"
            " is the most. Ask for less, or take more steps"
        )
    while True:
        near = [c for c in _one_more(pieces, counts) if spent(c) <= allowed]
        if not near:
            break
        now, was = total(counts), spent(counts)
        counts = min(near, key=lambda c: (total(c) - now) / max(spent(c) - was, 1e-12))
    while True:
        swapped = [c for more in _one_more(pieces, counts) for c in _fewer(more, counts, allowed, spent)]
        best = min(swapped, key=total, default=counts)
        if total(best) >= total(counts):
            return counts
        counts = best


def _one_more(pieces: Sequence[Piece], counts: Sequence[int]) -> Iterator[list[int]]:
    for k, piece in enumerate(pieces):
        if counts[k] < piece.steps:
            yield [count + (n == k) for n, count in enumerate(counts)]


def _fewer(
    more: Sequence[int], before: Sequence[int], allowed: float, spent: Callable[[Sequence[int]], float]
) -> Iterator[list[int]]:
    """One piece with as many fewer as another has cost with one more."""
    for k in range(len(more)):
        if more[k] != before[k]:
            continue
        other = list(more)
        while other[k] > 1 and spent(other) > allowed:
            other[k] -= 1
        if spent(other) <= allowed:
            yield other


def counts_for_error(pieces: Sequence[Piece], max_error: float) -> list[int]:
    """The fewest full steps, about, whose error in the final samples is at most so much."""
    low, high = 0.0, 1.0
    best = [piece.steps for piece in pieces]
    errors = [piece.errors() for piece in pieces]
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        try:
            counts = counts_within(pieces, middle)
        except OutcomeError:
            low = middle
            continue
        if math.sqrt(sum(own[count - 1] for own, count in zip(errors, counts, strict=True))) <= max_error:
            best, high = counts, middle
        else:
            low = middle
    return best


def counts_of(pieces: Sequence[Piece], outcome: Outcome, per_step: bool = False) -> list[int]:
    """How many full steps each piece has, for an outcome of all together; see ``counts_within``."""
    if outcome.max_error is not None:
        return counts_for_error(pieces, outcome.max_error)
    return counts_within(pieces, outcome.budget, per_step)


def best_plan(piece: Piece, count: int, keeps: Callable[[InstantPlan], bool] | None = None) -> InstantPlan:
    """The plan of so many full steps that is likely to be best.

    Raises:
        OutcomeError: none keeps to the limits.
    """
    plans = piece.learner.plans(count, keeps)
    if not plans:
        raise OutcomeError("no plan keeps to max_graphs and max_cache_bytes; allow more of them")
    return plans[0]


class PartsLearner:
    """Fits plans on runs of one denoiser in which the form of predictions changes midway.

    Args:
        runs: recorded, of one sampler and number of steps.
        program: the captured denoiser.

    Attributes:
        runs: these.
        bounds: first step and end of each part.
        learners: of each part.

    Raises:
        InputError: they do not belong together.
    """

    def __init__(self, runs: Sequence[Sampler], program: Program | None = None) -> None:
        self.runs = list(runs)
        self.bounds = parts_of(runs[0])
        if any(parts_of(run) != self.bounds for run in runs):
            raise InputError("recorded runs change the form of their predictions at different steps; guide them alike")
        self.learners = [InstantLearner([RunPart(run, a, b) for run in runs], program) for a, b in self.bounds]

    def pieces(self, share: float) -> list[Piece]:
        """The parts, with what their steps cost: as many times as much as they have rows.

        Args:
            share: what a formed step costs, as a share of a full one.
        """
        rows = [sum(x.shape[0] for x in self.runs[0].outputs[a]) for a, _ in self.bounds]
        return [Piece(learner, float(n), share) for learner, n in zip(self.learners, rows, strict=True)]

    def best(self, outcome: Outcome, share: float, keeps: Callable[[InstantPlan], bool] | None = None) -> InstantPlan:
        """The plan for an outcome; see ``InstantLearner.best``."""
        pieces = self.pieces(share)
        counts = counts_of(pieces, outcome, per_step=True)
        plan = self.joined([best_plan(piece, count) for piece, count in zip(pieces, counts, strict=True)])
        if keeps is not None and not keeps(plan):
            raise OutcomeError("the plan of a run whose form changes midway does not keep to these limits; allow more of them")
        return plan

    def joined(self, plans: Sequence[InstantPlan]) -> InstantPlan:
        """One plan for the whole run of one for each part."""
        steps, computed, terms = self.bounds[-1][1], [], {}
        for plan, (a, b) in zip(plans, self.bounds, strict=True):
            computed += [a + i for i in plan.computed]
            for i, (read, coefficients) in plan.terms.items():
                moved = [a + j if j < b - a else steps + a + j - (b - a) for j in read]
                terms[a + i] = moved, coefficients
        squares = sum(plan.error**2 for plan in plans)
        decibels = 10 * math.log10(max(squares, SMALLEST))
        placed = any(plan.placed for plan in plans)
        return replace(
            plans[0], computed=tuple(computed), terms=terms, placed=placed, decibels=decibels, error=math.sqrt(squares)
        )

    def part_of(self, plan: InstantPlan, number: int) -> InstantPlan:
        """What a plan does in one part, in that part's own steps."""
        (a, b), steps = self.bounds[number], self.bounds[-1][1]
        terms = {
            i - a: ([j - a if j < steps else (b - a) + j - steps - a for j in read], coefficients)
            for i, (read, coefficients) in plan.terms.items()
            if a <= i < b
        }
        return replace(plan, computed=tuple(i - a for i in plan.computed if a <= i < b), terms=terms)
