"""Hard masks of soft scores that meet a budget of MACs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from fxmask.errors import OutcomeError
from fxmask.ir.mask import Mask
from fxmask.ir.plan import Plan
from fxmask.ir.program import Program
from fxmask.learning.outcome import TOLERANCE, Outcome
from fxmask.passes.rectify import rectify

ROUNDS = 8


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

    def kept(self, compute: torch.Tensor) -> float:
        """Fraction of the full MACs that a mask ``[T, B]`` keeps."""
        return float(1 - ((~compute).double() @ self.share).mean())

    @property
    def least(self) -> float:
        """Smallest reachable fraction of MACs: every branch computed at the first step only."""
        return float(1 - self.share.sum() * (self.num_steps - 1) / self.num_steps)

    def check(self, outcome: Outcome, max_graphs: int | None) -> None:
        """Raise ``OutcomeError`` if no mask over the branches can meet the outcome."""
        _check(outcome, 1.0 if max_graphs == 1 else self.least, f"{len(self.share)} branches", self.num_steps)

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
        _check_met(self.kept(rows), budget, max_graphs)
        return rows


class StreamBudget:
    """MACs of masks over stream blocks, as rectified, and the masks that meet a budget.

    What a stream spares depends on what else of the step is skipped, so costs are those of plans.

    Args:
        program: the captured denoiser.
        timesteps: the T steps.
        free: names of the streams that may be skipped; all of them if not given.
    """

    def __init__(self, program: Program, timesteps: tuple[float, ...], free: frozenset[str] | None = None) -> None:
        self._program, self._timesteps = program, timesteps
        self.names = tuple(block.name for block in program.streams)
        self._held = torch.tensor([free is not None and name not in free for name in self.names], dtype=torch.bool)

    def plan(self, compute: torch.Tensor) -> Plan:
        """The plan of a mask ``[T, B]``; what may not be skipped is computed."""
        rows = compute | self._held
        rows[0] = True
        return rectify(self._program, Mask(rows, self._timesteps, self.names, fingerprint=self._program.fingerprint))

    def kept(self, compute: torch.Tensor) -> float:
        """Fraction of the full MACs that a mask ``[T, B]`` keeps."""
        return 1 / self.plan(compute).mac_ratio

    @property
    def least(self) -> float:
        """Smallest reachable fraction of MACs: every stream computed at the first step only."""
        return self.kept(torch.zeros(len(self._timesteps), len(self.names), dtype=torch.bool))

    def check(self, outcome: Outcome, max_graphs: int | None) -> None:
        """Raise ``OutcomeError`` if no mask over the streams can meet the outcome."""
        least = 1.0 if max_graphs == 1 else self.least
        _check(outcome, least, f"{int((~self._held).sum())} stream blocks", len(self._timesteps))

    def project(self, rank: torch.Tensor, budget: float, max_graphs: int | None, seed: int) -> torch.Tensor:
        """The mask ``[T, B]`` that computes what ranks highest and whose plan's MACs come nearest to ``budget``.

        Steps that share a row before rectification may need other graphs after it; then more of them share one.

        Raises:
            OutcomeError: with so few graphs no mask comes within 3 %.
        """
        own = torch.arange(len(rank))
        best = self._adjusted(self._nearest(rank, budget), rank, budget, own)
        for groups in range(max_graphs or 0, 0, -1):
            if best.distinct_graphs <= (max_graphs or len(rank)) and _is_met(1 / best.mac_ratio, budget):
                break
            members = _group_rows(rank, groups, seed)
            shared = torch.stack([rank[members == g].double().mean(0) for g in range(int(members.max()) + 1)])[members]
            best = self._adjusted(self._nearest(shared, budget), shared, budget, members)
        if max_graphs is not None and best.distinct_graphs > max_graphs:
            raise OutcomeError(f"no mask with macs={budget:.4g} has {max_graphs} step graphs or fewer; allow more max_graphs")
        _check_met(1 / best.mac_ratio, budget, max_graphs)
        rows: torch.Tensor = best.source.compute
        return rows

    def _adjusted(self, plan: Plan, rank: torch.Tensor, budget: float, members: torch.Tensor) -> Plan:
        """Change entries that rank next to the threshold, of a group of steps at a time, while that brings a mask nearer.

        Only short masks need it, of which one entry is much of the budget.
        """
        for _ in range(ROUNDS):
            if abs(1 / plan.mac_ratio / budget - 1) <= TOLERANCE / 3:
                break
            rows = plan.source.compute
            edge = float(rank[1:][rows[1:]].min()) if bool(rows[1:].any()) else math.inf
            distance = (rank.double() - min(edge, float(rank.max()))).abs()
            distance[members == members[0]], distance[:, self._held] = math.inf, math.inf
            near = distance.flatten().argsort()[: min(6 * len(self.names), int(distance.isfinite().sum()))]
            entries = dict.fromkeys((int(members[e // rank.shape[1]]), int(e % rank.shape[1])) for e in near)
            tried = [self.plan(rows ^ ((members == g).unsqueeze(1) & self._is(b))) for g, b in entries]
            best = min([plan, *tried], key=lambda p: abs(1 / p.mac_ratio - budget))
            if best is plan:
                break
            plan = best
        return plan

    def _is(self, block: int) -> torch.Tensor:
        return torch.arange(len(self.names)) == block

    def _nearest(self, rank: torch.Tensor, budget: float) -> Plan:
        """Of all thresholds on the rank the one whose plan comes nearest, by bisection."""
        levels = torch.tensor(sorted(set(rank[1:, ~self._held].double().flatten().tolist())), dtype=torch.float64)
        low, high = 0, len(levels)
        best: Plan | None = None
        while low <= high:
            middle = (low + high) // 2
            rows = rank.double() >= levels[middle] if middle < len(levels) else torch.zeros(rank.shape, dtype=torch.bool)
            plan = self.plan(rows)
            if best is None or abs(1 / plan.mac_ratio - budget) < abs(1 / best.mac_ratio - budget):
                best = plan
            low, high = (middle + 1, high) if 1 / plan.mac_ratio > budget else (low, middle - 1)
        assert best is not None
        return best


def _check(outcome: Outcome, least: float, blocks: str, steps: int) -> None:
    if outcome.budget < least / (1 + TOLERANCE):
        raise OutcomeError(
            f"speedup={1 / outcome.budget:.4g} (macs={outcome.budget:.4g}) is out of reach: with all "
            f"{blocks} skipped after the first of {steps} steps, speedup={1 / least:.4g} "
            f"(macs={least:.4g}) is the most. Ask for less, or take more steps"
        )


def _is_met(kept: float, budget: float) -> bool:
    return abs(kept / budget - 1) <= TOLERANCE


def _check_met(kept: float, budget: float, max_graphs: int | None) -> None:
    if not _is_met(kept, budget):
        raise OutcomeError(
            f"macs={budget:.4g} (speedup={1 / budget:.4g}) cannot be met within {TOLERANCE:.0%}"
            + (f" with max_graphs={max_graphs}" if max_graphs else "")
            + f": the nearest is macs={kept:.4g} (speedup={1 / kept:.4g})"
        )


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
