"""The paper's learner (arXiv 2603.19939, Sec. 3), with its ablations.

Per step ``i``, with soft graph ``x`` and the frozen model's output ``e``:

    L_i = ||x_end - e||_2 + lambda1 * w(i) * sum_b s_b + lambda2 * w(i) * sum_b s_b (1 - s_b)      Eq. 5-8, 11
    delta[i] = ||e_i - e_(i-1)|| / ||e_i||                                                        Eq. 9
    w(i) = 2.0, 1.5, 1.0  as  delta[i] / max delta  is  < 0.1, < 0.5, else                        Eq. 10

Caches are detached, so gradients stay inside one step (Fig. 3) and memory does not grow with T. The paper tunes
lambda1 by hand; here the user asks for an outcome and lambda1 follows it during the run. Scores that end between two
blocks' worth of MACs are settled by rank, so that the outcome is met.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from fxmask.ir.program import Program
from fxmask.ir.weights import detach_weights
from fxmask.learning.paper.options import PaperOptions
from fxmask.passes.insert_soft_mask import SoftGraph, insert_soft_mask
from fxmask.sampling.sampler import Sampler

logger = logging.getLogger(__name__)


@dataclass
class Scores:
    """What learning leaves behind: soft scores and a total order of (step, block) by how much they matter.

    Attributes:
        values: float ``[T, B]`` in [0, 1].
        pull: float ``[T, B]``, how strongly the feature loss wanted the score up; orders equal scores.
    """

    values: torch.Tensor
    pull: torch.Tensor

    @property
    def rank(self) -> torch.Tensor:
        """Float ``[T, B]``; larger matters more. Scores first, pull among (nearly) equal ones."""
        order = self.pull.flatten().argsort().argsort().reshape(self.pull.shape)
        return self.values.double() + 1e-3 * order.double() / max(1, order.numel())


def step_weights(calls: Sampler) -> torch.Tensor:
    """The paper's timestep-aware weights ``w``, float ``[T]`` (Eq. 9 and 10). The first step, never skipped, has 1."""
    outputs = [step[0].flatten(1).double() for step in calls.outputs]
    delta = torch.zeros(len(outputs), dtype=torch.float64)
    for i in range(1, len(outputs)):
        change = (outputs[i] - outputs[i - 1]).norm(dim=1) / outputs[i].norm(dim=1).clamp_min(1e-12)
        delta[i] = change.mean()
    relative = delta / delta.max().clamp_min(1e-12)
    weights = torch.where(relative < 0.1, 2.0, torch.where(relative < 0.5, 1.5, 1.0))
    weights[0] = 1.0
    return weights.float()


def learn_scores(program: Program, calls: Sampler, budget: float, seed: int, progress: bool, options: PaperOptions) -> Scores:
    """Scores ``[T, B]`` of the branch blocks, by gradient descent on the paper's per-step loss."""
    soft = insert_soft_mask(program, program.branches)
    detach_weights(soft.graph_module)
    device = calls.initial_noise.device
    count = calls.num_steps, len(soft.blocks)
    start = torch.rand(count, generator=torch.Generator().manual_seed(seed))  # random sampling, the paper's Table 4
    start[0] = 1.0
    rows = [row.to(device).requires_grad_() for row in start]
    weights = (step_weights(calls) if options.weighted else torch.ones(calls.num_steps)).to(device)
    noise = torch.Generator().manual_seed(seed + 1)
    inputs = [tuple(program.signature.bind((), dict(step[0])).tensors.values()) for step in calls.calls]
    share = torch.tensor([block.macs for block in soft.blocks], dtype=torch.float64)
    share = share / max(1, program.macs)
    optimizer = torch.optim.Adam(rows, lr=options.learning_rate)
    pull = torch.zeros(count)
    strength: float | None = None
    epoch = 0
    bar = tqdm(total=options.epochs * calls.num_steps, desc="learning the mask", unit="step", disable=not progress)
    try:
        for epoch in range(options.epochs):  # noqa: B007 (told when interrupted)
            caches = soft.empty_caches(program)
            for i in range(calls.num_steps):
                used, slope = _sampled(rows[i], noise) if options.gumbel and i else (rows[i], None)
                gradient, caches, error = _step(soft, inputs[i], used, caches, calls.outputs[i][0], i == 0)
                pull[i] = 0.7 * pull[i] - 0.3 * gradient.cpu()
                if i and strength is not None:
                    penalty = strength * weights[i] * (1 + options.bimodal * (1 - 2 * used.detach()))
                    _descend(optimizer, rows[i], (gradient + penalty) * (1.0 if slope is None else slope))
                bar.update()
            kept = kept_share(torch.stack([row.detach().cpu() for row in rows]) > 0.5, share)
            strength = _strength(strength, pull, weights.cpu(), share, kept, budget)
            bar.set_postfix(error=f"{error:.3g}", macs=f"{kept:.3f}", refresh=False)
    except KeyboardInterrupt:
        logger.warning("learning was interrupted in epoch %d of %d; using the scores so far", epoch + 1, options.epochs)
    finally:
        bar.close()
    return Scores(torch.stack([row.detach().cpu() for row in rows]), pull / weights.cpu().unsqueeze(1))


def _step(
    soft: SoftGraph,
    inputs: tuple[torch.Tensor, ...],
    scores: torch.Tensor,
    caches: Sequence[torch.Tensor],
    target: torch.Tensor,
    first: bool,
) -> tuple[torch.Tensor, list[torch.Tensor], float]:
    """Gradient of the feature loss by the scores, the new caches, and the loss."""
    with torch.enable_grad():
        results = soft.graph_module(*inputs, scores, *caches)
        loss = (results[0] - target).flatten(1).norm(dim=1).mean()
        (gradient,) = torch.autograd.grad(loss, [scores])
    computed = (scores.detach() > 0.5).tolist()
    fresh = [
        value.detach() if first or computed[b] else cache
        for (b, _), value, cache in zip(soft.values, results[soft.num_outputs :], caches, strict=True)
    ]
    return gradient, fresh, float(loss.detach())


def _sampled(row: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A binary Gumbel-Softmax sample of probabilities ``row`` (Jang et al., 2017, at temperature 1), and its slope."""
    uniform = torch.rand(row.shape, generator=generator).clamp(1e-6, 1 - 1e-6).to(row.device)
    probability = row.detach().clamp(1e-4, 1 - 1e-4)
    sample = torch.sigmoid(torch.logit(probability) + torch.logit(uniform))
    slope = (sample * (1 - sample)) / (probability * (1 - probability))
    return sample.requires_grad_(), slope.clamp(max=10.0)


def _descend(optimizer: torch.optim.Optimizer, row: torch.Tensor, gradient: torch.Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)  # Adam leaves rows without a gradient alone
    row.grad = gradient
    optimizer.step()
    with torch.no_grad():
        row.clamp_(0.0, 1.0)


def kept_share(compute: torch.Tensor, share: torch.Tensor) -> float:
    """Fraction of the full MACs that a hard mask over disjoint branches keeps."""
    return float(1 - ((~compute).double() @ share).mean())


def _strength(
    strength: float | None, pull: torch.Tensor, weights: torch.Tensor, share: torch.Tensor, kept: float, budget: float
) -> float:
    """lambda1: at first where the pulls of a fitting number of blocks exceed it, then steered towards the budget."""
    if strength is None:
        ordered, index = (pull[1:] / weights[1:, None]).flatten().sort()
        cost = share.repeat(len(pull) - 1)[index].cumsum(0) / len(pull)
        position = int(torch.searchsorted(cost, 1 - budget))
        return max(1e-8, float(ordered[min(position, len(ordered) - 1)]))
    return strength * math.exp(max(-0.7, min(0.7, 3 * (kept - budget))))
