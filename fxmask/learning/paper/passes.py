"""One pass of the paper's learner: every step of one sampling run, teacher beside student.

    for each step i:   x_i -> teacher -> e_i;   x_i, scores s_i, caches -> soft graph -> x_end
                       g_i = d ||x_end - e_i|| / d s_i;   the sampler goes on with e_i (teacher) or x_end (student)

Caches are detached, so that a gradient stays inside its step (Fig. 3). Nothing is kept of a step but its caches, the last
prediction and ``g_i``, so memory does not grow with T.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from fxmask.errors import InputError
from fxmask.ir.program import Program
from fxmask.learning.paper.options import PaperOptions
from fxmask.passes.insert_soft_mask import SoftGraph
from fxmask.sampling.sampler import Call, Renews, Sampler

logger = logging.getLogger(__name__)
Pair = tuple[Call, torch.Tensor | None]


@dataclass(frozen=True)
class Pass:
    """What one pass saw.

    Attributes:
        gradient: float ``[T, B]``, of the feature loss by the scores.
        change: float64 ``[T]``, the relative change of the teacher's prediction (Eq. 9); 0 at the first step.
        error: the feature loss, mean over steps.
    """

    gradient: torch.Tensor
    change: torch.Tensor
    error: float


def run_pass(
    run: Sampler,
    lanes: Sequence[tuple[Program, SoftGraph]],
    scores: torch.Tensor,
    options: PaperOptions,
    seed: int,
    weights: torch.Tensor | None = None,
) -> Pass:
    """Gradients of one sampling run.

    Args:
        run: recorded; its conditioning is used, and its noise unless it is to be fresh.
        lanes: program and soft graph of each lane.
        scores: float ``[T, B]`` as they are used; 1 at the first step.
        options: of the learner.
        seed: of fresh noise, and of where windows begin.
        weights: float ``[T]``, what the penalty of each step is scaled by; only ratios count, and only within a window.
    """
    pairs = _pairs(run, lanes[0][0].model, options, seed)
    windows = [_Window(soft, program) for program, soft in lanes]
    begins = seed % options.window  # other steps see far ahead in other passes
    before: list[torch.Tensor | None] = [None] * len(lanes)
    told = torch.ones(len(scores)) if weights is None else weights
    gradient = torch.zeros(scores.shape)
    change = torch.zeros(len(scores), dtype=torch.float64)
    total, answer = 0.0, None
    for i, lane in run.order:
        call, target = next(pairs) if answer is None else pairs.send(answer)
        program, soft = lanes[lane]
        inputs = tuple(program.signature.bind((), dict(call)).tensors.values())
        if target is None:
            with torch.no_grad():
                target = program.graph_module(*inputs)[0]
        window = windows[lane]
        used = scores[i].to(target.device).detach().requires_grad_()
        loss, window.caches, student = soft_step(soft, inputs, used, window.caches, target, i == 0, options.window > 1)
        window.steps.append((i, used, loss))
        if (i + 1 - begins) % options.window == 0:
            window.close(gradient, told)
        total += float(loss.detach()) / len(lanes)
        change[i] += relative_change(before[lane], target) / len(lanes)
        before[lane] = target
        answer = target if options.inputs == "teacher" else student
    for window in windows:
        window.close(gradient, told)
    pairs.close()
    return Pass(gradient / len(lanes), change, total / len(scores))


class _Window:
    """Steps of one lane whose losses reach the scores of those before them, through the caches."""

    def __init__(self, soft: SoftGraph, program: Program) -> None:
        self.caches = soft.empty_caches(program)
        self.steps: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def close(self, gradient: torch.Tensor, weights: torch.Tensor) -> None:
        """Add what these steps say of their scores, and let go of their graphs."""
        if self.steps:
            numbers, used, losses = zip(*self.steps, strict=True)
            # a step's gradient has the scale of its own penalty, whichever step's loss it is of
            loss = torch.stack([x / weights[i] for i, x in zip(numbers, losses, strict=True)]).sum()
            for i, found in zip(numbers, torch.autograd.grad(loss, used), strict=True):
                gradient[i] += found.cpu() * weights[i]
        self.steps.clear()
        self.caches = [cache.detach() for cache in self.caches]


def relative_change(before: torch.Tensor | None, now: torch.Tensor) -> float:
    """``||e_i - e_(i-1)|| / ||e_i||``, mean over the batch (Eq. 9); 0 at the first step."""
    if before is None or before.shape != now.shape:
        return 0.0
    now, before = now.flatten(1).double(), before.flatten(1).double()
    return float(((now - before).norm(dim=1) / now.norm(dim=1).clamp_min(1e-12)).mean())


def _pairs(run: Sampler, model: torch.nn.Module, options: PaperOptions, seed: int) -> Generator[Pair, torch.Tensor, None]:
    """Each call of a pass, and the teacher's prediction where it is known; is sent what the sampler goes on with."""
    if options.fresh and isinstance(run, Renews):
        loop = run.fresh_loop(seed)
    else:
        recorded = _renoised(run, model, seed) if options.fresh else run
        if options.inputs == "teacher":
            for i, lane in recorded.order:
                yield recorded.calls[i][lane], recorded.outputs[i][lane]
            return
        loop = recorded.loop()
    try:
        call = next(loop)
        while True:
            answer = yield call, None
            call = loop.send(answer)
    except StopIteration:
        return
    finally:
        loop.close()


def _renoised(run: Sampler, model: torch.nn.Module, seed: int) -> Sampler:
    try:
        return run.renoised(model, seed)
    except InputError:
        logger.info("the recorded run draws no noise; every pass is over the same run")
        return run


def soft_step(
    soft: SoftGraph,
    inputs: tuple[torch.Tensor, ...],
    used: torch.Tensor,
    caches: Sequence[torch.Tensor],
    target: torch.Tensor,
    first: bool,
    blended: bool = False,
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """The feature loss and the new caches, of which gradients reach the scores ``used`` ``[B]``, and the student's prediction.

    Args:
        soft: the program with its scores.
        inputs: of the program.
        used: scores.
        caches: of earlier steps.
        target: the teacher's prediction.
        first: nothing is cached yet.
        blended: caches hold blended values whatever the score, and not only those of blocks that compute.
    """
    with torch.enable_grad():
        results = soft.graph_module(*inputs, used, *caches)
        loss = (results[0] - target).flatten(1).norm(dim=1).mean()
    computed = (used.detach() > 0.5).tolist()
    fresh = [
        value if first or blended or computed[b] else cache
        for (b, _), value, cache in zip(soft.values, results[soft.num_outputs :], caches, strict=True)
    ]
    return loss, fresh, results[0].detach()
