"""What a plan depends on in the sampler it was made for, as plain data, and whether another one is the same.

A plan is for the timesteps that the denoiser was given. A scheduler makes these from its configuration and the number of steps.
Where a pipeline hands it sigmas of its own, or a shift by the image's size, configurations are all there is to compare.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fxmask.errors import FxmaskError
from fxmask.sampling.schedulers import prepare_scheduler

ROUNDING = 1e-3  # of the largest timestep: grids are made in several types
LONGEST = 10  # times as many steps as a plan has: image to image begins in the middle of a longer run
SCALES = (1.0, 1e-3)  # denoisers are given the scheduler's timestep, or a thousandth of it
TRAINING = 10.0  # larger ones count steps of training; logarithms of sigmas, and sigmas between 0 and 1, are smaller


def scheduler_facts(scheduler: Any) -> dict[str, Any]:
    """A scheduler's class and configuration."""
    config = getattr(scheduler, "config", None)
    items = dict(config).items() if isinstance(config, Mapping) else ()
    plain = {key: _finite(json.loads(json.dumps(value, default=repr))) for key, value in items if not key.startswith("_")}
    return {"class": type(scheduler).__name__, "config": plain}


def _finite(value: Any) -> Any:
    """The same with the names of infinities, which JSON cannot hold: some schedulers' bounds are infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return {k: _finite(x) for k, x in value.items()} if isinstance(value, dict) else value


def sampler_facts(run: Any) -> dict[str, Any] | None:
    """What a plan depends on in the sampler of a recorded run.

    ``scheduler``, ``num_inference_steps``, what is plain in ``scheduler_kwargs`` and ``step_kwargs``, ``guidance_scale`` if a
    run of a scheduler has one, and, where they follow from these, ``scheduler_timesteps``. ``None`` if the run does not say
    which scheduler it had.
    """
    scheduler = getattr(run, "scheduler", None)
    if scheduler is None:
        return None
    count = int(getattr(scheduler, "num_inference_steps", None) or len(scheduler.timesteps))
    options = _plain(getattr(run, "scheduler_kwargs", {}))
    guidance = getattr(run, "guidance_scale", None)
    recorded, made = _floats(scheduler.timesteps), timesteps_of(scheduler, count, options)
    return {
        "scheduler": scheduler_facts(scheduler),
        "num_inference_steps": count,
        "scheduler_kwargs": options,
        "step_kwargs": _plain(getattr(run, "step_kwargs", {})),
        "scheduler_timesteps": recorded if made is not None and is_same_grid(recorded, made) else None,
        **({} if guidance is None else {"guidance_scale": float(guidance)}),
    }


def describe_difference(run: Any, other: Any) -> str | None:
    """In what the samplers of two recorded runs differ; ``None`` if in nothing that is known."""
    facts, others = (sampler_facts(x) or {} for x in (run, other))
    ours, theirs = (
        {
            "scheduler": f["scheduler"]["class"],
            **f["scheduler"]["config"],
            **f["step_kwargs"],
            "guidance_scale": f.get("guidance_scale"),
        }
        if f
        else {}
        for f in (facts, others)
    )
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    return ", ".join(f"{name} {ours.get(name)} and {theirs.get(name)}" for name in names[:3]) if names else None


def abbreviated(timesteps: Sequence[float]) -> str:
    """The first and last of some timesteps."""
    shown = [f"{t:g}" for t in timesteps]
    return ", ".join(shown if len(shown) < 8 else [*shown[:3], "...", *shown[-2:]]) + f" ({len(shown)} steps)"


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
    """The usual timesteps of a scheduler, if no run of it has those of a plan; ``None`` if one may have, or nobody can tell.

    Args:
        scheduler: whose.
        timesteps: of the plan, as the denoiser is given them.
    """
    usual = timesteps_of(scheduler, len(timesteps))
    if usual is None or not _are_comparable(timesteps, usual):
        return None
    return None if any(_holds(grid, timesteps) for grid in _grids(scheduler, len(timesteps))) else usual


def _are_comparable(timesteps: Sequence[float], grid: Sequence[float]) -> bool:
    """Whether the denoiser is surely given the scheduler's own timesteps: pipelines may make something else of them."""
    if min(max(map(abs, timesteps)), max(map(abs, grid))) > TRAINING:
        return True
    return any(is_same_grid(timesteps[:1], [scale * grid[0]]) for scale in SCALES)


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
