"""Measurements as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fxmask.tools.bench import EAGER, PLAIN, Measurement


def to_markdown(rows: Sequence[Measurement]) -> str:
    """The rows as a table."""
    head = ["", "MACs", "executed", "measured", "95 % interval", "measured / MACs", "graphs", "compilations", "cold s", "cold"]
    lines = ["| " + " | ".join([*head, "peak MiB", "error"]) + " |", "|" + "---|" * (len(head) + 2)]
    for row in rows:
        cells = [row.name, f"{row.macs:.2f}x", f"{row.executed:.2f}x"]
        cells += ["" if row.speedup is None else f"{row.speedup:.2f}x"]
        cells += ["" if row.interval is None else f"{row.interval[0]:.2f}-{row.interval[1]:.2f}"]
        cells += ["" if row.efficiency is None or row.name == EAGER else f"{row.efficiency:.3f}"]
        cells += ["" if value is None else str(value) for value in (row.graphs, row.compilations)]
        cells += ["" if row.cold_seconds is None else f"{row.cold_seconds:.0f}"]
        cells += ["" if row.cold_ratio is None else f"{row.cold_ratio:.2f}x"]
        cells += ["" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}"]
        cells += ["" if row.error is None else f"{row.error:.1e}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: Sequence[Measurement], title: str, path: Path) -> None:
    """Measured against ideal speed-up, and kernels per step graph against the share of MACs that the step keeps."""
    from matplotlib.figure import Figure

    with_kernels = [row for row in rows if row.kernels]
    figure = Figure(figsize=(11 if with_kernels else 5.5, 4.5), layout="constrained")
    axes = figure.subplots(1, 2 if with_kernels else 1, squeeze=False)[0]
    measured = [row for row in rows if row.speedup is not None and row.name not in (EAGER, PLAIN)]
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
