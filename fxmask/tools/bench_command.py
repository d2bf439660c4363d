"""``fxmask bench``: parts, files, and what is said at the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch

from fxmask.errors import InputError
from fxmask.tools.bench import PLAIN, Measurement, configurations
from fxmask.tools.bench_cases import cases_of
from fxmask.tools.bench_facts import facts_of
from fxmask.tools.bench_parts import Part, add_cold_of, attempt_part, besides, measure_apart, measure_part
from fxmask.tools.bench_report import draw, to_markdown
from fxmask.tools.bench_shapes import SHAPES
from fxmask.tools.command_line import Command, Several
from fxmask.tools.place import DTYPES, require_device

HELP = """\
Compare eager, torch.compile and fxmask at several ratios of MACs, with random masks over residual branches.

\b
    fxmask bench examples/studies/speed.py:dit_s --ratios 2 4 --output build/bench
    fxmask bench gpu --device cuda --dtype bfloat16 --output build/bench

writes bench.md, bench.json, environment.json, bench.png and traces. MODEL is one of

\b
- file.py:function or package.module:function; the function takes nothing, or some of batch, device and dtype, and returns the
  denoiser, or the denoiser and a dict of the arguments of one call; or a pipeline, or a pipeline and the arguments of a call;
- dit-xl-2, pixart-sigma-1024, sdxl or flux: that shape, with random weights; gpu: all of these;
- a folder or a name on the hub (owner/name) of a diffusers model or pipeline, with its weights.

On a GPU, torch.compile(mode="reduce-overhead") and fxmask with CUDA graphs are compared too. What does not fit in memory or
fails is a row that says so.
"""
STEM = "bench"
SEND = """\

Done. Please send us the files in {folder}: bench.md, bench.json (the table), environment.json (GPU, driver and
versions){rest}. An issue with the folder as an archive is the easiest way.
"""


@dataclass(frozen=True)
class BenchOptions:
    """What the command was asked for."""

    model: str
    device: str
    dtype: str | None
    batches: tuple[int, ...]
    ratios: tuple[float, ...]
    modes: tuple[str, ...]
    backends: tuple[str, ...]
    steps: int
    distinct: int | None
    repeats: int
    seed: int
    cold: bool
    kernels: bool
    traces: int | None
    output: Path | None


@click.command("bench", cls=Command, help=HELP, short_help="Measure step graphs beside eager mode and torch.compile.")
@click.argument("model", metavar="MODEL")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:1")
@click.option("--dtype", type=click.Choice(tuple(DTYPES)), help="type that the model is built in; by default its own")
@click.option("--batches", cls=Several, type=int, help="batch sizes; 1 2 8 for shapes on a GPU, else the call's own")
@click.option("--ratios", cls=Several, type=float, default=(2.0, 4.0), show_default=True, help="ratios of MACs")
@click.option("--modes", cls=Several, default=("regions", "whole"), show_default=True, help="how step graphs are compiled")
@click.option("--backends", cls=Several, help="inductor, cudagraph; both on a GPU")
@click.option("--steps", type=int, default=20, show_default=True, help="sampling steps")
@click.option("--distinct", type=int, help="rows of a mask that are drawn; 3 on a GPU, else each is another")
@click.option("--repeats", type=int, default=9, show_default=True, help="turns; the medians are reported")
@click.option("--seed", type=int, default=0, show_default=True, help="of the masks")
@click.option("--cold", is_flag=True, help="also time compilation, in processes of their own")
@click.option("--kernels", is_flag=True, help="also count kernels; compiles everything again")
@click.option("--traces", type=int, help="step graphs of each that are traced into --output; 4 on a GPU, else none")
@click.option("--output", type=click.Path(path_type=Path), help="folder for the table, JSON, plot and traces")
def bench_command(**given: Any) -> int:
    """Measure; the exit status is 1 if nothing was measured."""
    return run_bench(BenchOptions(**given))


def parts_of(options: BenchOptions) -> list[Part]:
    """What is measured, in order.

    Raises:
        InputError: the device is not there, or a number makes no sense.
    """
    device = require_device(options.device)
    on_gpu = device.type == "cuda"
    if any(batch < 1 for batch in options.batches or ()):
        raise InputError(f"--batches {options.batches}: batch sizes begin at 1")
    backends = options.backends or (["inductor", "cudagraph"] if on_gpu else ["inductor"])
    chosen = configurations(options.ratios, options.modes, backends, reduced=on_gpu)
    traces = (4 if on_gpu else 0) if options.traces is None else options.traces
    parts = []
    for case in cases_of(options.model):
        batches = options.batches or ([1, 2, 8] if on_gpu and case in SHAPES else [None])
        for k, batch in enumerate(batches):
            parts.append(
                Part(
                    case,
                    batch,
                    tuple(chosen),
                    device=str(device),
                    dtype=options.dtype,
                    steps=options.steps,
                    repeats=options.repeats,
                    seed=options.seed,
                    distinct=options.distinct or (3 if on_gpu else None),
                    kernels=options.kernels,
                    cold=options.cold,
                    traces=0 if k else traces,  # the smallest batch shows launches best, and traces are large
                    folder=None if options.output is None else str(options.output / "traces"),
                )
            )
    return parts


def run_bench(options: BenchOptions) -> int:
    """Measure, write and say what was done; the exit status is 1 if nothing was measured.

    Raises:
        FxmaskError: of the device, or of the model if there is one part alone, in this process.
    """
    parts = parts_of(options)
    done: list[tuple[Part, list[Measurement]]] = []
    for part in parts:
        if len(parts) > 1:
            sys.stderr.write(f"{part.title} ({len(done) + 1} of {len(parts)})\n")
        rows = _measure(part, alone=len(parts) == 1)
        done.append((part, rows))
        if options.output is not None:
            write(done, options.output)  # after each part: what was measured is not lost
    sys.stdout.write(markdown(done) + "\n")
    if options.output is not None and torch.device(parts[0].device).type == "cuda":
        traced = ", and traces/ (what the GPU does in some steps)" if (options.output / "traces").is_dir() else ""
        sys.stdout.write(SEND.format(folder=options.output, rest=traced))
    return 0 if any(row.seconds is not None for _, rows in done for row in rows) else 1


def _measure(part: Part, alone: bool) -> list[Measurement]:
    if torch.device(part.device).type == "cuda":
        rows = measure_apart(part)
    else:
        rows = measure_part(part) if alone else attempt_part(part)
    if part.cold and any(row.name == PLAIN and row.problem is None for row in rows):
        if alone and torch.device(part.device).type == "cpu":
            add_cold_of(part, rows)
        else:
            besides("times of compilation", lambda: add_cold_of(part, rows))
    return rows


def markdown(done: Sequence[tuple[Part, list[Measurement]]]) -> str:
    """All tables, each under a heading if there are several."""
    if len(done) == 1:
        return to_markdown(done[0][1])
    return "\n\n".join(f"## {part.title}\n\n{to_markdown(rows)}" for part, rows in done)


def write(done: Sequence[tuple[Part, list[Measurement]]], folder: Path) -> None:
    """The files of all that was measured so far."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{STEM}.md").write_text(markdown(done) + "\n", encoding="utf-8")
    rows = [asdict(row) for _, rows in done for row in rows]
    (folder / f"{STEM}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if len(done) == 1:
        part = done[0][0]
        asked = {name: getattr(part, name) for name in ("dtype", "steps", "repeats", "seed", "distinct")}
        facts = {**facts_of(torch.device(part.device)), "asked": asked}
        (folder / "environment.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    part, rows_of_part = done[-1]
    try:
        draw(
            rows_of_part,
            f"{part.title}, {part.steps} steps",
            folder / (f"{STEM}.png" if len(done) == 1 else f"{STEM}-{part.stem}.png"),
        )
    except ImportError:
        sys.stderr.write("no picture: it needs matplotlib\n")
