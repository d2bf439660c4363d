"""What a plan depends on in the sampler it was made for, as plain data, and whether another one is the same.

A plan is for the timesteps that the denoiser was given. A scheduler makes these from its configuration and the number of steps,
unless the pipeline hands it sigmas of its own, or a shift by the size of the image; then configurations are all there is to compare.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fxmask.errors import FxmaskError
from fxmask.sampling.schedulers import prepare_scheduler

ROUNDING = 1e-3  # of the largest timestep: grids are made in several types
LONGEST = 10  # times as many steps as a plan has: image to image begins in the middle of a longer run
SCALES = (1.0, 1e-3)  # denoisers are given the scheduler's timestep, or a thousandth of it


def scheduler_facts(scheduler: Any) -> dict[str, Any]:
    """A scheduler's class and configuration."""
    config = getattr(scheduler, "config", None)
    items = dict(config).items() if isinstance(config, Mapping) else ()
    plain = {key: json.loads(json.dumps(value, default=repr)) for key, value in items if not key.startswith("_")}
    return {"class": type(scheduler).__name__, "config": plain}


def sampler_facts(run: Any) -> dict[str, Any] | None:
    """What a plan depends on in the sampler of a recorded run.

    ``scheduler``, ``num_inference_steps``, plain ``scheduler_kwargs`` and ``step_kwargs``, and ``scheduler_timesteps``, where these
    follow from the former. ``None`` if the run does not say which scheduler it had.
    """
    scheduler = getattr(run, "scheduler", None)
    if scheduler is None:
        return None
    count = int(getattr(scheduler, "num_inference_steps", None) or len(scheduler.timesteps))
    options = _plain(getattr(run, "scheduler_kwargs", {}))
    recorded, made = _floats(scheduler.timesteps), timesteps_of(scheduler, count, options)
    return {
        "scheduler": scheduler_facts(scheduler),
        "num_inference_steps": count,
        "scheduler_kwargs": options,
        "step_kwargs": _plain(getattr(run, "step_kwargs", {})),
        "scheduler_timesteps": recorded if made is not None and is_same_grid(recorded, made) else None,
    }


def timesteps_of(scheduler: Any, count: int, options: Mapping[str, Any] | None = None) -> list[float] | None:
    """The timesteps of a scheduler that is set to so many steps; ``None`` if it cannot be."""
    try:
        return _floats(prepare_scheduler(scheduler, count, options=options).timesteps)
    except FxmaskError:
        return None


def is_same_grid(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two runs have the same timesteps, but for rounding."""
    tolerance = ROUNDING * max(map(abs, [*a, *b]), default=0.0)
    return len(a) == len(b) and all(abs(x - y) <= tolerance for x, y in zip(a, b, strict=True))


def cannot_make(scheduler: Any, timesteps: Sequence[float]) -> list[float] | None:
    """Timesteps of a scheduler that can not be those of a plan; ``None`` if they can be, or if nobody can tell.

    Args:
        scheduler: whose.
        timesteps: of the plan, as the denoiser is given them.
    """
    usual = timesteps_of(scheduler, len(timesteps))
    comparable = usual is not None and any(_has_scale(timesteps, usual, scale) for scale in SCALES)
    if usual is None or not comparable or any(_holds(grid, timesteps) for grid in _grids(scheduler, len(timesteps))):
        return None
    return usual


def _grids(scheduler: Any, count: int) -> Iterator[list[float]]:
    """Timesteps that a pipeline of so many denoiser calls may set, the likeliest first."""
    present = getattr(scheduler, "timesteps", None)
    if present is not None:
        yield _floats(present)
    sigmas = [1.0 - k / count for k in range(count)]  # as pipelines of flow matching pass them
    for steps, options in [(count, {}), (count, {"sigmas": sigmas}), ((count + 1) // 2, {})]:
        yield timesteps_of(scheduler, steps, options) or []
    for steps in range(count + 1, LONGEST * count + 1):
        yield timesteps_of(scheduler, steps) or []


def _has_scale(timesteps: Sequence[float], grid: Sequence[float], scale: float) -> bool:
    """Whether the plan's timesteps are of the scheduler's kind: no others in size, and as whole as its own are."""
    top, most = max(map(abs, timesteps)), scale * max(map(abs, grid))
    whole = all(float(t).is_integer() for t in grid) and scale == 1.0
    return most / LONGEST < top <= most * LONGEST if not whole else all(float(t).is_integer() for t in timesteps)


def _holds(grid: Sequence[float], timesteps: Sequence[float]) -> bool:
    """Whether the timesteps come in a row in a grid, at some scale."""
    count = len(timesteps)
    starts = range(len(grid) - count + 1)
    return any(is_same_grid([scale * t for t in grid[k : k + count]], timesteps) for scale in SCALES for k in starts)


def _floats(timesteps: Any) -> list[float]:
    return [float(t) for t in timesteps]


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that JSON can hold."""
    return {key: value for key, value in options.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, list) else isinstance(value, (bool, int, float, str))
