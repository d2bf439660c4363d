"""The form of the paper's Tables 4 and 5 (arXiv 2603.19939): its learner with one part changed at a time.

The paper fixes lambda1, and the speed-up is an outcome. `fxmask.paper` finds lambda1 for an asked speed-up, so here every
variant is asked for 2x, and what differs is quality; only leaving rectification out changes MACs and nothing else.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from quality_cells import Cell, Results, Row, columns
from quality_fid import interval, many, of, with_fid

import fxmask
from fxmask.learning.paper.options import PaperOptions
from fxmask.passes.observer import switched_off
from fxmask.storage.plans import load_plan, save_mask

COMPLETE = "paper's learner"
GUMBEL, UNSCALED, UNIMODAL = "paper, Gumbel-Softmax", "paper, no timestep scaling", "paper, no bi-modal term"
PASSES = 40
PAPER = {
    COMPLETE: PaperOptions(epochs=PASSES),
    GUMBEL: PaperOptions(epochs=PASSES, gumbel=True),
    UNSCALED: PaperOptions(epochs=PASSES, weighted=False),
    UNIMODAL: PaperOptions(epochs=PASSES, bimodal=0.0),
}


def paper_mask(cell: Cell, folder: Path, name: str) -> tuple[fxmask.Mask, Mapping[str, Any]]:
    """A variant's mask at 2x, and what learning it took; learned now if it is not kept."""
    options = PAPER[name]
    place = Results(folder / f"{cell.name}.json").mask(f"{name} 2.0")
    if not place.exists():
        started = time.perf_counter()
        training = cell.training()[0]
        program = fxmask.capture(cell.model, training.calls[0][0])
        mask = fxmask.learn(program, training, speedup=2.0, learner="paper", options=options)
        # one pass is the teacher's call, a forward and a backward pass of every step, 4 units of the one recorded run
        save_mask(place, mask, {"units": 4.0 * PASSES, "seconds": time.perf_counter() - started}, {})
    mask, facts, _ = load_plan(place)
    return mask, facts


def measure_ablations(cell: Cell, folder: Path) -> None:
    """Every variant on the noise of the FID rows, and the complete one without rectification."""
    results = of(cell, folder)
    for name in PAPER:
        if results.has(f"{name} 2.0"):
            continue
        mask, facts = paper_mask(cell, folder, name)
        row = with_fid(many(cell).of_mask(mask, **facts))
        results.put(f"{name} 2.0", {**row, **_without_rectification(cell, mask)} if name == COMPLETE else row)


def _without_rectification(cell: Cell, mask: fxmask.Mask) -> Row:
    """The MAC ratio of a mask taken at its word, and whether its samples are the rectified plan's, bit for bit."""
    program, run = many(cell).program, many(cell).runs[0]
    plan = fxmask.rectify(program, mask)
    with switched_off("rectify"):
        kept = fxmask.rectify(program, mask)
    samples = [run.rollout(fxmask.compile(program, p, backend="eager")) for p in (plan, kept)]
    return {"unrectified": kept.mac_ratio, "same": torch.equal(*samples)}


TEXT = """\
Theirs: CIFAR-10, 100 steps, FID of Inception features, fixed lambda, so that the speed-up is an outcome. Ours: digits, FID on
classifier features (as above), and every variant is asked for 2x, so that only quality can differ; one learning seed.
"""


def ablation_tables(folder: Path) -> list[str]:
    """Both tables beside the paper's figures, and what agrees."""
    lines: list[str] = []
    for path in sorted(folder.glob("*-fid.json")):
        rows = {key.removesuffix(" 2.0"): row for key, row in json.loads(path.read_text(encoding="utf-8")).items()}
        if not all(name in rows for name in PAPER):
            continue
        lines += ["", f"## The paper's Tables 4 and 5 in our setting: {path.stem.removesuffix('-fid')}", ""]
        lines += [TEXT]
        head = ("speed-up (paper)", "FID (paper)", "speed-up (MACs)", "FID", "interval", "PSNR")
        lines += [columns("sampling method (Table 4)", *head), "|---|---|---|---|---|---|---|"]
        lines += [columns("random", "1.63x", "4.66", *_figures(rows[COMPLETE]))]
        lines += [columns("Gumbel-Softmax", "1.29x", "4.67", *_figures(rows[GUMBEL])), ""]
        lines += [
            columns("rectification (Table 5)", "loss scaling", "bi-modal loss", *head),
            "|---|---|---|---|---|---|---|---|---|",
        ]
        raw = {**rows[COMPLETE], "ratio": rows[COMPLETE]["unrectified"]}
        lines += [columns("yes", "yes", "yes", "1.63x", "4.66", *_figures(rows[COMPLETE]))]
        lines += [columns("no", "yes", "yes", "1.49x", "4.66", *_figures(raw))]
        lines += [columns("yes", "no", "yes", "1.62x", "4.74", *_figures(rows[UNSCALED]))]
        lines += [columns("yes", "yes", "no", "1.63x", "4.72", *_figures(rows[UNIMODAL])), ""]
        lines += _agreement(rows)
    return lines


def _figures(row: Row) -> tuple[str, ...]:
    low, high = interval(row)
    return f"{row['ratio']:.2f}x", f"{row['fid']:.3f}", f"{low:.3f} to {high:.3f}", f"{row['psnr']:.1f}"


def _agreement(rows: Mapping[str, Row]) -> list[str]:
    """The paper's four findings, each with what the figures here say of it."""
    complete = rows[COMPLETE]
    claims = {
        GUMBEL: "random sampling beats Gumbel-Softmax (4.66 at 1.63x against 4.67 at 1.29x)",
        UNSCALED: "without timestep-aware scaling quality is lower (4.74 against 4.66)",
        UNIMODAL: "without the bi-modal term quality is lower (4.72 against 4.66)",
    }
    lines = ["What agrees with the paper and what does not:", ""]
    for name, claim in claims.items():
        low, high = interval(rows[name], complete)
        gain = rows[name]["psnr"] - complete["psnr"]
        verdict = "agrees" if low > 0 else "does not agree" if high < 0 else "not decided"
        verdict += ", though PSNR says the opposite" if (low > 0 and gain > 0.1) or (high < 0 and gain < -0.1) else ""
        lines.append(f"- *{claim}*: {verdict}. FID changes by {low:+.3f} to {high:+.3f}, PSNR by {gain:+.1f} dB.")
    more = complete["ratio"] / complete["unrectified"] - 1
    verdict = "agrees" if more > 0.01 and complete["same"] else "does not agree"
    lines.append(
        f"- *rectification makes the same samples cheaper (1.49x to 1.63x, 9 %)*: {verdict}. The samples are "
        f"{'equal bit for bit' if complete['same'] else 'NOT equal'}, the MAC ratio changes by {more:+.1%}."
        + (
            ""
            if more > 0.01
            else " Blocks are residual branches here, and the stream reads every computed one at once: none is dead."
        )
    )
    return lines
