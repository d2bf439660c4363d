"""Calls that a pipeline is learned from before anybody calls it: given ones, or a few of its own kind.

calls x numbers of steps --> settings --recorded--> plans --further calls of the denoiser, if asked for--> better plans
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from fxmask.errors import FxmaskError, InputError
from fxmask.sampling.twin import hide_progress, make_twin
from fxmask.settings.key import Setting
from fxmask.settings.known import KEPT_RUNS
from fxmask.settings.session import Session

logger = logging.getLogger(__name__)
RUNS = 4  # recorded of each setting, at least, where further calls of the denoiser are spent on it
# Of everyday things, so that what a plan is made of is unlike none of what people ask for.
PROMPTS = (
    "a photo of a red house on a hill, morning light",
    "a portrait of an old sailor, studio photograph",
    "a bowl of fruit on a wooden table, still life",
    "a crowded street market in the rain, wide angle",
    "a snowy mountain above a lake, landscape",
    "a cat asleep on a green sofa",
    "an abstract pattern of blue and yellow shapes",
    "a steam train crossing a stone bridge, oil painting",
)
GIVEN = ("self", "prompt", "class_labels")  # parameters that a built-in call has a value for


def checked_calls(calls: Any) -> list[dict[str, Any]] | None:
    """``example_calls`` as a list.

    Raises:
        InputError: they are no sequence of dictionaries, or none.
    """
    if calls is None:
        return None
    listed = list(calls) if isinstance(calls, Iterable) and not isinstance(calls, (str, Mapping)) else None
    if not listed or not all(isinstance(call, Mapping) and all(isinstance(k, str) for k in call) for call in listed):
        raise InputError(
            'example_calls must be a list of keyword arguments of the pipeline, e.g. [{"prompt": "a red house"}], got '
            f"{type(calls).__name__}" + ("" if listed is None else f" of {len(listed)}")
        )
    return [dict(call) for call in listed]


def checked_steps(steps: Any) -> list[int | None]:
    """``num_inference_steps`` as a list; one ``None`` if it is not given.

    Raises:
        InputError: something in it is no whole number, or below 1.
    """
    listed = [steps] if steps is None or isinstance(steps, int) else list(steps) if isinstance(steps, Iterable) else []
    wrong = [n for n in listed if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1)]
    if not listed or wrong or isinstance(steps, (str, bool)):
        raise InputError(f"num_inference_steps={steps!r} must be a whole number, or several of them, at least 1 each")
    return list(dict.fromkeys(listed))


def built_in_calls(pipe: Any, denoiser: torch.nn.Module) -> list[dict[str, Any]]:
    """Calls for a pipeline that nobody gave one for: neutral prompts, class labels, or nothing.

    Raises:
        InputError: it needs something else, e.g. an image.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind not in kinds and n not in GIVEN]
    if needed:
        raise InputError(
            f"{type(pipe).__name__} needs {needed}, for which there is nothing built in; pass "
            f"example_calls=[{{{', '.join(f'{n!r}: ...' for n in needed)}}}], calls to learn from"
        )
    if "prompt" in parameters:
        return [{"prompt": prompt} for prompt in PROMPTS[:RUNS]]
    if "class_labels" in parameters:
        count = _count_classes(denoiser)
        return [{"class_labels": [k * count // RUNS]} for k in range(RUNS)]
    return [{}]


def _count_classes(denoiser: torch.nn.Module) -> int:
    config = getattr(denoiser, "config", None)
    found = [getattr(config, name, None) for name in ("num_embeds_ada_norm", "num_class_embeds", "num_classes")]
    return next((n for n in found if isinstance(n, int)), RUNS)


def learn_from_calls(
    pipe: Any,
    session: Session,
    calls: Sequence[Mapping[str, Any]] | None,
    steps: Sequence[int | None],
    effort: str,
    seed: int,
    checkpoint: str | Path | None = None,
) -> None:
    """Record calls of a pipeline at every number of steps, and make the plans of all settings that they are of.

    Args:
        pipe: with the session in it.
        session: its own.
        calls: keyword arguments; built-in ones, if not given.
        steps: numbers of steps; ``None``: as the call says.
        effort: ``"instant"``, ``"quick"`` or ``"default"``.
        seed: of the first call's noise; the others count on.
        checkpoint: a folder that keeps what was measured; the same call goes on from it.

    Raises:
        InputError: the pipeline cannot be called like that, or no setting can be accelerated; says why.
    """
    own = calls if calls is not None else built_in_calls(pipe, session.model.original)
    quiet = make_twin(pipe, None)
    hide_progress(quiet)
    if steps != [None] and "num_inference_steps" not in inspect.signature(pipe.__call__).parameters:
        raise InputError(f"{type(pipe).__name__} takes no num_inference_steps; leave it out")
    planned = [dict(call) if n is None else {"num_inference_steps": n, **call} for n in steps for call in own]
    counts: dict[Setting, list[Mapping[str, Any]]] = {}
    for call in planned:
        counts.setdefault(session.setting_of(quiet, quiet.__call__, (), call), []).append(call)
    jobs = [call for group in counts.values() for call in _repeated(group, effort)]
    for number, call in enumerate(tqdm(jobs, desc="recording", unit="run", disable=not session.progress)):
        _record(quiet, session, call, seed + number, built_in=calls is None)
    reasons = []
    for setting in counts:
        session.plan_all(setting)
        reasons.append(session.improve_setting(setting, effort, checkpoint))
    if all(reason is not None for reason in reasons):
        raise InputError(f"{type(pipe).__name__} cannot be accelerated: {reasons[0]}")


def _repeated(group: Sequence[Mapping[str, Any]], effort: str) -> list[Mapping[str, Any]]:
    """As many calls of one setting as are learned from."""
    count = len(group) if effort == "instant" else max(RUNS, len(group))
    return [group[k % len(group)] for k in range(min(count, KEPT_RUNS))]


def _record(pipe: Any, session: Session, call: Mapping[str, Any], seed: int, built_in: bool) -> None:
    parameters = inspect.signature(pipe.__call__).parameters
    given = dict(call)
    if "generator" in parameters and given.get("generator") is None:
        given["generator"] = torch.Generator().manual_seed(seed)  # of the host: diffusers moves what it draws to any device
    if "output_type" not in given and "output_type" in parameters and _can_skip_decoding(pipe):
        given["output_type"] = "latent"
    try:
        session.record(pipe, pipe.__call__, (), given)
    except FxmaskError:
        raise
    except Exception as error:
        what = "with built-in values" if built_in else f"with the example call {sorted(call)}"
        raise InputError(
            f"{type(pipe).__name__} cannot be called {what}: {type(error).__name__}: {error}; pass example_calls=[{{...}}], "
            "keyword arguments that it can be called with"
        ) from error


def _can_skip_decoding(pipe: Any) -> bool:
    """Whether it hands out latents if asked to: nobody looks at what is decoded."""
    try:
        return '"latent"' in inspect.getsource(inspect.unwrap(type(pipe).__call__))
    except (OSError, TypeError):
        return False
