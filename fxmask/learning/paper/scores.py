"""The paper's learner (arXiv 2603.19939, Sec. 3), with its ablations.

Per step ``i``, with soft graph ``x`` and the frozen model's output ``e``:

    L_i = ||x_end - e||_2 + lambda1 * w(i) * sum_b s_b + lambda2 * w(i) * sum_b s_b (1 - s_b)      Eq. 5-8, 11
    delta[i] = ||e_i - e_(i-1)|| / ||e_i||                                                        Eq. 9
    w(i) = 2.0, 1.5, 1.0  as  delta[i] / max delta  is  < 0.1, < 0.5, else                        Eq. 10

A score is used in its own step alone, so one update of all ``[T, B]`` scores after a pass is the same as T updates in it.
The paper tunes lambda1 by hand; here the user asks for an outcome and lambda1 follows it from pass to pass, unless it is
given. Ranks learn from runs of their own; their gradients are averaged.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from fxmask.ir.block import Block
from fxmask.ir.program import Program
from fxmask.ir.weights import detach_weights
from fxmask.learning.forms import Forms
from fxmask.learning.identity import identity_of
from fxmask.learning.instant.response import gains_of, response_of
from fxmask.learning.paper.live_cost import LiveCost
from fxmask.learning.paper.options import PaperOptions
from fxmask.learning.paper.passes import Pass, run_pass
from fxmask.learning.paper.state import State
from fxmask.learning.ranks import Group
from fxmask.passes.insert_soft_mask import SoftGraph, insert_soft_mask
from fxmask.sampling.sampler import Sampler

logger = logging.getLogger(__name__)
Kept = Callable[[torch.Tensor], float]  # of a hard mask [T, B] the fraction of the full MACs
Judge = Callable[[torch.Tensor], float]  # of a rank [T, B] the error of its mask
CLOSE = 0.03  # of the budget
NEIGHBOURS = 12  # of this fraction of all steps, on each side, a measured weight is smoothed
MOST = 30.0  # how far measured weights may be from their mean
TOWARDS, AHEAD = 2.0, 8.0  # how much of that a distance from the budget asks for, and a change of it in one pass
FASTEST = 0.2  # logarithm of what lambda1 changes by in a pass; scores take several to follow
CHEAPEST = 1e-3  # of a mean block: what is cheaper, as what nothing reads is, counts as much
UNCHANGED = 0.01  # of the mask's entries


@dataclass
class Scores:
    """What learning leaves behind: soft scores and a total order of (step, block) by how much they matter.

    Attributes:
        values: float ``[T, B]`` in [0, 1].
        pull: float ``[T, B]``, how strongly the feature loss wanted the score up; orders equal scores.
        passes: how many were made.
        strength: lambda1 at the end.
    """

    values: torch.Tensor
    pull: torch.Tensor
    passes: int = 0
    strength: float = 0.0

    @property
    def rank(self) -> torch.Tensor:
        """Float ``[T, B]``; larger matters more. Scores first, pull among (nearly) equal ones."""
        order = self.pull.flatten().argsort().argsort().reshape(self.pull.shape)
        return self.values.double() + 1e-3 * order.double() / max(1, order.numel())


def step_weights(change: torch.Tensor) -> torch.Tensor:
    """The paper's timestep-aware weights ``w``, float ``[T]`` (Eq. 10), of the changes ``[T]``.

    The first step, never skipped, has 1.
    """
    relative = change / change.max().clamp_min(1e-12)
    weights = torch.where(relative < 0.1, 2.0, torch.where(relative < 0.5, 1.5, 1.0))
    weights[0] = 1.0
    return weights.float()


def measured_weights(runs: Sequence[Sampler]) -> torch.Tensor:
    """Weights ``w``, float ``[T]``, inverse to how far an error in a step's prediction moves the final sample. Ours.

    The feature loss of a step and its penalty have the same unit then in all steps. One run of many steps tells little of each,
    so what it tells is the median over neighbouring steps, and the mean over runs. The mean of ``1 / w`` is 1.
    """
    told = [response_of(run, gains=gains_of(run)).weights for run in runs]
    moved = torch.stack([_smoothed(x / x.mean().clamp_min(1e-12)) for x in told]).mean(0)
    moved = (moved / moved.mean().clamp_min(1e-12)).clamp(1 / MOST, MOST)
    return (1 / moved).float()


def _smoothed(values: torch.Tensor) -> torch.Tensor:
    """The mean of the middle half of the values around each step."""
    reach = len(values) // NEIGHBOURS
    parts = [values[max(0, i - reach) : i + reach + 1].sort().values for i in range(len(values))]
    return torch.stack([part[len(part) // 4 : len(part) - len(part) // 4].mean() for part in parts])


class ScoreLearner:
    """Learns the scores of a program's blocks.

    Args:
        program: the captured denoiser.
        runs: recorded runs, whose conditioning is used in turn.
        blocks: the B blocks, all branches or all streams.
        kept: what a hard mask costs.
        budget: the fraction of the MACs that is asked for.
        options: hyper-parameters; ``options.epochs`` is set.
        seed: of the scores' start and of fresh noise.
        checkpoint: a file that learning goes on from.
        judge: of a rank, the error of its mask; needed if ``options.judged``.
        start: the mask ``[T, B]`` near which scores start, in place of random ones.
    """

    def __init__(
        self,
        program: Program,
        runs: Sequence[Sampler],
        blocks: Sequence[Block],
        kept: Kept,
        budget: float,
        options: PaperOptions,
        seed: int,
        checkpoint: str | Path | None = None,
        judge: Judge | None = None,
        start: torch.Tensor | None = None,
    ) -> None:
        self._judge = judge if options.judged else None
        self.program, self.runs, self.blocks, self.kept = program, runs, tuple(blocks), kept
        self.budget, self.options, self.seed = budget, options, seed
        self.group = Group.current()
        self._forms = Forms(program, runs)
        self._measured = measured_weights(runs) if options.measured else None
        self._soft: dict[int, SoftGraph] = {}
        self._cost = LiveCost.of(program, self.blocks) if options.cost == "live" else None
        self._noise = torch.Generator().manual_seed(seed + 1)  # the same on every rank
        names = [block.name for block in self.blocks]
        told = f"({options.identity}, {budget!r}, {seed!r}, {self.group.size!r}, {names!r})"
        identity = identity_of(program, runs, (told,)) if checkpoint is not None and self.group.rank == 0 else ""
        self.state = State.start(len(runs[0].timesteps), len(self.blocks), seed, options.strength, near=start)
        self._file = None if checkpoint is None else Path(checkpoint)
        self._identity = self.group.agree(identity)
        if self._file is not None:
            found = self.state.going_on(self._file, self._identity, self._noise) if self.group.rank == 0 else self.state
            self.state, drawn = self.group.agree((found, self._noise.get_state()))
            self._noise.set_state(drawn)

    def learn(self, progress: bool) -> Scores:
        """Make the passes. Ctrl-C keeps what was learned so far."""
        total = self.options.epochs or 1
        with tqdm(total=total, initial=self.state.passes, desc="learning the mask", unit="pass", disable=not progress) as bar:
            try:
                while self.state.passes < total and not self._settled():
                    error = self._one(total)
                    bar.update()
                    bar.set_postfix(error=f"{error:.3g}", macs=f"{self.state.kept:.3f}", refresh=False)
                self._judged(last=True)
            except KeyboardInterrupt:
                logger.warning(
                    "learning was interrupted in pass %d of %d; using the scores so far", self.state.passes + 1, total
                )
        state = self.state
        return self._scores(*(state.best if len(state.best) else (state.scores, state.pull)))

    def _settled(self) -> bool:
        """Whether the mask has stopped changing, at the cost that is asked for."""
        patience, flips = self.options.patience, self.state.flips
        if not patience or len(flips) < max(2 * patience, 20) or max(flips[-patience:]) > UNCHANGED:
            return False
        return self.options.strength is not None or abs(self.state.kept / self.budget - 1) < CLOSE

    def _one(self, total: int) -> float:
        """One pass on every rank, and one update of the scores; returns the loss."""
        state, options = self.state, self.options
        if not state.passes:
            self._judged()
        used, slope = _sampled(state.scores, self._noise, options.drawn)
        number = state.passes * self.group.size + self.group.rank
        run = self.runs[number % len(self.runs)]
        seen = run_pass(run, self._lanes(run), used, options, 1_000_003 * (self.seed + 1) + number, self._measured)
        seen = self._together(seen)
        state.change = seen.change if state.passes == 0 else 0.9 * state.change + 0.1 * seen.change
        state.pull = 0.7 * state.pull - 0.3 * seen.gradient
        weights = self._weights()
        price = torch.ones_like(used) if self._cost is None else self._cost.gradient(used)
        if state.strength is not None:
            penalty = state.strength * weights.unsqueeze(1) * price * (1 + options.bimodal * (1 - 2 * used))
            half = max(0.0, 2 * state.passes / max(1, total) - 1)
            state.descend((seen.gradient + penalty) * slope, options.learning_rate * 0.1**half)
        before = state.kept
        state.finish(self.kept)
        if options.strength is None:
            worth = state.pull / weights.unsqueeze(1) / price.clamp_min(CHEAPEST)
            state.strength = _strength(state.strength, worth, self._share(), state.kept, before, self.budget)
        self._judged()
        if self._file is not None and self.group.rank == 0:
            state.write(self._file, self._identity, self._noise)
        return seen.error

    def _judged(self, last: bool = False) -> None:
        """Roll out the mask so far: at the start, every few passes, and at the end if that was not one of them."""
        if self._judge is not None and last == bool(self.state.passes % self.options.judged):
            self.state.judge(self.group.agree(self._judge(self._scores(self.state.scores, self.state.pull).rank)))

    def _scores(self, values: torch.Tensor, pull: torch.Tensor) -> Scores:
        return Scores(values.clone(), pull / self._weights().unsqueeze(1), self.state.passes, self.state.strength or 0.0)

    def _together(self, seen: Pass) -> Pass:
        """The mean over ranks."""
        size = self.group.size
        if size == 1:
            return seen
        error = self.group.sum([torch.tensor(seen.error, dtype=torch.float64)])
        return Pass(self.group.sum([seen.gradient]) / size, self.group.sum([seen.change]) / size, float(error) / size)

    def _lanes(self, run: Sampler) -> list[tuple[Program, SoftGraph]]:
        return [(program, self._soft_of(program)) for program in self._forms.of_run(run)]

    def _soft_of(self, program: Program) -> SoftGraph:
        if id(program) not in self._soft:
            soft = insert_soft_mask(program, [program.block(block.name) for block in self.blocks])
            detach_weights(soft.graph_module)
            self._soft[id(program)] = soft
        return self._soft[id(program)]

    def _share(self) -> torch.Tensor:
        return torch.tensor([block.macs for block in self.blocks], dtype=torch.float64) / max(1, self.program.macs)

    def _weights(self) -> torch.Tensor:
        if self._measured is not None:
            return self._measured
        return step_weights(self.state.change) if self.options.weighted else torch.ones(len(self.state.change))


def _sampled(scores: torch.Tensor, generator: torch.Generator, how: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores as a pass uses them, and the slope of that; the first step always computes."""
    slope = torch.ones_like(scores)
    if how == "start":
        return scores, slope
    uniform = torch.rand(scores.shape, generator=generator)
    if how == "bernoulli":  # straight through: what a pass says of the sample, it says of the probability
        used = (uniform < scores).float()
    else:  # a binary Gumbel-Softmax sample (Jang et al., 2017, at temperature 1)
        probability = scores.clamp(1e-4, 1 - 1e-4)
        used = torch.sigmoid(torch.logit(probability) + torch.logit(uniform.clamp(1e-6, 1 - 1e-6)))
        slope = ((used * (1 - used)) / (probability * (1 - probability))).clamp(max=10.0)
    used[0] = 1.0
    return used, slope


def _strength(
    strength: float | None, worth: torch.Tensor, share: torch.Tensor, kept: float, before: float, budget: float
) -> float:
    """lambda1: at first where a fitting number of blocks are worth more than it, then steered towards the budget.

    Scores follow lambda1 late, so it also reacts to where they are going.
    """
    if strength is None:
        ordered, index = worth[1:].flatten().sort()
        cost = share.repeat(len(worth) - 1)[index].cumsum(0) / len(worth)
        position = int(torch.searchsorted(cost, 1 - budget))
        return max(1e-8, float(ordered[min(position, len(ordered) - 1)]))
    return strength * math.exp(max(-FASTEST, min(FASTEST, TOWARDS * (kept - budget) + AHEAD * (kept - before))))
