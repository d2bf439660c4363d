"""Hard masks of soft scores that meet a budget of MACs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from fxmask.errors import OutcomeError
from fxmask.ir.program import Program
from fxmask.learning.outcome import TOLERANCE, Outcome
from fxmask.learning.paper.scores import kept_share


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
        kept = kept_share(rows, self.share)
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
