"""Against the converged solution: fxmask learned on DPM-Solver++, and everything else, compared with 1,000 steps.

Two solvers with as many steps end at different images, so that neither can be the other's reference; what both approximate can.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from quality_cells import RATIOS, Cell, Evaluation, Results, searching

from fxmask.metrics import psnr

CONVERGED = 1000
CONVERGED_IMAGES = 64  # the first of a row's; 1,000 steps take long
SOLVER = "DPM-Solver++"


def measure_solver(cell: Cell, folder: Path) -> None:
    """fxmask (quick) learned on as many steps of DPM-Solver++ as the cell has, and both unaccelerated samplers."""
    results = Results(folder / f"{cell.name}.json")
    label, full = f"fxmask quick on {SOLVER}", f"{SOLVER}, all steps 1.0"
    if results.has(full) and all(results.has(f"{label} {ratio}") for ratio in RATIOS):
        return
    scheduler = cell.scheduler("DPMSolverMultistepScheduler")
    evaluation = Evaluation(cell, scheduler=scheduler)
    results.put(full, evaluation.full())
    journal = folder / f"{cell.name}-solver.journal.json"
    search = searching(cell, cell.training(scheduler=scheduler), "quick", journal)
    for ratio in (2.0, 1.5, 3.0):
        point = search.best(1 / ratio)
        results.put(f"{label} {ratio}", evaluation.of_mask(point.mask, own=False, units=point.units, kind=point.kind))


def compare_with_converged(family: str, folder: Path) -> None:
    """PSNR of the kept images against 1,000 deterministic steps from the same noise, for every deterministic cell."""
    path = folder / f"converged-{family}.pt"
    cell = Cell(family, 20, 0.0)
    if not path.exists():
        evaluation = Evaluation(cell)
        steps = CONVERGED - evaluation.runs[0].scheduler.config.steps_offset  # it would lead beyond the last timestep
        finals = []
        runs = evaluation.runs[: CONVERGED_IMAGES // evaluation.runs[0].batch_size]
        for run in runs:
            finals.append(run.with_steps(cell.model, steps).final)
            print(f"{path.stem}: {len(finals)} of {len(runs)} runs", flush=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        torch.save(cell.decode(torch.cat(finals)), partial)
        os.replace(partial, path)
    converged = torch.load(path, weights_only=True)
    for file in folder.glob(f"{family}-*-deterministic.json"):
        results = Results(file)
        for key, row in list(results.rows.items()):
            if not results.samples(key).exists() or "converged" in row:
                continue  # measured elsewhere, or done
            images = torch.load(results.samples(key), weights_only=True)
            quality = psnr(images[: len(converged)], converged).clamp(max=100)
            results.put(key, {**row, "images": images, "converged": float(quality.mean())})
