"""How fast step graphs are: measured speed-ups beside ideal ones, the cost of compiling, kernels.

A speed-up is a ratio to the same model under ``torch.compile`` with static shapes. Everything that is compared runs in one
process, in turns, and the median of the ratios of each turn is reported with a bootstrap interval: other work on the
machine slows both sides of a turn. What fails is a row with its reason, and the others are measured all the same.
"""

from __future__ import annotations

import contextlib
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm

from fxmask.api import compile
from fxmask.backends import inductor
from fxmask.backends.generated_code import count_calls, generated_code
from fxmask.errors import FxmaskError
from fxmask.frontend.capture import capture
from fxmask.frontend.modules import module_device
from fxmask.ir.macs import count_macs
from fxmask.ir.program import Program
from fxmask.passes.rectify import rectify
from fxmask.runtime.model import AcceleratedModel
from fxmask.timing import timed
from fxmask.tools.bench_masks import random_mask, timesteps_of
from fxmask.tools.place import current, describe_failure, release

PLAIN = "torch.compile"
REDUCED = "torch.compile, reduce-overhead"
EAGER = "eager"
BASELINES = (EAGER, PLAIN, REDUCED)


class LostDevice(FxmaskError):
    """After a failure, the GPU answers no process that was there when it happened."""


@dataclass(frozen=True)
class Configuration:
    """One way to run the denoiser over all steps.

    Attributes:
        name: for the table.
        ratio: asked ratio of MACs, 1 for a mask of ones; ``None`` for the model itself.
        mode: how step graphs are compiled; of the model itself, the mode of ``torch.compile``.
        backend: by what.
    """

    name: str
    ratio: float | None = None
    mode: str | None = None
    backend: str = "inductor"


@dataclass
class Measurement:
    """What was measured of a variant.

    Attributes:
        name: of the variant.
        macs: ideal speed-up by the mask alone: MACs of the full run over MACs of the plan.
        executed: ideal speed-up by everything: MACs of the full run over MACs in the step graphs and before them.
        speedup: median of the ratios to the compiled model; ``interval`` is its 95 % bootstrap interval.
        against_reduced: the same to ``torch.compile(mode="reduce-overhead")``, where that was measured.
        seconds: median of a whole run.
        error: largest difference from the compiled model's outputs relative to their largest value; only where ``macs`` is 1.
        graphs: distinct step graphs.
        compilations: how many graphs Inductor was given.
        kernels: (step, share of the MACs that it keeps, kernels, extern calls) for each distinct step graph.
        cold_seconds: first run of all steps in a process of its own, compilation included; ``cold_ratio`` to the model's.
        peak_bytes: largest memory of that process.
        problem: why it was not measured.
        case, batch, dtype, device: of the model, where several are compared.
    """

    name: str
    macs: float = 1.0
    executed: float = 1.0
    speedup: float | None = None
    interval: tuple[float, float] | None = None
    seconds: float | None = None
    error: float | None = None
    graphs: int | None = None
    compilations: int | None = None
    kernels: list[tuple[int, float, int, int]] = field(default_factory=list)
    cold_seconds: float | None = None
    cold_ratio: float | None = None
    peak_bytes: int | None = None
    against_reduced: float | None = None
    problem: str | None = None
    case: str | None = None
    batch: int | None = None
    dtype: str | None = None
    device: str | None = None

    @property
    def efficiency(self) -> float | None:
        """Measured over ideal speed-up."""
        return None if self.speedup is None else self.speedup / self.macs


def configurations(
    ratios: Sequence[float], modes: Sequence[str], backends: Sequence[str] = ("inductor",), reduced: bool = False
) -> list[Configuration]:
    """Eager, compiled, a mask of ones, and each ratio in each mode of each backend.

    Args:
        ratios: of MACs.
        modes: of the backends.
        backends: that compile step graphs.
        reduced: whether the model is also measured with ``torch.compile(mode="reduce-overhead")``, which has CUDA graphs.
    """
    made = [Configuration(EAGER), Configuration(PLAIN)]
    if reduced:
        made.append(Configuration(REDUCED, mode="reduce-overhead"))
    for backend in backends:
        for mode in modes:
            name = f"fxmask {mode}" if backend == "inductor" else f"fxmask {mode} ({backend})"
            for ratio in (1.0, *ratios):
                made.append(Configuration(f"{name}, " + ("all ones" if ratio == 1 else f"{ratio:g}x"), ratio, mode, backend))
    return made


@dataclass(frozen=True)
class Run:
    """All steps of one configuration; called, it returns the last output.

    Attributes:
        model: the denoiser as it is compiled.
        calls: the arguments of each step.
    """

    model: Any
    calls: Sequence[Mapping[str, Any]]

    @property
    def accelerated(self) -> AcceleratedModel | None:
        """The model, if it is ours."""
        ours = hasattr(type(self.model), "is_accelerated")  # isinstance would say what the original is
        return self.model if ours else None

    def __call__(self) -> torch.Tensor:
        """Run all steps."""
        return self.inside(None)

    @torch.no_grad()
    def inside(self, around: Callable[[int], contextlib.AbstractContextManager[Any]] | None) -> torch.Tensor:
        """The same, with each step inside of what ``around`` makes of its number."""
        with self.model.generation() if self.accelerated is not None else contextlib.nullcontext():
            for i, call in enumerate(self.calls):
                if around is None:
                    output = self.model(**call)
                    continue
                with around(i):
                    output = self.model(**call)
        return _first(output)


def _nothing(name: str) -> None:
    """What is done before a configuration is compiled, by default."""


class Bench:
    """Runs variants of one denoiser in this process.

    Args:
        model: the denoiser, in eval mode.
        call: arguments of one call.
        num_steps: T.
        seed: of the masks.
        batch: of arguments that ``call`` lacks.
        distinct: rows of the masks, see ``random_mask``.

    Attributes:
        runs: what was measured, by name of the configuration.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        call: Mapping[str, Any],
        num_steps: int,
        seed: int = 0,
        *,
        batch: int = 2,
        distinct: int | None = None,
    ) -> None:
        self.model = model
        self.device = module_device(model)
        self.program = capture(model, call, batch_size=batch)
        self.calls, self.timesteps = _calls(self.program, num_steps)
        self.num_steps = num_steps
        self.seed = seed
        self.distinct = distinct
        self.runs: dict[str, Run] = {}

    def prepare(self, variant: Configuration) -> Run:
        """A function that runs all steps and returns the last output."""
        if variant.ratio is not None:
            return Run(self.accelerated(variant), self.calls)
        if variant.name == EAGER:
            return Run(self.model, self.calls)
        return Run(torch.compile(self.model, dynamic=False, mode=variant.mode), self.calls)

    def accelerated(self, variant: Configuration) -> AcceleratedModel:
        """The accelerated model of a variant, not compiled yet."""
        assert variant.ratio is not None
        mask = random_mask(
            self.program, self.num_steps, variant.ratio, self.seed, distinct=self.distinct, timesteps=self.timesteps
        )
        return compile(self.program, rectify(self.program, mask), backend=variant.backend, mode=variant.mode)

    def measure(
        self,
        chosen: Sequence[Configuration],
        repeats: int,
        progress: bool = True,
        begin: Callable[[str], None] = _nothing,
    ) -> list[Measurement]:
        """Compile everything, then run the variants in turns.

        Args:
            chosen: what is compared; ratios are to the one that is called ``PLAIN``.
            repeats: turns.
            progress: show progress bars.
            begin: called with the name of each before it is compiled or run.

        Raises:
            LostDevice: nothing more can be run in this process.
        """
        rows = [Measurement(variant.name) for variant in chosen]
        with current(self.device):
            expected: torch.Tensor | None = None
            for variant, row in tqdm(
                list(zip(chosen, rows, strict=True)), desc="compiling", unit="variant", disable=not progress
            ):
                begin(variant.name)
                output = self._attempt(row, lambda row=row, variant=variant: self._compile(variant, row))  # type: ignore[misc]
                if variant.name == PLAIN:
                    expected = output
                elif output is not None and expected is not None and row.macs == 1:
                    row.error = float((output - expected).abs().max() / expected.abs().max())
            taken = self._take_turns(rows, repeats, progress, begin)
        compare(rows, taken)
        return rows

    def _compile(self, variant: Configuration, row: Measurement) -> torch.Tensor:
        """The first run of a variant, and what its plan says."""
        before = inductor.compilations
        run = self.prepare(variant)
        if run.accelerated is not None:
            plan = run.accelerated.plan
            row.macs, row.graphs = plan.mac_ratio, plan.distinct_graphs
            row.executed = self.executed_ratio(run.accelerated)
        output = run()
        if self.device.type == "cuda":
            output = run()  # CUDA graphs are recorded in the second one
        row.compilations = inductor.compilations - before if run.accelerated is not None else None
        self.runs[variant.name] = run
        return output

    def _take_turns(
        self, rows: Sequence[Measurement], repeats: int, progress: bool, begin: Callable[[str], None]
    ) -> list[list[float]]:
        """Seconds of every run of each row."""
        taken: list[list[float]] = [[] for _ in rows]
        order = list(range(len(rows)))
        for turn in tqdm(range(repeats), desc="measuring", unit="turn", disable=not progress):
            random.Random(turn).shuffle(order)
            for k in order:
                run = self.runs.get(rows[k].name)
                if run is not None:
                    begin(rows[k].name)
                    measured = self._attempt(rows[k], lambda run=run: timed(run)[0])  # type: ignore[misc]
                    taken[k].append(measured if measured is not None else float("nan"))
        return taken

    def _attempt(self, row: Measurement, work: Callable[[], Any]) -> Any:
        """What ``work`` returns; ``None`` if it fails, and the reason in the row.

        Raises:
            LostDevice: the GPU does not answer any more.
        """
        try:
            return work()
        except Exception as error:  # of a compiler, of a device, of a mask: the others are still measured
            row.problem = describe_failure(error, self.device)
        self.runs.pop(row.name, None)
        try:
            release(self.device)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except RuntimeError as error:  # what CUDA says after an illegal access, for instance, it says for ever
            raise LostDevice(row.problem) from error
        return None

    def executed_ratio(self, accelerated: AcceleratedModel) -> float:
        """MACs of the full run over those that a run of the accelerated model executes."""
        executor = accelerated.executor
        prologues = executor.graphs.prologue_runner(executor.plan).prologues
        total = prologues.once.macs if prologues.once else 0
        total += prologues.table.macs * self.num_steps if prologues.table else 0
        for step in range(self.num_steps):
            total += sum(count_macs(node) for node in executor.graphs.get(executor.plan, step)[0].graph_module.graph.nodes)
        return self.program.macs * self.num_steps / max(1, total)

    def count_kernels(self, variant: Configuration) -> list[tuple[int, float, int, int]]:
        """(step, share of MACs that it keeps, kernels, extern calls) for each distinct step graph."""
        accelerated = self.accelerated(variant)
        executor = accelerated.executor
        with generated_code():
            Run(accelerated, self.calls)()
        counts: dict[int, tuple[int, float, int, int]] = {}
        for i, step in enumerate(accelerated.plan.steps):
            _, run = executor.graphs.get(executor.plan, i)
            codes = [code for part in inductor.parts_of(run) for code in part.code]
            kernels = sum(count_calls(code)[0] for code in codes)
            externs = sum(count_calls(code)[1] for code in codes)
            counts.setdefault(step.graph, (i, accelerated.plan.kept_per_step[i], kernels, externs))
        return list(counts.values())


def compare(rows: Sequence[Measurement], taken: Sequence[Sequence[float]]) -> None:
    """Fill in medians and ratios from the seconds of each turn."""
    seconds_of = {row.name: seconds for row, seconds in zip(rows, taken, strict=True) if row.problem is None}
    plain, reduced = seconds_of.get(PLAIN), seconds_of.get(REDUCED)
    for row in rows:
        seconds = seconds_of.get(row.name)
        if not seconds:
            continue
        row.seconds = statistics.median(seconds)
        if plain:
            ratios = [a / b for a, b in zip(plain, seconds, strict=True)]
            row.speedup, row.interval = statistics.median(ratios), bootstrap(ratios)
        if reduced:
            row.against_reduced = statistics.median(a / b for a, b in zip(reduced, seconds, strict=True))


def _calls(program: Program, num_steps: int) -> tuple[list[dict[str, Any]], tuple[float, ...]]:
    """The arguments of each step, and its timestep as the denoiser receives it."""
    arguments = program.example.arguments
    calls, timesteps = [], []
    for value in timesteps_of(num_steps):
        call = dict(arguments)
        name = program.signature.timestep
        if name is not None:
            example = torch.as_tensor(arguments[name])
            scale = 1 if float(example.abs().max()) > 1 or not example.is_floating_point() else 1000
            call[name] = torch.full_like(example, value / scale)
            value = float(call[name].flatten()[0])
        calls.append(call)
        timesteps.append(value)
    return calls, tuple(timesteps)


def _first(output: Any) -> torch.Tensor:
    value = output if isinstance(output, torch.Tensor) else output[0]
    assert isinstance(value, torch.Tensor)
    return value


def bootstrap(values: Sequence[float], resamples: int = 1000) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    drawn = random.Random(0)
    medians = sorted(statistics.median(drawn.choices(list(values), k=len(values))) for _ in range(resamples))
    return medians[int(0.025 * resamples)], medians[int(0.975 * resamples) - 1]


def add_kernels(bench: Bench, chosen: Sequence[Configuration], rows: Sequence[Measurement]) -> None:
    """Fill in the kernels of every step graph of what could be measured."""
    by_name = {row.name: row for row in rows}
    wanted = [v for v in chosen if v.ratio is not None and by_name[v.name].problem is None]
    for variant in tqdm(wanted, desc="counting kernels", unit="variant"):
        by_name[variant.name].kernels = bench.count_kernels(variant)
