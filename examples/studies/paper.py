"""The tables and figures of the paper (arXiv 2603.19939) beside ours, by `fxmask evaluate` on `examples/paper/*.toml`.

    python examples/studies/paper.py --small                # all tables on the shipped models; an interrupted run goes on
    python examples/studies/paper.py --small --tables table5
    python examples/studies/paper.py --small --jobs 2       # two tables at a time, in processes of their own
    python examples/studies/paper.py --small --page         # only writes the page; tables that were not made stay as they are

Without `--small` the models and data sets of the paper are needed, see `examples/paper/`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
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
TABLES = (
    "table1-cifar10",
    "table1-composition",
    "table2-dit256",
    "table2-dit512",
    "table2-ldm",
    "table3-pixart",
    "table4",
    "table5",
)
LONGEST_FIRST = ("table1-composition", "table2-ldm", "table1-cifar10")
RECORDED = 4  # images that learners are given: two runs of two, so that each pass is over two
FIGURES = ("our variant of it", "paper's learner")  # whose mask and scores are drawn


def make(table: str, folder: Path, small: bool, quiet: bool = False) -> None:
    """One table, by the command."""
    given = ["evaluate", str(RUNS / f"{table}.toml"), "--folder", str(folder / table), "--seeds", "0", "1", "2"]
    given += ["--recorded", str(RECORDED), "--output", str(folder / f"{table}.md")]
    began, used = time.perf_counter(), time.process_time()
    if fxmask_command([*given, *(["--small"] if small else []), *(["--quiet"] if quiet else [])]):
        raise SystemExit(f"{table} failed")
    took = f"{time.perf_counter() - began:.0f} s, {time.process_time() - used:.0f} s of a processor"
    print(f"{table}: {took}", flush=True)


def make_all(tables: list[str], folder: Path, small: bool, jobs: int) -> None:
    """Several tables, ``jobs`` of them at a time."""
    began = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    ordered = sorted(tables, key=lambda table: LONGEST_FIRST.index(table) if table in LONGEST_FIRST else len(LONGEST_FIRST))
    if jobs == 1:
        for table in ordered:
            make(table, folder, small)
    else:
        threads = max(1, torch.get_num_threads() // jobs)
        spawned = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, spawned, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
            for done in [pool.submit(make, table, folder, small, quiet=True) for table in ordered]:
                done.result()
    print(f"together: {time.perf_counter() - began:.0f} s")


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


def page(folder: Path, notes: str, before: str) -> str:
    """All tables that there are; of those that are not, what the page had before."""
    old = dict(re.findall(r"^## (.+)\n\n((?:(?!^## ).*\n)+)", before, flags=re.MULTILINE))
    lines = ["# The paper's tables", "", notes.strip(), ""]
    for table in TABLES:
        run = load_run(RUNS / f"{table}.toml", small=True)
        rows = rows_of(run, folder / table)
        if not rows:
            lines += [f"## {run.title}", "", old.get(run.title, "Not measured yet.").strip(), ""]
            continue
        most = max(row["seeds"] for row in rows)
        model, images = run.subject.split(":")[-1], rows[0]["images"]
        ours = f"Ours: the shipped `{model}`, {run.steps} steps, {images} images for each of {most} seed"
        lines += [f"## {run.title}", "", f"{ours}{'s' if most > 1 else ''} of the noise.", "", markdown(rows), ""]
        lines += ["The paper's:", "", markdown(list(map(_plain, published(run)))), ""]
    drawn = [line for name in FIGURES for line in figures(folder / "table1-cifar10", name)]
    title = "Figures 6 and 7, of the masks of Table 1"
    return "\n".join([*lines, f"## {title}", "", *(drawn or [old.get(title, "")])]).rstrip() + "\n"


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "method": row["method"].removesuffix(" (paper)").strip("*")}


def main() -> None:
    """Makes what is asked for, then writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", default=TABLES, choices=TABLES)
    parser.add_argument("--small", action="store_true", help="on the shipped models")
    parser.add_argument("--folder", type=Path, default=Path("build/paper"))
    parser.add_argument("--jobs", type=int, default=1, help="tables at a time")
    parser.add_argument("--page", action="store_true", help="only write the page")
    options = parser.parse_args()
    if not options.page:
        make_all(list(options.tables), options.folder, options.small, options.jobs)
    before = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    PAGE.write_text(page(options.folder, (RUNS / "notes.md").read_text(encoding="utf-8"), before), encoding="utf-8")


if __name__ == "__main__":
    main()
