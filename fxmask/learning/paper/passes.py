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
    run: Sampler, lanes: Sequence[tuple[Program, SoftGraph]], scores: torch.Tensor, options: PaperOptions, seed: int
) -> Pass:
    """Gradients of one sampling run.

    Args:
        run: recorded; its conditioning is used, and its noise unless it is to be fresh.
        lanes: program and soft graph of each lane.
        scores: float ``[T, B]`` as they are used; 1 at the first step.
        options: of the learner.
        seed: of fresh noise.
    """
    pairs = _pairs(run, lanes[0][0].model, options, seed)
    caches = [soft.empty_caches(program) for program, soft in lanes]
    before: list[torch.Tensor | None] = [None] * len(lanes)
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
        own, caches[lane], error, student = soft_step(soft, inputs, scores[i], caches[lane], target, i == 0)
        gradient[i] += own.cpu() / len(lanes)
        total += error / len(lanes)
        change[i] += relative_change(before[lane], target) / len(lanes)
        before[lane] = target
        answer = target if options.inputs == "teacher" else student
    pairs.close()
    return Pass(gradient, change, total / len(scores))


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
    scores: torch.Tensor,
    caches: Sequence[torch.Tensor],
    target: torch.Tensor,
    first: bool,
) -> tuple[torch.Tensor, list[torch.Tensor], float, torch.Tensor]:
    """Gradient of the feature loss by the scores ``[B]``, the new caches, the loss, and the student's prediction."""
    used = scores.to(target.device).detach().requires_grad_()
    with torch.enable_grad():
        results = soft.graph_module(*inputs, used, *caches)
        loss = (results[0] - target).flatten(1).norm(dim=1).mean()
        (gradient,) = torch.autograd.grad(loss, [used])
    computed = (used.detach() > 0.5).tolist()
    fresh = [
        value.detach() if first or computed[b] else cache
        for (b, _), value, cache in zip(soft.values, results[soft.num_outputs :], caches, strict=True)
    ]
    return gradient, fresh, float(loss.detach()), results[0].detach()
