"""How much of a plan's quality is the luck of its seed: fxmask learned three times, judged on the same fresh noise."""

from __future__ import annotations

import json
from pathlib import Path

from quality_cells import Cell, Evaluation, Results, columns, default_mask

SEEDS = (0, 1, 2)


def measure_seeds(cell: Cell, folder: Path) -> None:
    """One row per seed, of the recorded noise and of the search; seed 0 is the cell's own plan."""
    results = Results(folder / f"{cell.name}-seeds.json")
    missing = [seed for seed in SEEDS if not results.has(f"seed {seed}")]
    if not missing:
        return
    evaluation = Evaluation(cell)
    for seed in missing:
        mask, facts = default_mask(cell, folder, seed)
        results.put(f"seed {seed}", evaluation.of_mask(mask, **facts))
    known = Results(folder / f"{cell.name}.json").rows.get("fxmask 2.0")
    again = results.rows["seed 0"]
    if known and abs(known["psnr"] - again["psnr"]) > 0.05:
        was, now = known["psnr"], again["psnr"]
        print(
            f"{cell.name}: the mask of seed 0 gives {now:.2f} dB, the cell's row has {was:.2f} from another fxmask", flush=True
        )


def seeds_table(folder: Path) -> list[str]:
    """Mean, least and most over the seeds."""
    lines = []
    for path in sorted(folder.glob("*-seeds.json")):
        rows = json.loads(path.read_text(encoding="utf-8"))
        decibels = [rows[f"seed {seed}"]["psnr"] for seed in SEEDS if f"seed {seed}" in rows]
        units = [f"{rows[f'seed {seed}']['units']:.0f}" for seed in SEEDS if f"seed {seed}" in rows]
        figures = (sum(decibels) / len(decibels), min(decibels), max(decibels))
        each = ", ".join(f"{x:.1f}" for x in decibels)
        lines.append(columns(path.stem.removesuffix("-seeds"), each, *(f"{x:.1f}" for x in figures), ", ".join(units)))
    if not lines:
        return []
    heading = [
        "",
        "## fxmask (default) at 2x with three learning seeds",
        "",
        "The seed is that of the recorded noise and of the search.",
    ]
    return [
        *heading,
        "",
        columns("cell", "PSNR of each", "mean", "least", "most", "units"),
        "|---|---|---|---|---|---|",
        *lines,
    ]
