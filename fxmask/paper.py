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
from dataclasses import dataclass, field

import torch
from tqdm.auto import tqdm

from fxmask.errors import InputError, OutcomeError
from fxmask.executor import Executor, GraphStore
from fxmask.mask import Mask, Slot
from fxmask.metrics import relative_error
from fxmask.outcome import TOLERANCE, Outcome
from fxmask.passes.insert_soft_mask import SoftGraph, insert_soft_mask
from fxmask.passes.rectify import rectify
from fxmask.program import Program
from fxmask.tracing import recapture
from fxmask.trajectory import Trajectory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PaperOptions:
    """Hyper-parameters of the paper's learner.

    Attributes:
        epochs: passes over the recorded trajectory.
        learning_rate: of Adam on the scores.
        bimodal: lambda2 as a fraction of lambda1; 0 leaves the bi-modal term out.
        weighted: whether ``w(i)`` scales the penalties (timestep-aware scaling); else 1.
        gumbel: scores are binary Gumbel-Softmax samples of logits (temperature 1, straight through is not used, as in
            the paper's comparison), instead of free numbers from random samples.
    """

    epochs: int = 20
    learning_rate: float = 0.1
    bimodal: float = 0.3
    weighted: bool = True
    gumbel: bool = False


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


def learn_paper(
    program: Program,
    calls: Trajectory,
    outcome: Outcome,
    max_graphs: int | None = None,
    seed: int = 0,
    progress: bool = False,
    options: PaperOptions | None = None,
) -> Mask:
    """The paper's mask ``[T, branches]`` for an outcome. Ctrl-C keeps what was learned so far.

    Raises:
        OutcomeError: the outcome is out of reach; says what is reachable.
    """
    program = _at_shape_of(program, calls)
    if not program.branches:
        raise OutcomeError(
            f"no residual branch was found in {type(program.model).__name__}, so the paper's learner has nothing to skip; "
            "see program.summary()"
        )
    budget = Budget.of(program, calls.num_steps)
    if outcome.max_error is None:
        budget.check(outcome, max_graphs)
    scores = learn_scores(program, calls, outcome.budget, seed, progress, options or PaperOptions())
    if outcome.max_error is not None:
        return _meet_error(program, calls, scores, budget, outcome.max_error, max_graphs, seed)
    rows = budget.project(scores.rank, outcome.budget, max_graphs, seed)
    return _mask(program, calls, rows)


def _mask(program: Program, calls: Trajectory, rows: torch.Tensor) -> Mask:
    names = tuple(block.name for block in program.branches)
    return Mask(rows, calls.timesteps, names, fingerprint=program.fingerprint)


def _at_shape_of(program: Program, calls: Trajectory) -> Program:
    """The program captured for the trajectory's shapes."""
    if len(calls.calls[0]) != 1:
        raise InputError("learning from several calls per step is not possible yet; record one lane")
    bound = program.signature.bind((), dict(calls.calls[0][0]))
    return program if bound.key == program.example.key else recapture(program, bound)


def step_weights(calls: Trajectory) -> torch.Tensor:
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


def learn_scores(
    program: Program, calls: Trajectory, budget: float, seed: int, progress: bool, options: PaperOptions
) -> Scores:
    """Scores ``[T, B]`` of the branch blocks, by gradient descent on the paper's per-step loss."""
    soft = insert_soft_mask(program, program.branches)
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
            kept = _kept(torch.stack([row.detach().cpu() for row in rows]) > 0.5, share)
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


def _kept(compute: torch.Tensor, share: torch.Tensor) -> float:
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


@dataclass(frozen=True)
class Budget:
    """MACs of masks over disjoint branch blocks, and the masks that meet a budget.

    Attributes:
        share: float64 ``[B]``, each branch's share of a step's MACs.
        num_steps: T.
    """

    share: torch.Tensor
    num_steps: int
    names: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, program: Program, num_steps: int) -> Budget:
        """Budget of a program's branches over ``num_steps`` steps."""
        share = torch.tensor([b.macs for b in program.branches], dtype=torch.float64) / max(1, program.macs)
        return cls(share, num_steps, tuple(b.name for b in program.branches))

    @property
    def least(self) -> float:
        """Smallest reachable fraction of MACs: every branch computed at the first step only."""
        return float(1 - self.share.sum() * (self.num_steps - 1) / self.num_steps)

    def check(self, outcome: Outcome, max_graphs: int | None) -> None:
        """Raise ``OutcomeError`` if no mask over the branches can meet the outcome."""
        least = 1.0 if max_graphs == 1 else self.least
        if outcome.budget < least / (1 + TOLERANCE):
            raise OutcomeError(
                f"speedup={1 / outcome.budget:.4g} (macs={outcome.budget:.4g}) is out of reach: with all "
                f"{len(self.share)} branches skipped after the first of {self.num_steps} steps, speedup={1 / least:.4g} "
                f"(macs={least:.4g}) is the most. Ask for less, or take more steps"
            )

    def project(self, rank: torch.Tensor, budget: float, max_graphs: int | None, seed: int) -> torch.Tensor:
        """The mask ``[T, B]`` that computes what ranks highest and whose MACs come nearest to ``budget``.

        Raises:
            OutcomeError: with so few graphs no mask comes within 3 %.
        """
        groups = _group_rows(rank, max_graphs, seed)
        sizes = torch.bincount(groups, minlength=int(groups.max()) + 1).double()
        means = torch.zeros(len(sizes), rank.shape[1], dtype=torch.float64).index_add_(0, groups, rank.double())
        means = means / sizes.unsqueeze(1)
        saving = (sizes.unsqueeze(1) * self.share) / self.num_steps  # MACs saved by skipping (group, block)
        free = torch.ones_like(saving, dtype=torch.bool)
        free[groups[0]] = False  # nothing is cached at the first step
        order = means.masked_fill(~free, math.inf).flatten().argsort()[: int(free.sum())]
        skipped = _fill(saving.flatten(), order, 1 - budget)
        compute = torch.ones(saving.numel(), dtype=torch.bool)
        compute[skipped] = False
        rows: torch.Tensor = compute.reshape(saving.shape)[groups]
        kept = _kept(rows, self.share)
        if abs(kept / budget - 1) > TOLERANCE:
            raise OutcomeError(
                f"macs={budget:.4g} (speedup={1 / budget:.4g}) cannot be met within {TOLERANCE:.0%}"
                + (f" with max_graphs={max_graphs}" if max_graphs else "")
                + f": the nearest is macs={kept:.4g} (speedup={1 / kept:.4g})"
            )
        return rows


def _fill(saving: torch.Tensor, order: torch.Tensor, wanted: float) -> list[int]:
    """Entries to skip, lowest rank first, whose savings add up to ``wanted`` as nearly as the entries allow."""
    skipped: list[int] = []
    total = 0.0
    rest: list[int] = []
    for entry in order.tolist():
        if total + float(saving[entry]) <= wanted + 1e-12:
            skipped.append(entry)
            total += float(saving[entry])
        else:
            rest.append(entry)
            if len(rest) > len(saving) // 4 and wanted - total < 0.002:
                break
    nearest = min(rest, key=lambda e: abs(total + float(saving[e]) - wanted), default=None)
    if nearest is not None and abs(total + float(saving[nearest]) - wanted) < wanted - total:
        skipped.append(nearest)
    return skipped


def _group_rows(rank: torch.Tensor, max_graphs: int | None, seed: int) -> torch.Tensor:
    """Group of each step: steps of a group share one row. The first step, all computes, has a group of its own."""
    steps = len(rank)
    if max_graphs is None or max_graphs >= steps:
        return torch.arange(steps)
    groups = torch.zeros(steps, dtype=torch.long)
    if max_graphs == 1:
        return groups
    points = rank[1:].double()
    centres = points[torch.linspace(0, len(points) - 1, max_graphs - 1).round().long()].clone()
    for _ in range(50):  # Lloyd's algorithm; a few dozen rounds settle a few dozen rows
        nearest = torch.cdist(points, centres).argmin(dim=1)
        updated = torch.stack(
            [points[nearest == k].mean(0) if bool((nearest == k).any()) else centres[k] for k in range(len(centres))]
        )
        if torch.equal(updated, centres):
            break
        centres = updated
    groups[1:] = torch.unique(nearest, return_inverse=True)[1] + 1
    return groups


def rollout_error(program: Program, mask: Mask, calls: Trajectory) -> float:
    """Relative L2 error of the final samples when the recorded noise is sampled with the masked program."""
    executor = Executor(rectify(program, mask), GraphStore(program, "eager"))
    cache: dict[Slot, torch.Tensor] = {}
    step = iter(range(mask.num_steps))

    def denoiser(**kwargs: object) -> torch.Tensor:
        tensors = list(program.signature.bind((), kwargs).tensors.values())
        return executor.run_step(next(step), tensors, cache)[0]

    return relative_error(calls.rollout(denoiser), calls.final)


def _meet_error(
    program: Program,
    calls: Trajectory,
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
