"""From scores to a mask that meets an outcome."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from fxmask import reference
from fxmask.errors import InputError, OutcomeError
from fxmask.ir.mask import Mask
from fxmask.ir.program import Program
from fxmask.learning.effort import Limits
from fxmask.learning.forms import Forms
from fxmask.learning.outcome import Outcome
from fxmask.learning.paper.budget import Budget
from fxmask.learning.paper.options import PaperOptions
from fxmask.learning.paper.scores import Scores, learn_scores
from fxmask.metrics import relative_error
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
    deployed: Program | None = None,
) -> Mask:
    """The paper's mask ``[T, branches]`` for an outcome. Ctrl-C keeps what was learned so far.

    Args:
        program: the captured denoiser.
        trajectories: recorded runs; the first is learned from, as in the paper every batch is new.
        outcome: what is asked for.
        limits: bounds on the plan.
        seed: of the scores' start.
        progress: show a progress bar.
        options: hyper-parameters.
        deployed: the program that will run, if that is another one than is learned from.

    Raises:
        OutcomeError: the outcome is out of reach, or its plan caches more than ``limits`` allow; says what is reachable.
    """
    calls = trajectories[0]
    if len(trajectories) > 1:
        logger.warning("learner='paper' learns from the first of %d recorded runs; the others are not used", len(trajectories))
    program = _at_shape_of(program, calls)
    if not program.branches:
        raise OutcomeError(
            f"no residual branch was found in {type(program.model).__name__}, so the paper's learner has nothing to skip; "
            "see print(program)"
        )
    budget = Budget.of(program, calls.num_steps)
    if outcome.max_error is None:
        budget.check(outcome, limits.max_graphs)
    scores = learn_scores(program, calls, outcome.budget, seed, progress, options)
    if options.on_scores is not None:
        options.on_scores(scores.values)
    if outcome.max_error is not None:
        mask = _meet_error(program, calls, scores, budget, outcome.max_error, limits.max_graphs, seed)
    else:
        mask = _mask(program, calls, budget.project(scores.rank, outcome.budget, limits.max_graphs, seed))
    peak = rectify(deployed or program, mask).peak_cache_bytes
    if limits.max_cache_bytes is not None and peak > limits.max_cache_bytes:
        raise OutcomeError(
            f"the mask of learner='paper' caches {peak} bytes at once, and max_cache_bytes={limits.max_cache_bytes}; allow "
            "more, or use the default learner, which chooses among plans"
        )
    return mask


def _mask(program: Program, calls: Sampler, rows: torch.Tensor) -> Mask:
    names = tuple(block.name for block in program.branches)
    return Mask(rows, calls.timesteps, names, fingerprint=program.fingerprint, sampler=sampler_facts(calls))


def _at_shape_of(program: Program, calls: Sampler) -> Program:
    """The program captured for the trajectory's shapes."""
    if len(calls.calls[0]) != 1:
        raise InputError("learning from several calls per step is not possible yet; record one lane")
    (form,) = Forms(program, [calls]).of_run(calls)
    return form


def rollout_error(program: Program, mask: Mask, calls: Sampler) -> float:
    """Relative L2 error of the final samples when the recorded noise is sampled with the masked program."""
    return relative_error(reference.rollout(program, mask, calls), calls.final)


def _meet_error(
    program: Program,
    calls: Sampler,
    scores: Scores,
    budget: Budget,
    max_error: float,
    max_graphs: int | None,
    seed: int,
) -> Mask:
    """Bisect for the smallest budget whose error on the recorded noise stays below ``max_error``."""
    best = _mask(program, calls, torch.ones(calls.num_steps, len(program.branches), dtype=torch.bool))
    low, high = budget.least, 1.0
    for _ in range(8):
        middle = (low + high) / 2
        try:
            mask = _mask(program, calls, budget.project(scores.rank, middle, max_graphs, seed))
        except OutcomeError:
            low = middle  # few graphs make coarse masks; look on the safe side
            continue
        error = rollout_error(program, mask, calls)
        logger.info("macs=%.3f gives error %.4f", middle, error)
        if error <= max_error:
            best, high = mask, middle
        else:
            low = middle
    return best
