"""The plan of a configuration, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxmask.api import learn
from fxmask.ir.liveness import live_nodes
from fxmask.ir.macs import count_attention_macs
from fxmask.ir.mask import Mask
from fxmask.ir.plan import Plan
from fxmask.ir.program import Program
from fxmask.learning.paper import start
from fxmask.learning.paper.options import PaperOptions
from fxmask.metrics import psnr
from fxmask.passes.observer import switched_off
from fxmask.passes.rectify import rectify
from fxmask.reference import rollout
from fxmask.sampling.sampler import Sampler
from fxmask.storage.plans import load_plan, save_mask
from fxmask.tools.evaluation.run_file import Configuration

NEAR = 0.05  # of the asked ratio; stages within it are compared by quality


@dataclass(frozen=True)
class Planned:
    """A plan, and what came before it.

    Attributes:
        plan: what runs at each step.
        seconds: that learning took; ``None`` where nothing was learned.
        scores: of the paper's learner, float ``[T, blocks]``.
    """

    plan: Plan
    seconds: float | None = None
    scores: torch.Tensor | None = None


def plan_of(row: Configuration, program: Program, runs: Sequence[Sampler], folder: Path, seed: int, progress: bool) -> Planned:
    """The plan of a row that masks something; a learned one is kept in the folder, and learning goes on from there.

    Args:
        row: of kind interval, stage, paper or default.
        program: the captured denoiser.
        runs: recorded; learned from.
        folder: of this row.
        seed: of learning.
        progress: show a bar.
    """
    timesteps = runs[0].timesteps
    if row.kind == "interval":
        blocks = program.branches if row.blocks == "branch" else program.streams
        return Planned(rectify(program, evenly(program, timesteps, tuple(b.name for b in blocks), row.speedup)))
    if row.kind == "stage":
        return Planned(rectify(program, best_stage(program, runs[0], row.speedup)))
    mask, facts = _learned(row, program, runs, folder, seed, progress)
    if row.rectify:
        plan = rectify(program, mask)
    else:
        with switched_off("rectify"):
            plan = rectify(program, mask)
    scores = folder / "scores.pt"
    return Planned(plan, facts["seconds"], torch.load(scores, weights_only=True) if scores.exists() else None)


def _learned(
    row: Configuration, program: Program, runs: Sequence[Sampler], folder: Path, seed: int, progress: bool
) -> tuple[Mask, dict[str, Any]]:
    place = folder / "plan"
    if not (place / "plan.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        learner = "paper" if row.kind == "paper" else "default"
        given: dict[str, Any] = {}
        if learner == "paper":
            options = dict(row.options)
            make: Callable[..., PaperOptions] = PaperOptions.ours if options.pop("ours", False) else PaperOptions
            given["options"] = make(**options, on_scores=lambda scores: torch.save(scores, folder / "scores.pt"))
        mask = learn(
            program,
            runs,
            learner=learner,
            effort=row.effort,
            checkpoint=folder / "learning.checkpoint",
            seed=seed,
            progress=progress,
            speedup=None if row.options.get("strength") else row.speedup,
            **given,
        )
        save_mask(place, mask, {"seconds": time.perf_counter() - began}, {})
    mask, facts, _ = load_plan(place)
    return mask, dict(facts)


def evenly(program: Program, timesteps: Sequence[float], names: tuple[str, ...], speedup: float) -> Mask:
    """All of these blocks at as many evenly spaced steps as come nearest to a ratio of MACs."""
    steps = len(timesteps)
    group = torch.ones(len(names), dtype=torch.bool)
    rows = [start.evenly(steps, group, count) for count in range(1, steps + 1)]
    masks = [Mask(computed, tuple(timesteps), names, fingerprint=program.fingerprint) for computed in rows]
    low, high = 0, steps - 1
    while low < high:  # the ratio falls with the count
        middle = (low + high) // 2
        low, high = (middle + 1, high) if rectify(program, masks[middle]).mac_ratio > speedup else (low, middle)
    near = [masks[k] for k in (low - 1, low) if k >= 0]
    return min(near, key=lambda mask: abs(rectify(program, mask).mac_ratio - speedup))


def best_stage(program: Program, run: Sampler, speedup: float) -> Mask:
    """DeepCache (Ma et al., 2024) at a ratio: of the stages that come near it, the best on a recorded run.

    One stage is computed at evenly spaced steps; what lies outside of it is computed at each.
    """
    masks = [evenly(program, run.timesteps, (stage.name,), speedup) for stage in program.stages]
    ratios = [rectify(program, mask).mac_ratio for mask in masks]
    nearest = min(ratios, key=lambda ratio: abs(ratio / speedup - 1))
    within = max(NEAR, abs(nearest / speedup - 1))
    found = [mask for mask, ratio in zip(masks, ratios, strict=True) if abs(ratio / speedup - 1) <= within + 1e-9]
    if len(found) == 1:
        return found[0]
    return max(found, key=lambda mask: float(psnr(rollout(program, mask, run), run.final).mean()))


def macs_of(program: Program, plan: Plan) -> tuple[int, int]:
    """MACs of a whole run at the captured batch size, with attention and without."""
    graph = program.graph_module.graph
    attention: dict[int, int] = {}
    for step in plan.steps:
        if step.graph not in attention:
            loads = {program.block(load.block).values[load.value] for load in step.load}
            roots = {program.block(block).values[i] for block, i in step.store}
            attention[step.graph] = sum(count_attention_macs(node) for node in live_nodes(graph, loads, roots)[0])
    total = sum(step.macs for step in plan.steps)
    return total, total - sum(attention[step.graph] for step in plan.steps)
