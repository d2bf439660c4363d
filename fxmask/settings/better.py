"""Better masks by further calls of the denoiser, kept only where recorded noise that nobody learned from says so."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from fxmask.errors import InputError
from fxmask.ir.mask import Mask
from fxmask.ir.program import Program
from fxmask.learning.effort import EFFORTS, Limits
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

    Returns:
        The mask, ``None`` if it is not better; its relative L2 error on fresh noise; how many calls of the denoiser that took.
    """
    if effort not in EFFORTS:
        raise InputError(f"effort={effort!r} is unknown; choose one of {['instant', *EFFORTS]}")
    room = Room.of(max_learning_bytes, runs[0].final.device)
    with exact():
        learned, trajectories, deployed = widened(program, runs, learn_dtype, room)
        search = Search(
            learned,
            trajectories,
            effort=EFFORTS[effort],
            limits=limits,
            seed=seed,
            progress=progress,
            checkpoint=checkpoint,
            backend=backend,
            room=room,
            deployed=deployed,
        )
        point = search.best(outcome.budget) if outcome.max_error is None else search.meet_error(outcome.max_error)
    steps, images = runs[0].num_steps, sum(run.batch_size for run in runs)
    calls = round(point.units * steps * images)
    judges = [runs[k % len(runs)].renoised(program.model, 104_729 * (seed + 1) + k) for k in range(JUDGES)]
    calls += 3 * steps * sum(run.batch_size for run in judges)
    ours, theirs = (decibels_on(program, candidate, judges) for candidate in (point.mask, mask))
    gain = theirs - ours  # errors: smaller is better
    doubt = float(gain.std(correction=1) / len(gain) ** 0.5) if len(gain) > 1 else 0.0
    better = float(gain.mean()) > max(BETTER, doubt)
    error = float((10 ** (ours / 10)).mean().sqrt())
    return (point.mask if better else None), error, calls


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
