"""Quality at equal MACs: fxmask beside fewer steps, fixed reuse, fixed forecasts and the paper's learner.

    python examples/studies/quality.py                            # everything; an interrupted run goes on where it was
    python examples/studies/quality.py --families dit --steps 20  # some cells
    python examples/studies/quality.py --parts seeds fid          # some of what is measured, see PARTS
    python examples/studies/quality.py --table                    # only writes the table of what is there

Measurements are kept in build/quality; a copy of them and of the learned masks ships beside the table, so that a fresh clone
goes on from there. Noise for evaluation is never used for learning. The parts are in files of their own, `quality_*.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from quality_ablations import PAPER, ablation_tables, measure_ablations, paper_mask
from quality_cells import (
    EVALUATION,
    FAMILIES,
    GUIDED,
    RATIOS,
    Cell,
    Evaluation,
    Results,
    Row,
    columns,
    searching,
)
from quality_converged import CONVERGED_IMAGES, compare_with_converged, measure_solver
from quality_fid import fid_table, measure_fid
from quality_more import MORE, has_more, measure_more, more_table
from quality_rivals import coarse_ddim, rivals
from quality_seeds import measure_seeds, seeds_table

from fxmask.learning.search import Search
from fxmask.storage.plans import load_plan, save_mask
from fxmask.tools.place import require_device

__all__ = ["Cell", "Results", "coarse_ddim", "main", "write_table"]  # what the tests look at

NAMES = (*FAMILIES, *GUIDED)
ALIKE = "fxmask, lanes alike"
LEARNED = (("fxmask quick", "quick", "alike"), (ALIKE, "default", "alike"), ("fxmask", "default", "own"))
EFFORTS = ("quick", "default")
EXAMPLES = Path(__file__).resolve().parents[1]
PARTS = {
    "cells": "plans at 1.5x, 2x and 3x",
    "solver": "fxmask on DPM-Solver++",
    "seeds": "the spread over learning seeds (DDPM and DiT, 20 deterministic steps)",
    "fid": "FID on classifier features (the same cells)",
    "tables": "the form of the paper's Tables 4 and 5 (DDPM, 20 deterministic steps)",
    "more": "plans learned from more images (DDPM and DiT, stochastic)",
    "converged": "everything against about 1,000 steps",
}


def _describe() -> str:
    return "; ".join(f"{part}: {what}" for part, what in PARTS.items())


def run_cell(cell: Cell, folder: Path, paper: bool, efforts: Sequence[str] = EFFORTS) -> None:
    """Measure what is missing in one cell."""
    results = Results(folder / f"{cell.name}.json")
    evaluation = Evaluation(cell)
    training = cell.training()
    if not results.has("full sampler 1.0"):
        results.put("full sampler 1.0", evaluation.full())
    for name, measure in rivals(evaluation, training):
        for ratio in RATIOS:
            key = f"{name} {ratio}"
            row = None if results.is_complete(key) else measure(ratio)
            if row is not None:
                results.put(key, {**row, **results.kept(key)})
    for label, effort, lanes in LEARNED:
        if effort not in efforts or (label == ALIKE and cell.guidance is None):
            continue  # where guidance's lanes are never told apart, the two are one
        search: Search | None = None
        for ratio in (2.0, 1.5, 3.0):
            key = f"{label} {ratio}"
            if results.is_complete(key):
                continue
            if results.has(key) and results.mask(key).exists():  # of an earlier version, which measured less
                mask, facts, _ = load_plan(results.mask(key))
            else:
                search = search or searching(cell, training, effort, folder / f"{cell.name}-{effort}.journal.json", lanes=lanes)
                started = time.perf_counter()
                point = search.best(1 / ratio)
                facts = {"units": point.units, "kind": point.kind, "seconds": time.perf_counter() - started}
                mask = point.mask
                save_mask(results.mask(key), mask, facts, {})
            results.put(key, {**evaluation.of_mask(mask, **facts, lanes=len(mask.lanes)), **results.kept(key)})
    for name in PAPER if paper and cell.name.startswith(("ddpm-20", "dit-20")) else ():
        if not results.has(f"{name} 2.0"):
            mask, learned = paper_mask(cell, folder, name)
            results.put(f"{name} 2.0", evaluation.of_mask(mask, **learned))


def run(cell: Cell, folder: Path, parts: list[str], paper: bool, efforts: Sequence[str] = EFFORTS) -> None:
    """The parts that a cell has."""
    deterministic = not cell.eta
    closer = deterministic and cell.steps == 20 and cell.name.startswith(("ddpm-20", "dit-20"))
    if "cells" in parts:
        run_cell(cell, folder, paper, efforts)
    steps: dict[str, tuple[bool, Callable[[Cell, Path], None]]] = {
        "solver": (deterministic, measure_solver),
        "seeds": (closer, measure_seeds),
        "fid": (closer, measure_fid),
        "tables": (closer and paper and cell.family == "ddpm", measure_ablations),
        "more": (has_more(cell), measure_more),
        "converged": (True, compare_with_converged),
    }
    for part, (applies, measure) in steps.items():
        if part in parts and applies:
            measure(cell, folder)


def main() -> None:
    """Runs what was asked for, then writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--steps", nargs="+", type=int, default=[20, 50])
    parser.add_argument("--samplers", nargs="+", default=["deterministic", "stochastic"])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help=_describe())
    parser.add_argument("--efforts", nargs="+", default=EFFORTS, choices=EFFORTS, help="of fxmask's plans in cells")
    parser.add_argument("--folder", type=Path, default=Path("build/quality"))
    parser.add_argument("--no-paper", action="store_true", help="leave the paper's learner out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--output", type=Path, default=EXAMPLES / "results" / "quality.md")
    options = parser.parse_args()
    device = require_device(options.device)
    torch.backends.cudnn.allow_tf32 = False  # convolutions of a GPU with as many bits as matrix products have
    options.folder.mkdir(parents=True, exist_ok=True)
    shipped = options.output.parent / "quality"
    _copy(shipped, options.folder, replace=False)
    parts = [] if options.table else options.parts
    for steps in options.steps if parts else ():
        for family in options.families:
            for sampler in options.samplers:
                cell = Cell.of(family, steps, float(sampler == "stochastic"), device)
                run(cell, options.folder, parts, not options.no_paper, options.efforts)
    write_table(options.folder, options.output)
    _copy(options.folder, shipped, replace=True)


def _copy(source: Path, target: Path, replace: bool) -> None:
    """Rows and masks. Images and journals, which are large, stay where they are."""
    if source.resolve() == target.resolve():
        return
    found = [path for path in source.glob("*.json") if not path.name.endswith(".journal.json")]
    for path in (*found, *source.glob("masks/**/plan.*")):
        place = target / path.relative_to(source)
        if replace or not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)


FIXED = ("branches, fitted forecast", "whole output, fitted forecast")
OURS = ("fxmask", MORE, ALIKE, "fxmask quick", *FIXED)
GUIDANCE = """*Lanes free*: of the plans with lanes alike and those whose lanes have rows of their own, the one that is better
on fresh noise; `pixart-4` with injected noise has lanes alike but for 50 steps, 2x. With the deterministic sampler, `ldm` at
50 steps excepted, it was chosen on held-out images, and parts of the batch had their own order, the unconditional one first.
The rival of the second table is the one of the first. *Difference of the lanes held*: the prediction without conditioning is
made at every third step; elsewhere it takes over what the other has changed by; it is missing in a few cells of 50 steps."""
SHORT = """## Where the lead is short

All of these have the stochastic sampler, with which images differ most in how hard they are. What was tried:

- DiT at guidance 4, 20 steps, 3x: thirteen finalists of four kinds lie within 1.0 dB on fresh images (17.8 to 18.8), while
  on the 32 images that are learned from the refined one leads by 3.0 dB, and on the 16 held-out ones by 0.9. Refined again on
  all 48 images it gained 0.05 dB; fits on all 48 instead of 32 change a fixed plan by 0.02 dB. An even forecast of the output
  gains 0.6 dB by three rounds of adjoints (19.1), as much as the fixed plan has that is ahead there.
- DDPM, 50 steps, 3x: finalists have 26.4 to 27.6 dB on fresh images, the even forecast 28.1. Learned and held-out images (32
  and 16) rank it 0.7 dB behind the one that is chosen; the two that lead on held-out images alone have 26.7 and 27.1.
- Steps that compute one lane and hold its difference to the other ([lanes](lanes.md#with-injected-noise)): at guidance 1.5, 20
  steps, 2x, they made a lead of 1.0 dB one of 2.4. In the other rows of this list no such plan was better on fresh noise, or
  after the first rollouts.

So it is the choice among plans of nearly equal quality that 48 images do not settle. What default effort does about it: the
finalists are compared on fresh noise too (about 15 units; cells without guidance and `pixart-4` at 20 steps are from before).
At guidance 1.5, 50 steps, 2x, the plan that was best on 24 learned and held-out images had 35.5 dB on the 128 of the table,
behind plain reuse of all branches (36.4), which is now taken. At guidance 4, 50 steps, 2x, differences between two finalists
vary by 5 dB from image to image, so that 56 fresh images tell them apart by 0.7 dB at best. Several times as many images to
learn from help:
"""
OTHERS, LAST = ("SSIM", "features"), ("converged", "classes", "units", "graphs")
WANTED = 2.0  # dB ahead of every rival that is no plan of ours
USUAL = ("fxmask", "fxmask quick", "fewer steps, scheduler's grid", "whole output, fitted forecast")
INTRODUCTION = f"""# Quality at equal MACs

`python examples/studies/quality.py`: {EVALUATION} samples per row, noise that learning has not seen, PSNR per image in dB
against the same sampler with the same noise: mean and 10th percentile. *Converged*: mean PSNR of the first {CONVERGED_IMAGES}
against DDIM at every timestep from the full sampler's first one on, about 1,000 steps, from the same noise (with the stochastic
sampler, a Brownian bridge of it); the only column in which plans on DDIM and plans on DPM-Solver++ can be compared. Grids with
fewer steps begin at another timestep, and `ddpm` and `dit` clip at every step, the more often the more steps there are.
*Classes*: share of samples that the shipped classifier puts in the class of the full sampler's. *Units*: learning, in full
sampling runs of the images that are learned from: 32 at 20 steps, 16 at 50; with the stochastic sampler 64 (DiT: 128) at 20
steps, 16 (DDPM: 32, DiT: 64) at 50. The ratios of a cell share what is measured, 2x comes first and pays for it. *Graphs*:
distinct step graphs. Fixed plans (reuse, forecasts) are fitted on the same images as fxmask's. *SSIM*: structural similarity.
*Features*: mean distance between the shipped classifier's 48 features of a sample and of the full sampler's, over the mean
distance between two of the full sampler's images. Denoisers are sampled without guidance unless the cell's name has its scale
(`dit-4-20`), and then both lanes go through in one batch; 16 of 24 images are learned from there, 32 of 48 with the stochastic
sampler at 20 steps. `ldm` and `pixart` are compared after decoding. With the stochastic sampler (DDIM, eta = 1) fewer steps
get the variance-weighted sum of the full sampler's noise. With guidance and 50 steps the rivals, about half of learning for 2x,
and what is learned from more images ran on an H200 (`--device cuda`, torch 2.11), all else on a CPU; 18 rows that were measured
on both differ by at most 0.002 dB.
"""


def write_table(folder: Path, output: Path) -> None:
    """All cells as Markdown: fxmask's lead over the best rival that is no plan of ours, then every row."""
    cells = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*stic.json"))}
    every = [Cell.of(family, steps, eta).name for steps in (20, 50) for family in NAMES for eta in (0.0, 1.0)]
    missing = [name for name in every if not all(key in cells.get(name, ()) for key in _usual(name))]
    lines = [INTRODUCTION]
    if missing:
        lines += ["Not measured yet, or not in full: " + ", ".join(missing) + ".", ""]
    guided = {name: rows for name, rows in cells.items() if _is_guided(name)}
    lines += ["## fxmask (default) and the best of the rivals", ""]
    lines += [f"Bold: a lead of less than the {WANTED:g} dB that are aimed at, or a fixed plan of ours that is better.", ""]
    without = {name: rows for name, rows in cells.items() if name not in guided}
    lines += [*_leads(without), "", *_by_other_measures(without)]
    if guided:
        lines += ["", "## The same with guidance", "", GUIDANCE, ""]
        lines += [*_leads(guided), "", *_by_other_measures(guided, lanes=True)]
    lines += ["", *SHORT.rstrip().splitlines(), *more_table(cells, _recorded())]
    lines += seeds_table(folder) + fid_table(folder) + ablation_tables(folder)
    for name, rows in cells.items():
        lines += ["", f"## {name}", ""]
        more = any("ssim" in row for row in rows.values())
        lines += [columns(*"plan,asked,MAC ratio,PSNR,10th pct".split(","), *(OTHERS if more else ()), *LAST)]
        lines += ["|" + "---|" * (9 + 2 * more)]
        for ratio in (1.0, *RATIOS):
            for key, row in sorted(_at(rows, ratio).items(), key=lambda item: -item[1].get("psnr", 0.0)):
                line = [key, f"{ratio:g}x", f"{row['ratio']:.2f}"]
                line += [f"{row[column]:.1f}" if column in row else "" for column in ("psnr", "p10", "converged")]
                line[5:5] = [f"{row[x]:.3f}" if x in row else "" for x in ("ssim", "features")] if more else []
                line += [f"{row['agreement']:.0%}" if "agreement" in row else ""]
                line += [f"{row['units']:.0f}" if "units" in row else "", str(row.get("graphs", ""))]
                lines.append(columns(*line))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _usual(name: str) -> list[str]:
    """Rows without which a cell is not measured in full."""
    keys = [key for key in USUAL if key != "fxmask quick" or not _is_guided(name)]
    return [f"{key} {ratio}" for key in keys for ratio in RATIOS]


def _recorded() -> dict[str, int]:
    """How many images each cell learns from, held-out ones included."""
    cells = [Cell.of(family, steps, eta) for steps in (20, 50) for family in NAMES for eta in (0.0, 1.0)]
    return {cell.name: math.prod(cell.training_runs) for cell in cells}


def _is_guided(name: str) -> bool:
    return name.startswith(tuple(f"{family}-{steps}-" for family in GUIDED for steps in (20, 50)))


def _leads(cells: dict[str, dict[str, Row]]) -> list[str]:
    """fxmask beside the best rival that is no plan of ours."""
    lines = ["| cell | asked | fxmask | best rival | lead | best fixed plan of ours |", "|---|---|---|---|---|---|"]
    for name, ratio, here, best in _compared(cells):
        fixed = [here[key]["psnr"] for key in FIXED if key in here]
        ours, other = here["fxmask"]["psnr"], here[best]["psnr"]
        fixed_best = _marked(f"{max(fixed):.1f}", max(fixed) > ours) if fixed else ""
        lead = _marked(f"{ours - other:+.1f}", ours - other < WANTED)
        lines.append(columns(name, f"{ratio:g}x", f"{ours:.1f}", f"{other:.1f} {best}", lead, fixed_best))
    return lines


def _by_other_measures(cells: dict[str, dict[str, Row]], lanes: bool = False) -> list[str]:
    """SSIM and features of fxmask and of the rival of the best PSNR, and with guidance what rows of their own add."""
    head = ["cell", "asked", *(("lanes alike", "lanes free") if lanes else ()), "SSIM", "rival's", "features", "rival's"]
    lines = [columns(*head), "|" + "---|" * len(head)]
    for name, ratio, here, best in _compared(cells):
        ours, other, alike = here["fxmask"], here[best], here.get(ALIKE)
        line = [name, f"{ratio:g}x"]
        line += [f"{row['psnr']:.1f}" if alike else "" for row in (alike or {}, ours)] if lanes else []
        line += [f"{row[key]:.3f}" if key in row else "" for key in ("ssim", "features") for row in (ours, other)]
        lines.append(columns(*line))
    return lines


def _compared(cells: dict[str, dict[str, Row]]) -> Iterator[tuple[str, float, dict[str, Row], str]]:
    """Cell, ratio, rows and the best rival's name, wherever there is something to compare."""
    for name, rows in cells.items():
        for ratio in RATIOS:
            here = _at(rows, ratio)
            others = {key: row["psnr"] for key, row in here.items() if key not in OURS and "psnr" in row and "paper" not in key}
            if "fxmask" in here and others:
                yield name, ratio, here, max(others, key=lambda key: others[key])


def _marked(text: str, mark: bool) -> str:
    return f"**{text}**" if mark else text


def _at(rows: dict[str, Row], ratio: float) -> dict[str, Row]:
    return {key.removesuffix(f" {ratio}"): row for key, row in rows.items() if key.endswith(f" {ratio}")}


if __name__ == "__main__":
    main()
