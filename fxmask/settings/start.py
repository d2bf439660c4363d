"""Putting accelerated denoisers into a pipeline."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fxmask.backends import get_backend
from fxmask.errors import InputError
from fxmask.frontend.modules import module_device, require_eval
from fxmask.learning.effort import Limits
from fxmask.learning.outcome import Outcome
from fxmask.runtime.model import AcceleratedModel
from fxmask.settings.better import check_checkpoint
from fxmask.settings.components import denoisers_of, original_of
from fxmask.settings.example_calls import checked_calls, checked_steps, learn_from_calls
from fxmask.settings.pipeline import install, restore
from fxmask.settings.session import Session
from fxmask.settings.together import joined

logger = logging.getLogger(__name__)
EVERY = 20  # one call of a pipeline in so many is recorded, where plans are made better in the background


def accelerate_pipeline(
    pipe: Any,
    scheduler: Any,
    outcome: Outcome,
    *,
    refused: Mapping[str, bool],
    example_calls: Any,
    num_inference_steps: Any,
    effort: str,
    limits: Limits,
    max_learning_bytes: int | None,
    checkpoint: str | Path | None,
    backend: str,
    mode: str | None,
    component: str | Sequence[str] | None,
    improve: str | None,
    every: int,
    compiling: str | None,
    seed: int,
    progress: bool,
) -> Any:
    """Put accelerated denoisers into a pipeline, with plans if there are calls to learn from."""
    if improve not in (None, "background"):
        raise InputError(f"improve={improve!r} is unknown; pass 'background', or leave it out")
    if isinstance(every, bool) or not isinstance(every, int) or every < 0 or every == 1:
        raise InputError(f"every={every!r} must be 0, or a whole number from 2 on: one call in so many runs in full")
    named = [name for name, given in {**refused, "scheduler": scheduler is not None}.items() if given]
    if named:
        raise InputError(f"{named} is for a model; a pipeline has a scheduler of its own, and its plans are made of its calls")
    check_checkpoint(checkpoint, effort)
    calls, steps = checked_calls(example_calls), checked_steps(num_inference_steps)
    sessions = []
    for name in denoisers_of(pipe, component):
        model = require_eval(original_of(pipe, name))
        get_backend(backend).capturer_for(module_device(model))
        options: dict[str, Any] = {"max_learning_bytes": max_learning_bytes, "improve": improve, "progress": progress}
        options |= {"every": every or (EVERY if improve else 0), "compiling": compiling}
        plain = AcceleratedModel.without_plan(model)
        sessions.append(Session(plain, name, outcome, limits=limits, backend=backend, mode=mode, **options))
    install(pipe, joined(sessions))
    if calls is not None or effort != "instant":
        try:
            learn_from_calls(pipe, sessions[0], calls, steps, effort, seed, checkpoint)
        except KeyboardInterrupt:
            if not any(part.model.has_plan for part in sessions):
                restore(pipe)
                raise
            logger.warning("learning was interrupted; the plans that were made until then are used")
        except BaseException:
            restore(pipe)
            raise
    return pipe
