"""What `quality.py` compares fxmask with at equal MACs: fewer steps, fixed reuse and forecasts, a lane of guidance skipped."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from quality_cells import Evaluation, Row

import fxmask
from fxmask.learning.levels import Level, evenly, levels_of
from fxmask.learning.schedule import Schedule
from fxmask.learning.student import Student
from fxmask.sampling.trajectory import Trajectory, guided, twice


def _alpha(scheduler: Any, t: float) -> torch.Tensor:
    """Cumulative alpha at a timestep; behind the last one, at -1, the scheduler's final one."""
    return scheduler.alphas_cumprod.double()[int(t)] if t >= 0 else torch.as_tensor(scheduler.final_alpha_cumprod).double()


def _sigma(now: torch.Tensor, after: torch.Tensor, eta: float) -> torch.Tensor:
    return eta * ((1 - after) / (1 - now) * (1 - now / after)).clamp_min(0).sqrt()


def noise_weights(scheduler: Any, grid: Sequence[float], eta: float) -> torch.Tensor:
    """Shares, of norm 1, of the noise of each step of ``grid`` in what a single step over all of it would draw.

    Noise of a step to ``alpha`` is scaled by ``sqrt(alpha_end / alpha)`` until the end of the grid.
    """
    alphas = [_alpha(scheduler, t) for t in grid]
    weights = [_sigma(a, b, eta) * (alphas[-1] / b).sqrt() for a, b in itertools.pairwise(alphas)]
    stacked = torch.stack(weights)
    return stacked / stacked.norm().clamp_min(1e-30)


@torch.no_grad()
def coarse_ddim(
    model: torch.nn.Module,
    fine: Trajectory,
    timesteps: Sequence[int],
    eta: float,
    noises: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """DDIM at chosen timesteps with given noises, or with the sums of a finer run's.

    Song et al., "Denoising Diffusion Implicit Models", 2021, Eq. 12 and 16. Noise ``z`` of fine steps within a coarse one
    adds up with weights ``sigma_i sqrt(alpha_end / alpha_i)``, as it would if the fine steps ran.
    """
    scheduler = fine.scheduler
    grid = [*fine.timesteps, -1.0]
    x = fine.initial_noise.clone()
    for k, (t, after) in enumerate(zip(timesteps, [*timesteps[1:], -1], strict=True)):
        call = {**fine.calls[0][0], fine.sample: twice(x, fine.guidance_scale)}
        call["timestep"] = torch.as_tensor(int(t), device=x.device).expand(torch.as_tensor(call["timestep"]).shape)
        output = model(**call)
        epsilon = guided(output[0] if not isinstance(output, torch.Tensor) else output, fine.guidance_scale)
        if epsilon.shape[1] == 2 * x.shape[1]:
            epsilon = epsilon.chunk(2, dim=1)[0]
        a, b = _alpha(scheduler, t), _alpha(scheduler, after)
        start = (x - (1 - a).sqrt() * epsilon) / a.sqrt()
        if scheduler.config.clip_sample:
            start = start.clamp(-scheduler.config.clip_sample_range, scheduler.config.clip_sample_range)
        s = _sigma(a, b, eta)
        x = b.sqrt() * start + (1 - b - s**2).clamp_min(0).sqrt() * epsilon
        inside = [i for i in range(len(grid) - 1) if after < grid[i] <= t]
        if noises is not None:
            x = x + s * noises[k]
        elif eta and inside:
            weights = noise_weights(scheduler, [grid[i] for i in inside] + [grid[inside[-1] + 1]], eta)
            x = x + s * sum(w * fine.noises[i][0].to(x.device) for w, i in zip(weights, inside, strict=True))
        x = x.to(fine.initial_noise.dtype)
    return x


def rivals(evaluation: Evaluation, training: Sequence[Trajectory]) -> Iterator[tuple[str, Callable[[float], Row | None]]]:
    """Every rival: its name, and a function from a MAC ratio to its line."""
    cell, runs, model = evaluation.cell, evaluation.runs, evaluation.cell.model
    teacher = Student(fxmask.capture(model, training[0].calls[0][0]), training[:-1])
    levels = levels_of(teacher, 0)

    def own_grid(ratio: float) -> Row:
        steps = max(1, round(cell.steps / ratio))
        scheduler = cell.scheduler()
        scheduler.set_timesteps(steps)
        timesteps = scheduler.timesteps.tolist()
        return evaluation.row([coarse_ddim(model, t, timesteps, cell.eta) for t in runs], cell.steps / steps)

    def same_grid(ratio: float) -> Row:
        steps = max(1, round(cell.steps / ratio))
        timesteps = [int(runs[0].timesteps[round(k * cell.steps / steps)]) for k in range(steps)]
        return evaluation.row([coarse_ddim(model, t, timesteps, cell.eta) for t in runs], cell.steps / steps)

    def schedule(level: Level, ratio: float) -> Schedule | None:
        found = evenly(teacher, level, 1 / ratio)
        return found if found is not None and abs(teacher.spent(found) * ratio - 1) <= 0.12 else None

    def fixed(level: Level) -> Callable[[float], Row | None]:
        def row(ratio: float) -> Row | None:
            found = schedule(level, ratio)
            if found is None:
                return None
            return evaluation.of_mask(teacher.mask(found, teacher.rollout(found).coefficients))

        return row

    def deepest(ratio: float) -> Row | None:
        stages = [level for level in levels if "stage" in level.name and level.history == 1]
        reachable = {level: schedule(level, ratio) for level in stages}
        scores = {level: teacher.score(teacher.rollout(found)) for level, found in reachable.items() if found is not None}
        return fixed(min(scores, key=lambda level: scores[level]))(ratio) if scores else None

    def one_lane(ratio: float) -> Row | None:
        steps, count = cell.steps, round((2 / ratio - 1) * cell.steps)
        if count < 1:
            return None
        full = {round(k * steps / count) for k in range(count)}
        (name,) = named("output", 1).loads
        compute = torch.ones(steps, 2, 1, dtype=torch.bool)
        terms = {}
        for step in set(range(steps)) - full:
            compute[step, 1] = False
            last = max(x for x in full if x < step)
            terms[step, "uncond", name] = (last, 1.0), ((name, step, "cond"), 1.0), ((name, last, "cond"), -1.0)
        lanes: dict[str, Any] = {"lanes": ("cond", "uncond"), "batched": True, "parts": (1, 0)}
        fingerprint = evaluation.program.fingerprint
        return evaluation.of_mask(
            fxmask.Mask(compute, runs[0].timesteps, (name,), fxmask.Forecast(terms), fingerprint, **lanes)
        )

    def solver(ratio: float) -> Row:
        steps = max(1, round(cell.steps / ratio))
        scheduler = cell.scheduler("DPMSolverMultistepScheduler")
        samples = [cell.record(seed, size, scheduler, steps).final for seed, size in evaluation.seeds]
        return evaluation.row(samples, cell.steps / steps, own=False)

    def named(name: str, history: int) -> Level:
        return next(level for level in levels if level.name == name and level.history == history)

    yield "fewer steps, scheduler's grid", own_grid
    yield "fewer steps, same grid", same_grid
    yield "FORA: all branches reused", fixed(named("branches", 1))
    if cell.family in ("ddpm", "ldm"):
        yield "DeepCache: best stage reused", deepest
    yield "whole output held", fixed(named("output", 1))
    yield "branches, fitted forecast", fixed(named("branches", 3))
    yield "whole output, fitted forecast", fixed(replace(named("output", 3), samples=2 if cell.eta else 0))
    if cell.guidance is not None:
        yield "difference of the lanes held", one_lane
    if not cell.eta:
        yield "DPM-Solver++, fewer steps", solver
