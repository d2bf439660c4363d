"""``fxmask pareto NAME``: what several speed-ups cost in quality."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.table import Table

from fxmask.api import pareto
from fxmask.learning.candidate import ParetoPoint
from fxmask.pictures import save_pareto
from fxmask.tools.command_line import (
    AS_JSON,
    BACKEND,
    CALLS,
    NAMED,
    PLACE,
    Command,
    Picture,
    Several,
    as_json,
    console,
    options,
    printed,
)
from fxmask.tools.subjects import load_subject

RUNS = 4  # recorded of a denoiser


@click.command("pareto", cls=Command, epilog=NAMED)
@click.argument("name", metavar="NAME")
@options(
    CALLS,
    click.option("--speedups", cls=Several, type=float, default=(1.5, 2.0, 3.0), show_default=True, help="ratios of MACs"),
    click.option("--effort", type=click.Choice(("quick", "default")), default="quick", show_default=True),
    click.option("--checkpoint", type=click.Path(path_type=Path), help="a file that the same command goes on from"),
    BACKEND,
    PLACE,
    click.option("--plot", type=Picture(), help="draw error against MACs: a PNG or SVG"),
    AS_JSON,
)
def pareto_command(
    name: str,
    calls: Any,
    prompts: Any,
    steps: int | None,
    seed: int,
    speedups: tuple[float, ...],
    effort: str,
    checkpoint: Path | None,
    backend: str,
    device: str,
    dtype: str | None,
    plot: Path | None,
    json_wanted: bool,
) -> None:
    """Learn plans for several speed-ups, and compare errors on held-out noise."""
    subject = load_subject(name, device, dtype).with_calls(calls, prompts, steps)
    count = RUNS if subject.pipe is None else max(2, len(subject.calls))
    runs = [subject.recorded(seed + k, steps) for k in range(count)]
    points = pareto(
        subject.program(runs[0]),
        runs,
        speedups=speedups,
        effort=effort,
        checkpoint=checkpoint,
        backend=backend,
        seed=seed,
        progress=not json_wanted,
    )
    if plot is not None:
        save_pareto(points, plot)
    if json_wanted:
        as_json([_to_dict(point) for point in points])
        return
    table = Table(
        "MACs", "error (dB)", "fewer steps (dB)", "relative error", "forms", title=f"{name}, {runs[0].num_steps} steps"
    )
    for p in points:
        fewer = "" if p.fewer_steps is None else f"{p.fewer_steps:.1f}"
        table.add_row(f"{p.mac_ratio:.2f}x fewer", f"{p.decibels:.1f}", fewer, f"{p.error:.3g}", p.kind)
    console().print(table)
    if plot is not None:
        printed(f"picture: {plot}")


def _to_dict(point: ParetoPoint) -> dict[str, Any]:
    return {name: value for name, value in vars(point).items() if name != "mask"}
