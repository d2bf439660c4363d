"""From scores to a mask that meets an outcome."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fxmask import reference
from fxmask.errors import OutcomeError
from fxmask.ir.block import Block
from fxmask.ir.mask import Mask
from fxmask.ir.program import Program
from fxmask.learning.effort import Limits
from fxmask.learning.forms import Forms
from fxmask.learning.outcome import Outcome
from fxmask.learning.paper.budget import Budget, StreamBudget
from fxmask.learning.paper.options import PASSES, PaperOptions
from fxmask.learning.paper.scores import ScoreLearner
from fxmask.learning.paper.start import fixed_schedules
from fxmask.metrics import psnr, relative_error
from fxmask.passes.rectify import rectify
from fxmask.sampling.same_sampler import sampler_facts
from fxmask.sampling.sampler import Sampler

logger = logging.getLogger(__name__)


def learn_paper(
    program: Program,
    trajectories: Sequence[Sampler],
    outcome: Outcome,
    *,
    limits: Limits,
    seed: int,
    progress: bool,
    options: PaperOptions,
    effort: str = "default",
    checkpoint: str | Path | None = None,
    deployed: Program | None = None,
) -> Mask:
    """The paper's mask ``[T, blocks]`` for an outcome. Ctrl-C keeps what was learned so far.

    Args:
        program: the captured denoiser.
        trajectories: recorded runs; passes take their conditioning in turn.
        outcome: what is asked for.
        limits: bounds on the plan.
        seed: of the scores' start and of fresh noise.
        progress: show a progress bar.
        options: hyper-parameters.
        effort: says how many passes there are, where the options do not.
        checkpoint: a file that is written after each pass; the same call goes on from it.
        deployed: the program that will run, if that is another one than is learned from.

    Raises:
        OutcomeError: the outcome is out of reach, or its plan caches more than ``limits`` allow; says what is reachable.
    """
    program = Forms(program, trajectories).of_run(trajectories[0])[0]
    blocks = program.streams if options.blocks == "stream" else program.branches
    if not blocks:
        raise OutcomeError(
            f"no residual {options.blocks} was found in {type(program.model).__name__}, so the paper's learner has nothing to "
            "skip; see print(program)"
        )
    _check_outcome(outcome, options)
    projector = _Projector(program, trajectories, options, limits, seed, deployed or program)
    fixed = options.strength is not None
    if outcome.max_error is None and not fixed:
        projector.budget.check(outcome, limits.max_graphs)
    options = options if options.epochs else replace(options, epochs=PASSES[effort])
    judged = outcome.max_error is None and not fixed
    learner = ScoreLearner(
        program,
        trajectories,
        blocks,
        projector.budget.kept,
        outcome.budget,
        options,
        seed,
        checkpoint=checkpoint,
        judge=(lambda rank: projector.error(rank, outcome.budget)) if judged else None,
        start=projector.schedule(outcome.budget)
        if options.start == "schedule" and not Path(checkpoint or "").is_file()
        else None,
    )
    scores = learner.learn(progress)
    logger.info("%d passes, lambda1 %.3g", scores.passes, scores.strength)
    if options.on_scores is not None:
        options.on_scores(scores.values)
    if fixed:
        return projector.within(projector.mask(_computed(scores.values, blocks)))
    if outcome.max_error is not None:
        return projector.within(projector.meeting(scores.rank, outcome.max_error))
    return projector.at(scores.rank, outcome.budget)


def _computed(values: torch.Tensor, blocks: Sequence[Block]) -> torch.Tensor:
    rows = values > 0.5
    rows[0] = True
    assert rows.shape[1] == len(blocks)
    return rows


def _check_outcome(outcome: Outcome, options: PaperOptions) -> None:
    given = [name for name, value in vars(outcome).items() if value is not None]
    if options.strength is not None and given:
        raise OutcomeError(
            f"PaperOptions(strength={options.strength:g}) fixes lambda1, and what is saved follows from it; drop {given[0]}=, "
            "or leave strength out"
        )


def rollout_error(program: Program, mask: Mask, calls: Sampler) -> float:
    """Relative L2 error of the final samples when the recorded noise is sampled with the masked program."""
    return relative_error(reference.rollout(program, mask, calls), calls.final)


class _Projector:
    """Masks of a rank that keep to the limits."""

    def __init__(
        self,
        program: Program,
        runs: Sequence[Sampler],
        options: PaperOptions,
        limits: Limits,
        seed: int,
        deployed: Program,
    ) -> None:
        self._program, self._runs, self._limits, self._seed, self._deployed = program, runs, limits, seed, deployed
        self._streams = options.blocks == "stream"
        self._timesteps = runs[0].timesteps
        self._free = {block.name: block for block in (program.streams if self._streams else program.branches)}
        self._names = tuple(self._free)
        self.budget = self._made()

    def _made(self) -> Budget | StreamBudget:
        if self._streams:
            return StreamBudget(self._program, self._timesteps, frozenset(self._free))
        budget = Budget.of(self._program, len(self._timesteps))
        held = torch.tensor([name not in self._free for name in self._names])
        return replace(budget, share=budget.share.masked_fill(held, 0.0))

    def mask(self, rows: torch.Tensor) -> Mask:
        """The mask of rows ``[T, B]``; what may not be skipped any more computes."""
        rows = rows | torch.tensor([name not in self._free for name in self._names])
        facts = sampler_facts(self._runs[0])
        return Mask(rows, self._timesteps, self._names, fingerprint=self._program.fingerprint, sampler=facts)

    def at(self, rank: torch.Tensor, budget: float) -> Mask:
        """The mask at a budget. While it caches too much, the block that caches most for what it spares is computed always."""
        mask = self.mask(self.budget.project(rank, budget, self._limits.max_graphs, self._seed))
        while self._free and not self._fits(mask):
            worst = max(self._free.values(), key=lambda block: block.bytes / max(1, block.macs))
            del self._free[worst.name]
            self.budget = self._made()
            if self.budget.least > budget * 1.03:
                return self.within(mask)
            mask = self.mask(self.budget.project(rank, budget, self._limits.max_graphs, self._seed))
        return self.within(mask)

    def error(self, rank: torch.Tensor, budget: float) -> float:
        """Minus PSNR of the mask at a budget, in dB, mean over the recorded images; infinite where there is none."""
        try:
            mask = self.at(rank, budget)
        except OutcomeError:
            return math.inf
        return sum(self._decibels(mask, run) for run in self._runs) / len(self._runs)

    def _decibels(self, mask: Mask, run: Sampler) -> float:
        """Minus PSNR, mean over images: an image that is hard does not decide alone."""
        return -float(psnr(reference.rollout(self._program, mask, run), run.final).clamp(max=300).mean())

    def schedule(self, budget: float) -> torch.Tensor | None:
        """The mask ``[T, B]`` of the best fixed schedule at a budget, if there is one."""
        everything = torch.ones(len(self._names), dtype=torch.bool)
        single = [torch.eye(len(self._names), dtype=torch.bool)[b] for b in range(len(self._names))] if self._streams else []
        found = fixed_schedules(len(self._timesteps), [everything, *single], self.budget.kept, budget)
        run = self._runs[0]
        return min(found, key=lambda rows: self._decibels(self.mask(rows), run), default=None)

    def _fits(self, mask: Mask) -> bool:
        bound = self._limits.max_cache_bytes
        return bound is None or rectify(self._deployed, mask).peak_cache_bytes <= bound

    def within(self, mask: Mask) -> Mask:
        """The mask, if its plan keeps to the limits.

        Raises:
            OutcomeError: it caches too much, or has too many graphs.
        """
        plan, limits = rectify(self._deployed, mask), self._limits
        if limits.max_cache_bytes is not None and plan.peak_cache_bytes > limits.max_cache_bytes:
            raise OutcomeError(
                f"the mask of learner='paper' caches {plan.peak_cache_bytes} bytes at once, and "
                f"max_cache_bytes={limits.max_cache_bytes}; allow more, ask for less, or use the default learner"
            )
        if limits.max_graphs is not None and plan.distinct_graphs > limits.max_graphs:
            raise OutcomeError(
                f"the mask of learner='paper' has {plan.distinct_graphs} step graphs, and max_graphs={limits.max_graphs}; "
                "allow more, or ask for an outcome (speedup=) in place of a fixed strength"
            )
        return mask

    def meeting(self, rank: torch.Tensor, max_error: float) -> Mask:
        """Bisect for the smallest budget whose error on the recorded noise stays below ``max_error``."""
        run = self._runs[0]
        best = self.mask(torch.ones(len(self._timesteps), len(self._names), dtype=torch.bool))
        low, high = self.budget.least, 1.0
        for _ in range(8):
            middle = (low + high) / 2
            try:
                mask = self.mask(self.budget.project(rank, middle, self._limits.max_graphs, self._seed))
            except OutcomeError:
                low = middle  # few graphs make coarse masks; look on the safe side
                continue
            plan = rectify(self._program, mask)
            error = rollout_error(self._program, plan.mask, run)
            logger.info("macs=%.3f gives error %.4f", middle, error)
            if error <= max_error:
                best, high = mask, middle
            else:
                low = middle
        return best
