"""How fast step graphs are: measured speed-ups beside ideal ones, the cost of compiling, kernels.

A speed-up is a ratio to the same model under ``torch.compile`` with static shapes. Everything that is compared runs in one
process, in turns, and the median of the ratios of each turn is reported with a bootstrap interval: other work on the
machine slows both sides of a turn. Compilation is timed in processes of its own, with an empty compilation cache.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from fxmask.api import compile
from fxmask.backends import inductor
from fxmask.backends.generated_code import count_calls, generated_code
from fxmask.errors import FxmaskError, InputError
from fxmask.frontend.capture import capture
from fxmask.ir.macs import count_macs
from fxmask.ir.program import Program
from fxmask.passes.rectify import rectify
from fxmask.runtime.model import AcceleratedModel
from fxmask.timing import timed
from fxmask.tools.bench_masks import random_mask, timesteps_of

PLAIN = "torch.compile"
EAGER = "eager"


@dataclass(frozen=True)
class Configuration:
    """One way to run the denoiser over all steps.

    Attributes:
        name: for the table.
        ratio: asked ratio of MACs, 1 for a mask of ones; ``None`` for the model itself.
        mode: how step graphs are compiled.
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
        seconds: median of a whole run.
        error: largest difference from the compiled model's outputs relative to their largest value; only where ``macs`` is 1.
        graphs: distinct step graphs.
        compilations: how many graphs Inductor was given.
        kernels: (step, share of the MACs that it keeps, kernels, extern calls) for each distinct step graph.
        cold_seconds: first run of all steps in a process of its own, compilation included; ``cold_ratio`` to the model's.
        peak_bytes: largest memory of that process.
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

    @property
    def efficiency(self) -> float | None:
        """Measured over ideal speed-up."""
        return None if self.speedup is None else self.speedup / self.macs


def configurations(
    ratios: Sequence[float], modes: Sequence[str], backends: Sequence[str] = ("inductor",)
) -> list[Configuration]:
    """Eager, compiled, a mask of ones, and each ratio in each mode of each backend."""
    made = [Configuration(EAGER), Configuration(PLAIN)]
    for backend in backends:
        for mode in modes:
            name = f"fxmask {mode}" if backend == "inductor" else f"fxmask {mode} ({backend})"
            for ratio in (1.0, *ratios):
                made.append(Configuration(f"{name}, " + ("all ones" if ratio == 1 else f"{ratio:g}x"), ratio, mode, backend))
    return made


def load_case(case: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The denoiser and the arguments of one call.

    Args:
        case: ``"file.py:function"`` or ``"package.module:function"``. The function takes nothing and returns the model, or
            the model and a dict of arguments; missing arguments are inferred.

    Raises:
        InputError: there is no such function, or it returns something else.
    """
    place, _, name = case.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        made = getattr(module, name)()
    except (ImportError, OSError, AttributeError, ValueError) as error:
        raise InputError(f"{case!r} is no function that makes a denoiser: {error}; give file.py:function") from error
    model, call = made if isinstance(made, tuple) else (made, {})
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"{case!r} returned {type(model).__name__}, not a torch.nn.Module (and a dict of arguments)")
    return model.eval(), dict(call)


class Bench:
    """Runs variants of one denoiser in this process.

    Args:
        model: the denoiser, in eval mode.
        call: arguments of one call.
        num_steps: T.
        seed: of the masks.
    """

    def __init__(self, model: torch.nn.Module, call: Mapping[str, Any], num_steps: int, seed: int = 0) -> None:
        self.model = model
        self.program = capture(model, call)
        self.calls = _calls(self.program, num_steps)
        self.num_steps = num_steps
        self.seed = seed

    def prepare(self, variant: Configuration) -> Callable[[], Any]:
        """A function that runs all steps and returns the last output."""
        if variant.ratio is None:
            model: Any = torch.compile(self.model, dynamic=False) if variant.name == PLAIN else self.model
            return lambda: _run_plain(model, self.calls)
        return _runner(self.accelerated(variant), self.calls)

    def accelerated(self, variant: Configuration) -> AcceleratedModel:
        """The accelerated model of a variant, not compiled yet."""
        assert variant.ratio is not None
        mask = random_mask(self.program, self.num_steps, variant.ratio, self.seed)
        return compile(self.program, rectify(self.program, mask), backend=variant.backend, mode=variant.mode)

    def measure(self, chosen: Sequence[Configuration], repeats: int, progress: bool = True) -> list[Measurement]:
        """Compile everything, then run the variants in turns."""
        rows, runs = [], []
        expected: torch.Tensor | None = None
        for variant in tqdm(chosen, desc="compiling", unit="variant", disable=not progress):
            before = inductor.compilations
            row = Measurement(variant.name)
            if variant.ratio is None:
                run = self.prepare(variant)
            else:
                accelerated = self.accelerated(variant)
                row.macs, row.graphs = accelerated.plan.mac_ratio, accelerated.plan.distinct_graphs
                row.executed = self.executed_ratio(accelerated)
                run = _runner(accelerated, self.calls)
            output = run()
            row.compilations = inductor.compilations - before if variant.ratio is not None else None
            if variant.name == PLAIN:
                expected = output
            elif expected is not None and row.macs == 1:
                row.error = float((output - expected).abs().max() / expected.abs().max())
            rows.append(row)
            runs.append(run)
        taken: list[list[float]] = [[] for _ in runs]
        order = list(range(len(runs)))
        for turn in tqdm(range(repeats), desc="measuring", unit="turn", disable=not progress):
            random.Random(turn).shuffle(order)
            for k in order:
                taken[k].append(timed(runs[k])[0])
        plain = next(k for k, row in enumerate(rows) if row.name == PLAIN)
        for row, seconds in zip(rows, taken, strict=True):
            ratios = [a / b for a, b in zip(taken[plain], seconds, strict=True)]
            row.seconds, row.speedup = statistics.median(seconds), statistics.median(ratios)
            row.interval = bootstrap(ratios)
        return rows

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
            _run_accelerated(accelerated, self.calls)
        counts: dict[int, tuple[int, float, int, int]] = {}
        for i, step in enumerate(accelerated.plan.steps):
            _, run = executor.graphs.get(executor.plan, i)
            codes = [code for part in inductor.parts_of(run) for code in part.code]
            kernels = sum(count_calls(code)[0] for code in codes)
            externs = sum(count_calls(code)[1] for code in codes)
            counts.setdefault(step.graph, (i, accelerated.plan.kept_per_step[i], kernels, externs))
        return list(counts.values())


def _calls(program: Program, num_steps: int) -> list[dict[str, Any]]:
    arguments = program.example.arguments
    calls = []
    for value in timesteps_of(num_steps):
        call = dict(arguments)
        name = program.signature.timestep
        if name is not None:
            example = torch.as_tensor(arguments[name])
            scale = 1 if float(example.abs().max()) > 1 or not example.is_floating_point() else 1000
            call[name] = torch.full_like(example, value / scale)
        calls.append(call)
    return calls


def _run_plain(model: Callable[..., Any], calls: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    with torch.no_grad():
        for call in calls:
            output = model(**call)
    return _first(output)


def _run_accelerated(model: AcceleratedModel, calls: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    with torch.no_grad(), model.generation():
        for call in calls:
            output = model(**call)
    return _first(output)


def _runner(model: AcceleratedModel, calls: Sequence[Mapping[str, Any]]) -> Callable[[], torch.Tensor]:
    return functools.partial(_run_accelerated, model, calls)


def _first(output: Any) -> torch.Tensor:
    value = output if isinstance(output, torch.Tensor) else output[0]
    assert isinstance(value, torch.Tensor)
    return value


def bootstrap(values: Sequence[float], resamples: int = 1000) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    drawn = random.Random(0)
    medians = sorted(statistics.median(drawn.choices(list(values), k=len(values))) for _ in range(resamples))
    return medians[int(0.025 * resamples)], medians[int(0.975 * resamples) - 1]


def time_cold(case: str, variant: Configuration, num_steps: int, seed: int = 0) -> dict[str, Any]:
    """First run of all steps of a variant in a process of its own with an empty compilation cache.

    Returns:
        ``seconds`` from the captured model to the last output, ``peak_bytes`` of the process and ``compilations``.
    """
    job = json.dumps({"case": case, "variant": asdict(variant), "num_steps": num_steps, "seed": seed})
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        done = subprocess.run(
            [sys.executable, "-c", "from fxmask.tools.bench import _cold_job; _cold_job()"],
            input=job,
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
    if done.returncode:
        raise FxmaskError(f"timing the compilation of {variant.name!r} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _cold_job() -> None:
    """The other side of ``time_cold``: a job on standard input, the result as the last line of standard output."""
    job = json.loads(sys.stdin.read())
    model, call = load_case(job["case"])
    bench = Bench(model, call, job["num_steps"], job["seed"])
    seconds, _ = timed(bench.prepare(Configuration(**job["variant"])))
    result = {"seconds": seconds, "peak_bytes": peak_bytes(), "compilations": inductor.compilations}
    sys.stdout.write("\n" + json.dumps(result) + "\n")


def add_cold(case: str, chosen: Sequence[Configuration], rows: Sequence[Measurement], num_steps: int, seed: int = 0) -> None:
    """Fill in what only processes of their own can tell; ``chosen`` begins with the model itself."""
    by_name = {row.name: row for row in rows}
    plain = by_name[PLAIN]
    for variant in tqdm(sorted(chosen, key=lambda v: v.name != PLAIN), desc="compiling from nothing", unit="process"):
        result = time_cold(case, variant, num_steps, seed)
        row = by_name[variant.name]
        row.cold_seconds, row.peak_bytes = result["seconds"], result["peak_bytes"]
        row.cold_ratio = row.cold_seconds / plain.cold_seconds if plain.cold_seconds else None


def add_kernels(bench: Bench, chosen: Sequence[Configuration], rows: Sequence[Measurement]) -> None:
    """Fill in the kernels of every step graph."""
    by_name = {row.name: row for row in rows}
    for variant in tqdm([v for v in chosen if v.ratio is not None], desc="counting kernels", unit="variant"):
        by_name[variant.name].kernels = bench.count_kernels(variant)


def peak_bytes() -> int:
    """Largest memory so far: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
