"""The tables and figures of the paper (arXiv 2603.19939) beside ours, by `fxmask evaluate` on `examples/paper/*.toml`.

    python examples/studies/paper.py --small                # all tables on the shipped models; an interrupted run goes on
    python examples/studies/paper.py --small --tables table5
    python examples/studies/paper.py --small --page         # only writes the page of what is there

Without `--small` the models and data sets of the paper are needed, see `examples/paper/`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fxmask.pictures import save_counts, save_scores
from fxmask.storage.plans import load_plan
from fxmask.tools.cli import main as fxmask_command
from fxmask.tools.evaluation.evaluate import as_name, published
from fxmask.tools.evaluation.run_file import Run, load_run
from fxmask.tools.evaluation.table import averaged, markdown

EXAMPLES = Path(__file__).resolve().parents[1]
RUNS = EXAMPLES / "paper"
PAGE = EXAMPLES / "results" / "paper.md"
TABLES = ("table1-cifar10", "table1-composition", "table2-dit256", "table2-ldm", "table3-pixart", "table4", "table5")
SEEDS = {"table2-ldm": ("0",)}
IMAGES_LEARNED = {"table1-composition": 4, "table4": 4, "table5": 4}
FIGURES = ("our variant of it", "paper's learner")  # whose mask and scores are drawn


def make(table: str, folder: Path, small: bool) -> None:
    """One table, by the command."""
    given = ["evaluate", str(RUNS / f"{table}.toml"), "--folder", str(folder / table)]
    given += ["--seeds", *SEEDS.get(table, ("0", "1", "2")), "--recorded", str(IMAGES_LEARNED.get(table, 2))]
    began = time.perf_counter()
    if fxmask_command([*given, *(["--small"] if small else [])]):
        raise SystemExit(f"{table} failed")
    print(f"{table}: {time.perf_counter() - began:.0f} s")


def rows_of(run: Run, folder: Path) -> list[dict[str, Any]]:
    """What was measured of a run: means over the seeds that are there."""
    found = []
    for row in run.configurations:
        files = sorted((folder / as_name(row.name)).glob("seed*/row.json"))
        if files:
            found.append(averaged([json.loads(file.read_text(encoding="utf-8")) for file in files]))
    return found


def figures(folder: Path, name: str) -> list[str]:
    """Figures 6 and 7 of one learned mask, beside the page."""
    place = folder / as_name(name)
    if not (place / "plan" / "plan.json").exists():
        return []
    mask, _, _ = load_plan(place / "plan")
    stem = f"paper-{as_name(name)}"
    save_counts(mask, PAGE.with_name(f"{stem}-counts.png"), title=f"{name}: computes in five steps")
    lines = [f"![How often each block computes in every five steps, {name}]({stem}-counts.png)", ""]
    if (place / "scores.pt").exists():
        scores = torch.load(place / "scores.pt", weights_only=True)
        save_scores(scores, PAGE.with_name(f"{stem}-scores.png"), title=f"{name}: scores")
        near = float(((scores < 0.1) | (scores > 0.9)).float().mean())
        lines += [
            f"![How the scores are spread, {name}]({stem}-scores.png)",
            "",
            f"{near:.0%} of the scores are within 0.1 of 0 or 1.",
        ]
    return [*lines, ""]


def page(folder: Path, notes: str) -> str:
    """All tables that there are."""
    lines = ["# The paper's tables", "", notes.strip(), ""]
    for table in TABLES:
        run = load_run(RUNS / f"{table}.toml", small=True)
        rows = rows_of(run, folder / table)
        if not rows:
            lines += [f"## {run.title}", "", "Not measured yet.", ""]
            continue
        most = max(row["seeds"] for row in rows)
        model, images = run.subject.split(":")[-1], rows[0]["images"]
        ours = f"Ours: the shipped `{model}`, {run.steps} steps, {images} images for each of {most} seed"
        lines += [f"## {run.title}", "", f"{ours}{'s' if most > 1 else ''} of the noise.", "", markdown(rows), ""]
        lines += ["The paper's:", "", markdown(list(map(_plain, published(run)))), ""]
    drawn = [line for name in FIGURES for line in figures(folder / "table1-cifar10", name)]
    return "\n".join([*lines, "## Figures 6 and 7, of the masks of Table 1", "", *drawn]).rstrip() + "\n"


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "method": row["method"].removesuffix(" (paper)").strip("*")}


def main() -> None:
    """Makes what is asked for, then writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", default=TABLES, choices=TABLES)
    parser.add_argument("--small", action="store_true", help="on the shipped models")
    parser.add_argument("--folder", type=Path, default=Path("build/paper"))
    parser.add_argument("--page", action="store_true", help="only write the page")
    options = parser.parse_args()
    for table in () if options.page else options.tables:
        make(table, options.folder, options.small)
    PAGE.write_text(page(options.folder, (RUNS / "notes.md").read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
