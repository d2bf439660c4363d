"""The benchmark in parts, one for each model and batch: in this process, or each in a process of its own.

On a GPU a part has a process of its own. What it held is free for the next one, whatever failed in it. What CUDA cannot recover
from (an illegal access) or what ends a process (too little host memory) ends one attempt at a part: it becomes a row with its
reason, and the part is tried again without it.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fxmask.frontend.modules import module_dtype
from fxmask.tools.bench import EAGER, Bench, Configuration, LostDevice, Measurement, add_kernels
from fxmask.tools.bench_cases import load_case
from fxmask.tools.bench_cold import add_cold
from fxmask.tools.bench_trace import trace_all
from fxmask.tools.place import DTYPES, current, describe_failure, release

logger = logging.getLogger(__name__)
MODEL = "the model"  # the row of a part of which nothing could be measured
SECONDS = 4 * 3600  # of one attempt at a part; compiling large models whole takes long
MARK = "fxmask bench: "  # begins the lines that a part's process says something with


@dataclass(frozen=True)
class Part:
    """One model at one batch.

    Attributes:
        case: names the model, see ``load_case``.
        batch: B; that of the model's own call if ``None``.
        device, dtype: where it runs and in which type, by name; the type as it is built if ``None``.
        chosen: the configurations.
        steps, repeats, seed, distinct: see ``Bench``.
        kernels, cold: whether these are measured too.
        traces: step graphs that are traced; 0 for none.
        folder: of the traces.
    """

    case: str
    batch: int | None
    chosen: tuple[Configuration, ...]
    device: str = "cpu"
    dtype: str | None = None
    steps: int = 20
    repeats: int = 9
    seed: int = 0
    distinct: int | None = None
    kernels: bool = False
    cold: bool = False
    traces: int = 0
    folder: str | None = None

    @property
    def name(self) -> str:
        """Of the model, without the folders that it is in."""
        file = Path(self.case.rpartition(":")[0] or self.case)
        return Path(self.case).name if file.exists() else self.case

    @property
    def title(self) -> str:
        """For a heading."""
        named = [self.name, f"batch {self.batch}" if self.batch else "", self.dtype or "", self.device]
        return ", ".join(x for x in named if x)

    @property
    def stem(self) -> str:
        """For names of files."""
        return "-".join([self.name.replace(":", "-").replace("/", "-"), *([f"b{self.batch}"] if self.batch else [])])

    def label(self, row: Measurement, dtype: str | None = None) -> Measurement:
        """The row with what it belongs to."""
        return replace(row, case=self.name, batch=self.batch, dtype=dtype or self.dtype, device=self.device)


def _silent(**message: Any) -> None:
    """Nobody is told."""


def measure_part(part: Part, say: Callable[..., None] = _silent) -> list[Measurement]:
    """Measure one part in this process.

    Args:
        part: what is measured.
        say: is told ``begin=`` with the name of what comes next, and ``rows=`` when they are there.

    Raises:
        FxmaskError: the model cannot be made or captured.
        LostDevice: nothing more can be run in this process.
    """
    device = torch.device(part.device)
    with current(device):
        say(begin=MODEL)
        model, call = load_case(part.case, part.batch, device, DTYPES.get(part.dtype or ""))
        bench = Bench(model, call, part.steps, part.seed, batch=part.batch or 2, distinct=part.distinct)
        rows = bench.measure(part.chosen, part.repeats, begin=lambda name: say(begin=name))
        dtype = str(module_dtype(model)).removeprefix("torch.")
        rows = [part.label(row, dtype) for row in rows]
        say(rows=[asdict(row) for row in rows])
        if part.traces and part.folder is not None:
            besides("traces", lambda: trace_all(bench, part.chosen, part.traces, Path(part.folder or ""), part.stem))
        if part.kernels:
            besides("kernels", lambda: add_kernels(bench, part.chosen, rows))
    return rows


def besides(what: str, work: Callable[[], Any]) -> None:
    """Do what the rows are there without."""
    try:
        work()
    except Exception as error:  # of a profiler, of a compiler
        logger.warning("no %s: %s: %s", what, type(error).__name__, error)


def add_cold_of(part: Part, rows: list[Measurement]) -> None:
    """Fill in the cost of compiling."""
    place = {"batch": part.batch, "device": part.device, "dtype": part.dtype, "distinct": part.distinct}
    add_cold(part.case, [v for v in part.chosen if v.name != EAGER], rows, part.steps, part.seed, **place)


def failed(part: Part, problem: str) -> list[Measurement]:
    """What there is of a part that could not be measured."""
    return [part.label(Measurement(MODEL, problem=problem))]


def attempt_part(part: Part) -> list[Measurement]:
    """``measure_part``; what fails as a whole is a row."""
    try:
        return measure_part(part)
    except Exception as error:  # of building a model, of capture: other parts are still measured
        problem = describe_failure(error, torch.device(part.device))
    release(torch.device(part.device))
    torch.compiler.reset()
    return failed(part, problem)


def measure_apart(part: Part) -> list[Measurement]:
    """The rows of a part, measured in processes of their own: again without what ended the one before."""
    lost: list[Measurement] = []
    chosen = part.chosen
    while chosen:
        rows, latest, reason = _in_a_process(replace(part, chosen=chosen))
        if rows is not None:
            order = [v.name for v in part.chosen]
            return sorted([*rows, *lost], key=lambda row: order.index(row.name) if row.name in order else -1)
        if latest == MODEL or latest not in [v.name for v in chosen]:
            return [*failed(part, reason), *lost]
        lost.append(part.label(Measurement(latest, problem=reason)))
        chosen = tuple(v for v in chosen if v.name != latest)
    return lost


def _in_a_process(part: Part) -> tuple[list[Measurement] | None, str, str]:
    """The rows; or ``None``, what the process was at when it ended, and why."""
    command = [sys.executable, "-c", "from fxmask.tools.bench_parts import _job; _job()"]
    try:
        done = subprocess.run(
            command, input=json.dumps(asdict(part)), stdout=subprocess.PIPE, text=True, timeout=SECONDS, check=False
        )
        said, reason = done.stdout, f"its process ended with status {done.returncode}"
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        reason = f"not done after {SECONDS / 3600:g} hours"
    latest, rows = MODEL, None
    for line in said.splitlines():
        if line.startswith(MARK):
            message: dict[str, Any] = json.loads(line.removeprefix(MARK))
            rows = message.get("rows", rows)
            latest, reason = message.get("begin", latest), message.get("reason", reason)
    return None if rows is None else [Measurement(**row) for row in rows], latest, reason


def _job() -> None:
    """The other side: a part on standard input, lines on standard output."""
    given = json.loads(sys.stdin.read())
    part = Part(**{**given, "chosen": tuple(Configuration(**v) for v in given["chosen"])})

    def say(**message: Any) -> None:
        sys.stdout.write(f"\n{MARK}{json.dumps(message)}\n")
        sys.stdout.flush()

    try:
        rows = measure_part(part, say)
    except Exception as error:
        reason = str(error) if isinstance(error, LostDevice) else describe_failure(error, torch.device(part.device))
        say(reason=reason)
        sys.exit(1)
    say(rows=[asdict(row) for row in rows])
