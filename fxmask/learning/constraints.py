"""What a plan must keep to: a budget of its cost, graphs, cached bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fxmask.learning.effort import Limits
from fxmask.learning.outcome import TOLERANCE
from fxmask.learning.schedule import Coefficients, Schedule
from fxmask.learning.student import Student
from fxmask.passes.rectify import rectify

MARGIN = 0.9  # of the tolerance: what is promised is kept after rounding too


def is_met(budget: float, spent: float) -> bool:
    """Whether a schedule meets the budget, with a margin to what is promised."""
    return abs(spent / budget - 1) <= TOLERANCE * MARGIN


def trimmed(student: Student, branches: Sequence[str], schedule: Schedule, budget: float) -> Schedule | None:
    """The schedule within the tolerance of the budget: branches of one more step are formed, or computed.

    ``None`` if that does not bring it there.
    """
    spent = student.spent(schedule)
    if is_met(budget, spent):
        return schedule
    loads = list(schedule.loads)
    # too dear: the later of two neighbouring full steps is least missed. Too cheap: the middle of the longest run
    if spent > budget:
        full = [i for i in range(1, len(loads)) if not loads[i]]
        order = sorted(full, key=lambda i: (bool(loads[i - 1]), -i))
    else:
        order = sorted((i for i in range(1, len(loads)) if loads[i]), key=lambda i: -_run_length(loads, i))
    for i in order:
        chosen: frozenset[str] = frozenset() if spent > budget else frozenset(branches)
        for name in branches:
            trial = chosen ^ {name}
            loads[i] = trial
            now = student.spent(replace(schedule, loads=tuple(loads)))
            if is_met(budget, now):
                return replace(schedule, loads=tuple(loads))
            if (now < budget) == (spent > budget):
                continue  # one block too many; a smaller one may fit
            chosen = trial
        loads[i] = chosen
        spent_now = student.spent(replace(schedule, loads=tuple(loads)))
        if (spent_now < budget) == (spent > budget):
            break
    return None


def keeps_limits(student: Student, limits: Limits, schedule: Schedule, coefficients: Coefficients | None = None) -> bool:
    """Whether a plan of this schedule keeps the limits. Only which coefficients are 0 or 1 matters for that, at most."""
    if limits == Limits():
        return True
    dummies: dict[tuple[int, str], Any] = {}
    keys = coefficients or [(i, name) for i, loads in enumerate(schedule.loads) for name in loads]
    for i, name in keys:
        sources = [s for s, _ in coefficients[i, name]] if coefficients else student.sources(schedule, i, name)
        plain = len(sources) == 1 and (not coefficients or sources[0] == i)
        dummies[i, name] = tuple((s, 1.0 if plain else 0.5) for s in sources)
    return limits.keeps(rectify(student.deployed, student.mask(schedule, dummies)))


def _run_length(loads: Sequence[frozenset[str]], i: int) -> int:
    low = high = i
    while low > 0 and loads[low - 1]:
        low -= 1
    while high + 1 < len(loads) and loads[high + 1]:
        high += 1
    return min(i - low, high - i) + 1
