"""Measurements as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fxmask.tools.bench import BASELINES, EAGER, Measurement


def to_markdown(rows: Sequence[Measurement]) -> str:
    """The rows as a table. Columns that nothing is in but for some measurements are left out without these."""
    head = ["", "MACs", "executed", "measured", "95 % interval", "measured / MACs", "graphs", "compilations", "cold s", "cold"]
    head += ["peak MiB", "error"]
    reduced = any(row.against_reduced is not None for row in rows)
    timed = reduced or any(row.problem is not None for row in rows)
    head += ["over reduce-overhead"] * reduced + ["seconds", "why not"] * timed
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = _cells(row)
        cells += ["" if row.against_reduced is None else f"{row.against_reduced:.2f}x"] * reduced
        if timed:
            cells += ["" if row.seconds is None else f"{row.seconds:.4g}", (row.problem or "").replace("|", "/")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(row: Measurement) -> list[str]:
    ideal = row.problem is None or row.graphs is not None
    cells = [row.name, f"{row.macs:.2f}x" if ideal else "", f"{row.executed:.2f}x" if ideal else ""]
    cells += ["" if row.speedup is None else f"{row.speedup:.2f}x"]
    cells += ["" if row.interval is None else f"{row.interval[0]:.2f}-{row.interval[1]:.2f}"]
    cells += ["" if row.efficiency is None or row.name == EAGER else f"{row.efficiency:.3f}"]
    cells += ["" if value is None else str(value) for value in (row.graphs, row.compilations)]
    cells += ["" if row.cold_seconds is None else f"{row.cold_seconds:.0f}"]
    cells += ["" if row.cold_ratio is None else f"{row.cold_ratio:.2f}x"]
    cells += ["" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}"]
    return [*cells, "" if row.error is None else f"{row.error:.1e}"]


def draw(rows: Sequence[Measurement], title: str, path: Path) -> None:
    """Measured against ideal speed-up, and kernels per step graph against the share of MACs that the step keeps."""
    from matplotlib.figure import Figure

    with_kernels = [row for row in rows if row.kernels]
    figure = Figure(figsize=(11 if with_kernels else 5.5, 4.5), layout="constrained")
    axes = figure.subplots(1, 2 if with_kernels else 1, squeeze=False)[0]
    measured = [row for row in rows if row.speedup is not None and row.name not in BASELINES]
    most = max([row.executed for row in measured] + [1.0])
    axes[0].plot([1, most], [1, most], color="0.7", label="ideal")
    for mode in dict.fromkeys(row.name.split(",")[0] for row in measured):
        points = sorted((row.executed, row.speedup or 0.0) for row in measured if row.name.startswith(mode + ","))
        axes[0].plot(*zip(*points, strict=True), marker="o", label=mode)
    axes[0].set_xlabel("ideal speed-up (MACs that are executed)")
    axes[0].set_ylabel("measured speed-up over torch.compile")
    axes[0].set_title(title)
    axes[0].legend()
    for row in with_kernels:
        axes[1].scatter([100 * k[1] for k in row.kernels], [k[2] + k[3] for k in row.kernels], label=row.name, s=18)
    if with_kernels:
        axes[1].set_xlabel("share of the full MACs that a step keeps (%)")
        axes[1].set_ylabel("kernels and extern calls of its step graph")
        axes[1].set_ylim(bottom=0)
        axes[1].legend()
    figure.savefig(path, dpi=110)
