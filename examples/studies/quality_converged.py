"""Against the converged solution: fxmask learned on DPM-Solver++, and everything else, compared with about 1,000 steps.

Two solvers with as many steps end at different images, so that neither can be the other's reference; what both approximate can:
DDIM at every timestep from the full sampler's first one on. (Grids of other lengths begin elsewhere, from the same noise, and
approximate another solution by that.)
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import torch
from quality_cells import RATIOS, Cell, Evaluation, Results, Row, searching
from quality_rivals import coarse_ddim, noise_weights, rivals

from fxmask.metrics import psnr
from fxmask.sampling.trajectory import Trajectory
from fxmask.storage.plans import load_plan, save_mask

CONVERGED_IMAGES = 64  # the first of a row's; about 1,000 steps take long
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
        save_mask(results.mask(f"{label} {ratio}"), point.mask, {"units": point.units, "kind": point.kind}, {})
        results.put(f"{label} {ratio}", evaluation.of_mask(point.mask, own=False, units=point.units, kind=point.kind))


def bridge(run: Trajectory, eta: float, generator: torch.Generator) -> tuple[list[int], list[torch.Tensor]]:
    """Every timestep that a recorded run passes, and noises for them whose sums are the noises that the run drew.

    Given the sum ``Z = sum(w_s z_s)`` with ``|w| = 1``, ``z_s = e_s + w_s (Z - sum(w e))`` with independent normal ``e`` are
    independent and normal: a Brownian bridge, step by step.
    """
    timesteps: list[int] = []
    noises: list[torch.Tensor] = []
    for i, (t, after) in enumerate(itertools.pairwise([*(int(t) for t in run.timesteps), -1])):
        inside = list(range(t, after, -1))
        drawn = torch.randn(len(inside), *run.initial_noise.shape, generator=generator).to(run.initial_noise.device)
        if eta and run.noises[i]:
            weights = noise_weights(run.scheduler, [*inside, after], eta).to(drawn)
            lacking = run.noises[i][0].to(drawn) - torch.tensordot(weights, drawn, 1)
            drawn = drawn + weights.reshape(-1, *[1] * lacking.dim()) * lacking
        timesteps += inside
        noises += list(drawn)
    return timesteps, noises


def _converged(cell: Cell, run: Trajectory, generator: torch.Generator) -> torch.Tensor:
    timesteps, noises = bridge(run, cell.eta, generator)
    return coarse_ddim(cell.model, run, timesteps, cell.eta, noises)


def converged_images(cell: Cell, folder: Path) -> torch.Tensor:
    """The first images of a cell's fresh noise with every timestep."""
    path = folder / f"converged-{cell.name}.pt"
    if not path.exists():
        evaluation = Evaluation(cell)
        runs = evaluation.runs[: CONVERGED_IMAGES // evaluation.runs[0].batch_size]
        generator = torch.Generator().manual_seed(0)
        finals = []
        for run in runs:
            finals.append(_converged(cell, run, generator))
            print(f"{path.stem}: {len(finals)} of {len(runs)} runs", flush=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        torch.save(cell.decode(torch.cat(finals)), partial)
        os.replace(partial, path)
    images: torch.Tensor = torch.load(path, weights_only=True)
    return images


def restore_images(cell: Cell, results: Results) -> None:
    """Images of rows that were measured elsewhere: from their masks, or by the rivals' rules."""
    missing = [key for key, row in results.rows.items() if "converged" not in row and not results.samples(key).exists()]
    if not missing:
        return
    solver = [key for key in missing if SOLVER in key and not key.startswith(f"{SOLVER}, fewer")]
    usual = Evaluation(cell)
    solved = Evaluation(cell, scheduler=cell.scheduler("DPMSolverMultistepScheduler")) if solver else usual
    others = dict(rivals(usual, cell.training()))
    for key in missing:
        name, _, ratio = key.rpartition(" ")
        evaluation = solved if key in solver else usual
        if results.mask(key).exists():
            row: Row | None = evaluation.of_mask(load_plan(results.mask(key))[0], own=False)
        elif ratio == "1.0":
            row = evaluation.full()
        else:
            row = others[name](float(ratio)) if name in others else None
        if row is not None:
            results.keep_images(key, row["images"])


def compare_with_converged(cell: Cell, folder: Path) -> None:
    """PSNR of the kept images of a cell against every timestep from the same noise."""
    results = Results(folder / f"{cell.name}.json")
    restore_images(cell, results)
    for key, row in list(results.rows.items()):
        if not results.samples(key).exists() or "converged" in row:
            continue  # done, or measured elsewhere and nothing says how
        converged = converged_images(cell, folder)
        images = torch.load(results.samples(key), weights_only=True)
        quality = psnr(images[: len(converged)], converged).clamp(max=100)
        results.put(key, {**row, "images": images, "converged": float(quality.mean())})
