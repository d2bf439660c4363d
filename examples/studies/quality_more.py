"""Whether more images to learn from settle the choice where the lead is short: default effort again, on several times as many.

Meant for a GPU: with ten other learners on it, the first speed-up of a cell took six minutes or more; a CPU takes hours.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from quality_cells import RATIOS, Cell, Evaluation, Results, columns, searching

from fxmask.storage.plans import save_mask

MORE = "fxmask, more images"
RUNS = {"ddpm": (6, 48), "dit": (3, 128)}  # recorded runs, the last one held out, and images in each


def has_more(cell: Cell) -> bool:
    """Whether it is measured: where leads are short, which is with injected noise."""
    return bool(cell.eta) and cell.family in RUNS


def measure_more(cell: Cell, folder: Path) -> None:
    """One row per speed-up, with the number of images."""
    results = Results(folder / f"{cell.name}.json")
    missing = [ratio for ratio in (3.0, 2.0, 1.5) if not results.has(f"{MORE} {ratio}")]
    if not missing:
        return
    runs, images = RUNS[cell.family]
    images //= 1 if cell.guidance is None else 2
    evaluation = Evaluation(cell)
    training = [cell.record(k, images) for k in range(runs)]
    search = searching(cell, training, "default", folder / f"{cell.name}-more.journal.json")
    for ratio in missing:
        started = time.perf_counter()
        point = search.best(1 / ratio)
        facts = {"units": point.units, "kind": point.kind, "seconds": time.perf_counter() - started, "learned": runs * images}
        save_mask(results.mask(f"{MORE} {ratio}"), point.mask, facts, {})
        results.put(f"{MORE} {ratio}", evaluation.of_mask(point.mask, **facts))


def more_table(cells: dict[str, dict[str, Any]], usual: dict[str, int]) -> list[str]:
    """Both figures of every cell that has them, beside the images they come from; ``usual`` says those of the cell."""
    lines = []
    for name, rows in cells.items():
        found = [(rows.get(f"fxmask {ratio}"), rows.get(f"{MORE} {ratio}")) for ratio in RATIOS]
        if not any(more for _, more in found):
            continue
        pairs = [f"{own['psnr']:.1f} to {more['psnr']:.1f}" if own and more else "" for own, more in found]
        learned = next(more["learned"] for _, more in found if more)
        lines.append(columns(name, f"{usual[name]} to {learned}", *pairs))
    if not lines:
        return []
    head = columns("cell", "images recorded", *(f"{ratio:g}x" for ratio in RATIOS))
    return [
        "",
        "Learned again from more images, on a GPU (PSNR in dB, before and after):",
        "",
        head,
        "|---|---|---|---|---|",
        *lines,
    ]
