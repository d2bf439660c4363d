"""What the device does in some steps, as traces for chrome://tracing and Perfetto."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from fxmask.tools.bench import PLAIN, REDUCED, Bench, Configuration, Run


def trace_all(bench: Bench, chosen: Sequence[Configuration], most: int, folder: Path, stem: str) -> list[Path]:
    """Trace what was measured: a step of the compiled model, and step graphs of the first ratio of each backend and mode.

    Args:
        bench: after ``measure``.
        chosen: what was measured.
        most: step graphs of each.
        folder: of the files, which is made.
        stem: of their names.

    Returns:
        The files, ``<stem>-<configuration>-step<number>.json.gz``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files, seen = [], set()
    for variant in chosen:
        kind = variant.name if variant.ratio is None else (variant.backend, variant.mode)
        wanted = variant.name in (PLAIN, REDUCED) if variant.ratio is None else variant.ratio > 1
        if wanted and kind not in seen and variant.name in bench.runs:
            seen.add(kind)
            run = bench.runs[variant.name]
            files += trace_steps(run, steps_of(run, most), folder, f"{stem}-{variant.name}")
    return files


def steps_of(run: Run, most: int) -> list[int]:
    """One step of each distinct step graph, at most so many, spread over the run; the last step of a model without a plan."""
    if run.accelerated is None:
        return [len(run.calls) - 1]
    first = sorted(run.accelerated.plan.first_steps.values())
    return first if len(first) <= most else [first[k * len(first) // most] for k in range(most)]


def trace_steps(run: Run, steps: Collection[int], folder: Path, stem: str) -> list[Path]:
    """Run all steps, some of them under the profiler."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    files: list[Path] = []

    @contextlib.contextmanager
    def traced(step: int) -> Iterator[None]:
        if step not in steps:
            yield
            return
        with profile(activities=activities) as profiler:
            with record_function(f"step {step}"):
                yield
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
        files.append(folder / f"{re.sub(r'[^A-Za-z0-9.]+', '-', stem).strip('-')}-step{step}.json.gz")
        profiler.export_chrome_trace(str(files[-1]))

    run.inside(traced)
    return files
