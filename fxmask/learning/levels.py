"""Levels: blocks that are formed together, and full steps placed between them without measuring anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fxmask.ir.program import Program
from fxmask.learning.schedule import Origin, Schedule
from fxmask.learning.student import Student, output_blocks

LEVELS = 9  # at most this many levels are tried


@dataclass(frozen=True)
class Level:
    """Blocks that are formed together, and how.

    Attributes:
        name: for reports.
        loads: their names.
        history: fresh values that a forecast reads.
        samples: noisy samples that a forecast of the output reads.
        lanes: where these have rows of their own, of each whether it forms the blocks; empty if all follow the same rows.
    """

    name: str
    loads: frozenset[str]
    history: int
    samples: int
    lanes: tuple[bool, ...] = ()

    @property
    def rows(self) -> tuple[frozenset[str], ...]:
        """What each row of a step forms."""
        return tuple(self.loads if forms else frozenset() for forms in self.lanes) or (self.loads,)

    def cost(self, student: Student) -> float:
        """What a step spends, as a share of one that computes everything."""
        return sum(map(student.cost, self.rows)) / len(self.rows)

    def schedule(self, steps: Sequence[Level | None], origin: Origin, family: str) -> Schedule:
        """A schedule of these steps, each of a level with as many rows as this one, or ``None`` where all is computed."""
        full: tuple[frozenset[str], ...] = (frozenset(),) * len(self.rows)
        loads = tuple(row for level in steps for row in (full if level is None else level.rows))
        return Schedule(loads, self.history, self.samples, lanes=len(self.rows), origin=origin, family=family)


def named_levels(
    program: Program, cost: Callable[[frozenset[str]], float], computed: Callable[[frozenset[str]], frozenset[str]]
) -> dict[frozenset[str], str]:
    """Blocks that are worth forming together, with a name for reports: the output, all branches, stages.

    Args:
        program: the captured denoiser.
        cost: of a step that forms some blocks, as a share of one that computes everything.
        computed: blocks that such a step still computes.
    """
    outputs = frozenset(b.name for b in output_blocks(program))
    branches = frozenset(b.name for b in program.branches)
    named: dict[frozenset[str], str] = {outputs: "output"} if outputs else {}
    if branches:
        named[branches] = "branches"
    stages: list[tuple[float, frozenset[str], str]] = []
    for block in program.blocks:
        if block.kind == "stage":
            alone = frozenset([block.name])
            rest = alone | (branches & computed(alone))
            stages.append((cost(alone), alone, block.name))
            stages.append((cost(rest), rest, f"{block.name} and branches"))
    last = -1.0
    for share, loads, name in sorted(stages, key=lambda s: s[0]):  # of levels that cost nearly the same, one is enough
        if share > last + 0.04 and share < 0.8 and all(abs(share - cost(other)) > 0.03 for other in named):
            named[loads] = name
            last = share
    return named


def levels_of(student: Student, samples: int) -> list[Level]:
    """The levels that are worth trying, cheapest for the step first.

    Without injected noise, forecasts of the output are tried with samples and without; with it, with samples only.

    Args:
        student: whose program.
        samples: noisy samples that forecasts of the output may read.
    """
    named = named_levels(student.program, student.cost, student.computed)
    outputs = frozenset(b.name for b in output_blocks(student.program))
    ordered = sorted(named, key=student.cost)[:LEVELS]
    levels: list[Level] = []
    for loads in ordered:
        read = samples if loads == outputs else 0
        forms = [(1, read), (3, read)]
        if read and not student.stochastic:
            forms = [(1, 0), (3, 0), *((3, read) for name in sorted(loads) if student.reads_samples(name))]
        levels += [Level(named[loads], loads, history, of_samples) for history, of_samples in forms]
    return levels


def count_full(student: Student, level: Level, budget: float) -> int | None:
    """How many full steps, with the level in between, come nearest to a budget.

    ``None`` if the level alone costs as much, or saves less than 3 % of a step.
    """
    steps, cost = student.num_steps, student.cost(level.loads)
    if cost >= budget or cost > 0.97:
        return None
    return min(steps, max(1, round((budget - cost) / (1 - cost) * steps)))


def evenly(student: Student, level: Level, budget: float, bend: float = 1.0) -> Schedule | None:
    """Full steps at equal distances, or denser at the beginning (``bend`` > 1) or at the end (< 1).

    ``None`` if the level saves too little for the budget.
    """
    steps, count = student.num_steps, count_full(student, level, budget)
    if count is None:
        return None
    full: list[int] = []
    for k in range(count):
        wanted = round((k / count) ** bend * steps)
        full.append(min(max(wanted, full[-1] + 1 if full else 0), steps - count + k))
    loads = tuple(frozenset() if i in full else level.loads for i in range(steps))
    return Schedule(loads, level.history, level.samples, origin=Origin.EVEN if bend == 1.0 else Origin.BENT, family=level.name)


BENDS = (0.75, 1.35)
