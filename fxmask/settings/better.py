"""Better masks by further calls of the denoiser, kept only where recorded noise that nobody learned from says so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fxmask.errors import InputError
from fxmask.ir.forecast import Forecast, Source
from fxmask.ir.mask import Mask
from fxmask.ir.program import Program
from fxmask.learning.candidate import ParetoPoint
from fxmask.learning.effort import EFFORTS, Limits
from fxmask.learning.instant.parts import RunPart, parts_of
from fxmask.learning.instant.plans import SMALLEST, relative_squares
from fxmask.learning.outcome import Outcome
from fxmask.learning.precision import exact, widened
from fxmask.learning.room import Room
from fxmask.learning.search import Search
from fxmask.passes.rectify import rectify
from fxmask.runtime.model import AcceleratedModel
from fxmask.sampling.sampler import Sampler
from fxmask.settings.key import Setting

JUDGES = 4  # runs with fresh noise that masks are compared on
BETTER = 0.1  # dB by which a mask must be better, and by more than its standard error


def better_mask(
    program: Program,
    runs: list[Sampler],
    mask: Mask,
    outcome: Outcome,
    limits: Limits,
    *,
    effort: str = "quick",
    seed: int = 0,
    progress: bool = True,
    backend: str = "auto",
    max_learning_bytes: int | None = None,
    learn_dtype: torch.dtype = torch.float32,
    checkpoint: str | Path | None = None,
    guarded: bool = False,
) -> tuple[Mask | None, float, int]:
    """Learn a mask and compare it with the present one.

    Args:
        program: the captured denoiser.
        runs: recorded.
        mask: in use.
        outcome: that both are to meet.
        limits: bounds on both.
        effort: ``"quick"`` or ``"default"``.
        seed: of everything random.
        progress: show a progress bar.
        backend: what latencies are measured with.
        max_learning_bytes: see ``fxmask.learn``.
        learn_dtype: see ``fxmask.learn``.
        checkpoint: see ``fxmask.learn``.
        guarded: whether every run is to be kept within an error, which takes checks of full steps: all lanes do the same then.

    Returns:
        The mask, ``None`` if it is not better; its relative L2 error on fresh noise; how many calls of the denoiser that took.
    """
    if effort not in EFFORTS:
        raise InputError(f"effort={effort!r} is unknown; choose one of {['instant', *EFFORTS]}")
    options: dict[str, Any] = {"effort": EFFORTS[effort], "seed": seed, "progress": progress, "backend": backend}
    parts, steps, calls = parts_of(runs[0]), runs[0].num_steps, 0
    if any(parts_of(run) != parts for run in runs):
        raise InputError("recorded runs change the form of their predictions at different steps; guide them alike")
    if guarded or len(parts) > 1:
        options["lanes"] = "alike"  # rows of lanes have no checks, and are not put together with those of another number
    masks = []
    for number, (first, end) in enumerate(parts):
        if len(parts) > 1 and end - first == 1:
            masks.append(Mask.ones(program, runs[0].timesteps[first:end]))
            continue
        cut = runs if len(parts) == 1 else [RunPart(run, first, end) for run in runs]
        own = outcome if len(parts) == 1 else Outcome(macs=_spent(program, mask, first, end))
        file = _numbered(checkpoint, number if len(parts) > 1 else None)
        point = _learned(program, cut, own, limits, max_learning_bytes, learn_dtype, checkpoint=file, **options)
        masks.append(point.mask)
        calls += round(point.units * (end - first) * sum(run.batch_size for run in runs))
    found = masks[0] if len(parts) == 1 else joined(masks, parts, program)
    judges = [runs[k % len(runs)].renoised(program.model, 104_729 * (seed + 1) + k) for k in range(JUDGES)]
    calls += 3 * steps * sum(run.batch_size for run in judges)
    ours, theirs = (decibels_on(program, candidate, judges) for candidate in (found, mask))
    gain = theirs - ours  # errors: smaller is better
    doubt = float(gain.std(correction=1) / len(gain) ** 0.5) if len(gain) > 1 else 0.0
    better = float(gain.mean()) > max(BETTER, doubt)
    error = float((10 ** (ours / 10)).mean().sqrt())
    return (found if better else None), error, calls


def _learned(
    program: Program,
    runs: Sequence[Sampler],
    outcome: Outcome,
    limits: Limits,
    max_learning_bytes: int | None,
    learn_dtype: torch.dtype,
    **options: Any,
) -> ParetoPoint:
    """What further calls of the denoiser find; options are those of ``Search``."""
    room = Room.of(max_learning_bytes, runs[0].final.device)
    with exact():
        learned, trajectories, deployed = widened(program, runs, learn_dtype, room)
        search = Search(learned, trajectories, limits=limits, room=room, deployed=deployed, **options)
        return search.best(outcome.budget) if outcome.max_error is None else search.meet_error(outcome.max_error)


def _spent(program: Program, mask: Mask, first: int, end: int) -> float:
    """What a mask spends in some steps, as a share of these in full."""
    plan = rectify(program, mask)
    return min(1.0, sum(plan.macs_per_step[first:end]) / ((end - first) * plan.full_macs))


def joined(masks: Sequence[Mask], parts: Sequence[tuple[int, int]], program: Program) -> Mask:
    """One mask of those of parts of a run, each of which reads that part alone.

    Args:
        masks: of the parts, without lanes.
        parts: first step and end of each.
        program: that all are of.

    Raises:
        MaskError: blocks of two of them cannot be in one mask.
    """
    listed = set().union(*(mask.blocks for mask in masks))
    names = tuple(block.name for block in program.blocks if block.name in listed)
    rows = torch.ones(parts[-1][1], len(names), dtype=torch.bool)
    terms: dict[tuple[Any, ...], Any] = {}
    for mask, (first, end) in zip(masks, parts, strict=True):
        if mask.lanes:
            raise InputError("masks with rows for each lane are not put together where the form of calls changes midway")
        for k, name in enumerate(mask.blocks):
            rows[first:end, names.index(name)] = mask.compute[:, k]
        own = mask.forecast.terms if mask.forecast else {}
        for (step, name), pairs in own.items():
            terms[first + step, name] = tuple((_moved(source, first), c) for source, c in pairs)
    timesteps = tuple(t for mask in masks for t in mask.timesteps)
    return Mask(rows, timesteps, names, Forecast(terms) if terms else None, program.fingerprint, None)


def _moved(source: Source, steps: int) -> Source:
    """What a forecast reads, so many steps later."""
    return source + steps if isinstance(source, int) else (source[0], source[1] + steps)


def _numbered(checkpoint: str | Path | None, part: int | None) -> Path | None:
    """A file for each part of a run."""
    if checkpoint is None or part is None:
        return None if checkpoint is None else Path(checkpoint)
    return Path(checkpoint).with_suffix(f".{part}.json")


def journal_in(folder: str | Path | None, component: str | None, setting: Setting) -> Path | None:
    """The file of a folder that keeps what was measured of a denoiser at a setting."""
    if folder is None:
        return None
    name = hashlib.sha256(json.dumps([component, setting.to_data()], sort_keys=True).encode()).hexdigest()[:16]
    return Path(folder) / f"{component}-{name}.json"


def check_checkpoint(folder: str | Path | None, effort: str) -> None:
    """Make the folder.

    Raises:
        InputError: nothing would be in it, there is a file in its place, or it cannot be made.
    """
    if folder is None:
        return
    if effort == "instant":
        raise InputError("checkpoint= keeps what further calls of the denoiser measured; pass effort='quick' or 'default' too")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"checkpoint={str(folder)!r} must be a folder for a pipeline, a file for each plan: {error}"
        ) from error


def decibels_on(program: Program, mask: Mask, runs: list[Sampler]) -> torch.Tensor:
    """Relative square errors in dB, float64 ``[N]``, of the final samples of all runs with a mask."""
    model = AcceleratedModel(program, rectify(program, mask), "eager")
    found = [relative_squares(run.rollout(model), run) for run in runs]
    return 10 * torch.cat(found).clamp_min(SMALLEST).log10()
