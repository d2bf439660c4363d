"""A mask of its own for every block, by dynamic programming over the age of its value."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from fxmask.learning.probes import Probes
from fxmask.learning.runs import run_error
from fxmask.learning.schedule import Origin, Schedule
from fxmask.learning.student import Student


def place_blocks(
    student: Student, probes: Probes, blocks: Sequence[str], runs: torch.Tensor, budget: float, period: int = 0
) -> Schedule:
    """A mask of its own for every branch, by dynamic programming over the age of its value.

    Args:
        student: whose program.
        probes: of the B branches, from ``measure_probes``.
        blocks: the B branches.
        runs: of the level of all branches.
        budget: fraction of the full run's MACs.
        period: if given, every step of that many computes everything, which cleans all values at once.
    """
    steps = student.num_steps
    share = [1 - student.cost(frozenset([name])) for name in blocks]
    gain = torch.tensor([run_error(runs, i, 1) if i else 0.0 for i in range(steps)], dtype=torch.float64)
    gain = gain / probes.together.clamp_min(1e-30)
    single = (probes.alone * gain[:, None, None]).sqrt()  # [T, B, A], final error of one value
    # errors of one run add up in step: the square of the sum grows by this much with each step
    added = torch.zeros_like(single)
    total = torch.zeros(steps, len(blocks), dtype=torch.float64)
    for age in range(single.shape[2]):
        before = torch.cat([torch.zeros(1, len(blocks), dtype=torch.float64), total[:-1]])
        total = before + single[:, :, age]
        added[:, :, age] = total.square() - before.square()
    if period:
        added[::period] = math.inf

    def solve(price: float) -> list[frozenset[str]]:
        columns = [
            _best_ages(torch.cat([torch.zeros(steps, 1, dtype=torch.float64), added[:, b]], dim=1), price * share[b])
            for b in range(len(blocks))
        ]
        return [frozenset(name for b, name in enumerate(blocks) if columns[b][i]) for i in range(steps)]

    loads = _meet(solve, student, budget)
    return Schedule(tuple(loads), 1, 0, origin=Origin.PER_BLOCK, family=Origin.PER_BLOCK.value)


def _best_ages(table: torch.Tensor, price: float) -> list[int]:
    """Ages ``[T]`` of one block, 0 = compute, that minimise ``sum table[i, age] + price * computes``; ``[T, 1 + A]``."""
    steps, oldest = table.shape[0], table.shape[1] - 1
    rows = table.tolist()
    best = [0.0] * (oldest + 2)
    choices = []
    for i in reversed(range(steps)):
        compute = rows[i][0] + price + best[1]
        after = [compute] * (oldest + 2)
        skip = [False] * (oldest + 2)
        for age in range(1, oldest + 1):
            value = rows[i][age] + best[age + 1] if i else math.inf
            if value < after[age]:
                after[age], skip[age] = value, True
        best = after
        choices.append(skip)
    choices.reverse()
    age, ages = 0, []
    for i in range(steps):
        ages.append(age if i and choices[i][age] else 0)
        age = ages[-1] + 1
    return ages


def _meet(solve: Callable[[float], list[frozenset[str]]], student: Student, budget: float) -> list[frozenset[str]]:
    """What ``solve`` gives at the price of MACs that comes nearest to the budget, by bisection."""
    low, high = 1e-12, 1e6
    best: tuple[float, list[frozenset[str]]] | None = None
    for _ in range(50):
        price = math.sqrt(low * high)
        loads = solve(price)
        spent = sum(student.cost(x) for x in loads) / student.num_steps
        if best is None or abs(spent - budget) < abs(best[0] - budget):
            best = (spent, loads)
        if abs(spent - budget) < 0.003:
            break
        if spent > budget:
            low = price
        else:
            high = price
    assert best is not None
    return best[1]
