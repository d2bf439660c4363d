"""Where schedules come from: measured errors, then exact dynamic programming.

A *level* is a set of blocks that are formed together (the whole output, a stage, all branches). Two things are measured on
recorded runs, by running the network, never guessed:

    run[i, r]      error of the final samples when a level is formed at the r steps from i on, and nowhere else. Errors of
                   neighbouring steps add up in step, so runs are measured whole; it is not the sum of its steps' errors
    probe[i, b, a] <u, J_b (v_b(i-a) - v_b(i))> for random u: the output error, to first order, when block b has its
                   value of a steps ago; squares over u and images estimate its square norm (Hutchinson)

Full steps are placed by dynamic programming over the runs between them. A mask of its own for every block comes from
dynamic programming over the age of the block's value, with probes scaled so that all branches together have the measured
error of a run. Both are exact for that model of the error. What is really good is decided later, on rollouts.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from fxmask.program import Program
from fxmask.student import Schedule, Student, output_blocks, per_image
from fxmask.trajectory import Trajectory

logger = logging.getLogger(__name__)

MAX_AGE = 8
MAX_RUN = 3  # longer runs are extrapolated
PROBES = 2
MEMORY = 2 << 30  # bytes of recorded block values that may be held at once
LEVELS = 9  # at most this many levels are tried
GRAIN = 0.025  # of a step's MACs, to which ``place_mixed`` rounds
SLACK = 0.02  # of the budget, within which ``place_mixed`` stays
LONGEST = 12  # formed steps in a row that it may choose


@dataclass(frozen=True)
class Level:
    """Blocks that are formed together, and how.

    Attributes:
        name: for reports.
        loads: their names.
        history: fresh values that a forecast reads.
        samples: noisy samples that a forecast of the output reads.
    """

    name: str
    loads: frozenset[str]
    history: int
    samples: int


def measure_runs(student: Student, level: Level, starts: int, bar: Callable[[], None] = lambda: None) -> torch.Tensor:
    """Relative errors float64 ``[T, R]`` of runs of 1..R formed steps from each step on; infinite where there is none.

    About ``starts`` first steps are tried, with the last three and the first two among them; those between are
    interpolated. Mean of the logarithm over images, as in ``Student.score``.
    """
    steps = student.num_steps
    inner = [round(1 + k * (steps - 2) / max(1, starts - 1)) for k in range(starts)]
    tried = sorted({*inner, 1, 2, steps - 3, steps - 2, steps - 1} & set(range(1, steps)))
    base = student.rollout(_stored(level, steps), keep=True)
    table = torch.full((steps, MAX_RUN), math.inf, dtype=torch.float64)
    for length in range(1, MAX_RUN + 1):
        known = {}
        for first in tried if length == 1 else [i for k, i in enumerate(tried) if k % 2 == 0 or i >= steps - 3]:
            if first + length > steps:
                continue
            loads = tuple(level.loads if first <= i < first + length else frozenset() for i in range(steps))
            rolled = student.rollout(Schedule(loads, level.history, level.samples), None, base, first)
            known[first] = 10 ** (student.score(rolled) / 10)
            bar()
        for i in range(1, steps - length + 1):
            table[i, length - 1] = _between(known, i)
    return table


def _stored(level: Level, steps: int) -> Schedule:
    """Full steps that store what the level reads."""
    return Schedule((frozenset(),) * (steps - 1) + (level.loads,), level.history, level.samples)


def _between(known: Mapping[int, float], step: int) -> float:
    """Geometric interpolation."""
    if step in known:
        return known[step]
    below = max((k for k in known if k < step), default=min(known))
    above = min((k for k in known if k > step), default=max(known))
    share = 0.0 if above == below else (step - below) / (above - below)
    return math.exp((1 - share) * math.log(known[below] + 1e-30) + share * math.log(known[above] + 1e-30))


class Probes(NamedTuple):
    """Mean squares of probes over directions and images, float64.

    Attributes:
        alone: of each block at ages 1..A, ``[T, B, A]``.
        together: of the sum over all blocks at age 1, ``[T]``.
    """

    alone: torch.Tensor
    together: torch.Tensor


def has_derivatives(program: Program) -> bool:
    """Whether the prediction can be differentiated by every float input that it depends on; custom operators often cannot."""
    tensors = list(program.example.tensors.values())
    outputs, _ = _forward(program.graph_module, tensors, {})
    try:
        outputs[0].sum().backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        logger.info("the denoiser has no derivatives, so plans that need them are not tried: %s", error)
        return False
    return True


def measure_probes(student: Student, blocks: Sequence[str]) -> Probes:
    """Probes of some blocks, from forwards and backwards through every recorded call of the first lane."""
    lanes = len(student.order) / student.num_steps
    student.units += (1 + 2 * PROBES) / lanes  # of each step: one forward pass, and a backward pass of twice that per probe
    first = student.first_trajectory()
    parts = [_probes_of(student, t, first + n, blocks) for n, t in enumerate(student.trajectories)]
    probes = torch.cat(student.group.gather(parts), dim=1).double()
    return Probes(probes.pow(2).mean(dim=1), probes[..., 0].sum(dim=2).pow(2).mean(dim=1))


def _probes_of(student: Student, trajectory: Trajectory, seed: int, blocks: Sequence[str]) -> torch.Tensor:
    """Probes float32 ``[T, R, B, A]`` for R (direction, image) pairs."""
    program = student.program
    values = {value: b for b, name in enumerate(blocks) for value in program.block(name).values}
    window: list[dict[str, torch.Tensor]] = []  # values of the latest steps, this one last
    images = trajectory.batch_size
    rows = []
    generator = torch.Generator().manual_seed(seed)
    for step in range(student.num_steps):
        bound = program.signature.bind((), dict(trajectory.calls[step][0]))
        outputs, found = _forward(program.graph_module, list(bound.tensors.values()), values)
        window = [*window, {name: value.detach() for name, value in found.items()}][-MAX_AGE - 1 :]
        held = sum(v.numel() * v.element_size() for kept in window for v in kept.values())
        if held > MEMORY:
            window = window[-2:]
        table = torch.zeros(PROBES, images, len(blocks), MAX_AGE)
        names = [name for name, value in found.items() if value.requires_grad]
        for r in range(PROBES if step and names else 0):
            u = torch.randn(outputs[0].shape, generator=generator).to(outputs[0])
            wanted = [found[n] for n in names]
            gradients = torch.autograd.grad(outputs[0], wanted, u, retain_graph=r + 1 < PROBES, allow_unused=True)
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is None:
                    continue
                for age in range(1, len(window)):
                    moved = window[-1 - age][name] - window[-1][name]
                    products = per_image(gradient * moved, images) / math.sqrt(outputs[0].numel() / images)
                    table[r, :, values[name], age - 1] += products.cpu()
            del gradients
        if step:  # older than the run: as bad as the oldest there is
            table[..., len(window) - 1 :] = table[..., len(window) - 2 : len(window) - 1]
        rows.append(table.flatten(0, 1))
    return torch.stack(rows)


@torch.enable_grad()
def _forward(
    module: fx.GraphModule, tensors: Sequence[torch.Tensor], wanted: Mapping[str, int]
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Outputs of a graph and some of its values, with gradients from the first wanted value on."""
    values: dict[fx.Node, Any] = {}
    arguments = iter(tensors)
    found: dict[str, torch.Tensor] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            value = next(arguments)
            values[node] = value.detach().requires_grad_() if value.is_floating_point() else value
        elif node.op == "get_attr":
            weight = operator.attrgetter(str(node.target))(module)
            values[node] = weight.detach() if isinstance(weight, torch.Tensor) else weight
        elif node.op == "output":
            return list(fx.map_arg(node.args[0], lambda n: values[n])), found
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
            result = node.target(*args, **kwargs)
            values[node] = result
            if node.name in wanted and isinstance(result, torch.Tensor):
                found[node.name] = result
    raise AssertionError("a graph ends with its output")


# Schedules


def levels_of(student: Student, samples: int) -> list[Level]:
    """The levels that are worth trying, cheapest for the step first.

    Args:
        student: whose program.
        samples: noisy samples that forecasts of the output may read.
    """
    program = student.program
    outputs = frozenset(b.name for b in output_blocks(program))
    branches = frozenset(b.name for b in program.branches)
    named: dict[frozenset[str], str] = {outputs: "output"} if outputs else {}
    if branches:
        named[branches] = "branches"
    stages: list[tuple[float, frozenset[str], str]] = []
    for block in program.blocks:
        if block.kind == "stage":
            alone = frozenset([block.name])
            rest = alone | (branches & student.fresh(alone))
            stages.append((student.cost(alone), alone, block.name))
            stages.append((student.cost(rest), rest, f"{block.name} and branches"))
    last = -1.0
    for cost, loads, name in sorted(stages, key=lambda s: s[0]):  # of levels that cost nearly the same, one is enough
        if cost > last + 0.04 and cost < 0.8 and all(abs(cost - student.cost(other)) > 0.03 for other in named):
            named[loads] = name
            last = cost
    ordered = sorted(named, key=student.cost)[:LEVELS]
    return [Level(named[loads], loads, history, samples if loads == outputs else 0) for loads in ordered for history in (1, 3)]


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
    return Schedule(loads, level.history, level.samples, kind=f"{level.name}, even" if bend == 1.0 else f"{level.name}, bent")


BENDS = (0.75, 1.35)


def place(student: Student, levels: Sequence[tuple[Level, torch.Tensor]], budget: float) -> Schedule | None:
    """Full steps, and a level for each run between them, where the measured runs say.

    Exact dynamic programming over (position, full steps so far). With several levels, those of one cost.

    Args:
        student: whose program.
        levels: what may be formed, each with its errors of runs ``[T, R]``.
        budget: fraction of the full run's MACs.
    """
    dearest = max((level for level, _ in levels), key=lambda level: student.cost(level.loads))
    steps, count = student.num_steps, count_full(student, dearest, budget)
    if count is None:
        return None
    best = [[math.inf] * (count + 1) for _ in range(steps + 1)]  # best[i][n]: steps before i are done, n of them full
    came: dict[tuple[int, int], tuple[int, Level]] = {}
    best[0][0] = 0.0
    for first in range(steps):
        errors = [_cheapest(levels, first + 1, length) for length in range(steps - first)]
        for n in range(count):
            if best[first][n] == math.inf:
                continue
            for length, (error, level) in enumerate(errors):
                after = first + 1 + length
                if best[first][n] + error < best[after][n + 1]:
                    best[after][n + 1] = best[first][n] + error
                    came[after, n + 1] = first, level
    loads: list[frozenset[str]] = [frozenset()] * steps
    position, n = steps, count
    while position:
        first, level = came[position, n]
        loads[first + 1 : position] = [level.loads] * (position - first - 1)
        position, n = first, n - 1
    name = " or ".join(level.name for level, _ in levels)
    history, samples = (max(getattr(level, field) for level, _ in levels) for field in ("history", "samples"))
    return Schedule(tuple(loads), history, samples, kind=f"{name}, placed")


def place_mixed(student: Student, levels: Sequence[tuple[Level, torch.Tensor]], budget: float) -> Schedule | None:
    """As ``place``, but the levels of the runs may differ in cost: some steps form more, others less.

    Exact dynamic programming over (position, MACs so far), with the MACs of a run rounded to ``GRAIN`` of a step.
    """
    steps, best = student.num_steps, _Table(student.num_steps, budget)
    for first in range(steps):
        for length in range(min(steps - first, LONGEST + 1)):
            for k, (level, runs) in enumerate(levels if length else levels[:1]):
                cost = 1 + length * student.cost(level.loads)
                best.offer(first, first + 1 + length, cost, _run_error(runs, first + 1, length), k)
    found = best.path()
    if found is None:
        return None
    loads: list[frozenset[str]] = [frozenset()] * steps
    for first, after, k in found:
        loads[first + 1 : after] = [levels[k][0].loads] * (after - first - 1)
    history, samples = (max(getattr(level, field) for level, _ in levels) for field in ("history", "samples"))
    return Schedule(tuple(loads), history, samples, kind=f"{' or '.join(level.name for level, _ in levels)}, mixed")


class _Table:
    """Smallest errors of the steps before each position, by MACs spent so far (in grains)."""

    def __init__(self, steps: int, budget: float) -> None:
        self.most = int((budget * (1 + SLACK)) * steps / GRAIN)
        self.least = math.ceil((budget * (1 - SLACK)) * steps / GRAIN)
        self.errors = torch.full((steps + 1, self.most + 1), math.inf, dtype=torch.float64)
        self.errors[0, 0] = 0.0
        self.came = torch.full((steps + 1, self.most + 1, 3), -1, dtype=torch.long)  # first step, grains, level

    def offer(self, first: int, after: int, cost: float, error: float, level: int) -> None:
        """A way from one position to another; positions must be left in order."""
        grains = round(cost / GRAIN)
        if grains > self.most or not math.isfinite(error):
            return
        found = self.errors[first, : self.most + 1 - grains] + error
        better = found < self.errors[after, grains:]
        self.errors[after, grains:][better] = found[better]
        self.came[after, grains:][better] = torch.tensor([first, grains, level])

    def path(self) -> list[tuple[int, int, int]] | None:
        """(first step, position behind, level) of the runs of the best way to the end."""
        ends = self.errors[-1, self.least :]
        if not bool(ends.isfinite().any()):
            return None
        position, spent = len(self.errors) - 1, self.least + int(ends.argmin())
        runs = []
        while position:
            first, grains, level = self.came[position, spent].tolist()
            runs.append((first, position, level))
            position, spent = first, spent - grains
        return runs


def _cheapest(levels: Sequence[tuple[Level, torch.Tensor]], first: int, length: int) -> tuple[float, Level]:
    return min(((_run_error(runs, first, length), level) for level, runs in levels), key=lambda pair: pair[0])


def _run_error(runs: torch.Tensor, first: int, length: int) -> float:
    """Error of a run; beyond what was measured, the growth from the last two lengths goes on as a power law."""
    if length == 0:
        return 0.0
    known = min(length, MAX_RUN)
    while known > 1 and not math.isfinite(float(runs[first, known - 1])):
        known -= 1
    error = float(runs[first, known - 1])
    power = 2.0
    if known > 1:
        growth = math.log(max(1.0, error / max(1e-30, float(runs[first, known - 2]))))
        power = min(6.0, max(1.0, growth / math.log(known / (known - 1))))
    return float(error * (length / known) ** power)


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
    gain = torch.tensor([_run_error(runs, i, 1) if i else 0.0 for i in range(steps)], dtype=torch.float64)
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
    return Schedule(tuple(loads), 1, 0, kind=f"per block, period {period}" if period else "per block")


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
