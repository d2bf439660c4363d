"""Quality beside speed, on runs that a plan was not made from."""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from fxmask.errors import FxmaskError, InputError
from fxmask.frontend.modules import module_device
from fxmask.ir.outputs import first_tensor
from fxmask.metrics import psnr, relative_error
from fxmask.runtime.model import AcceleratedModel
from fxmask.runtime.quality import MEASURED, Quality, digest_of_mask
from fxmask.sampling.sampler import Sampler
from fxmask.sampling.twin import hide_progress, make_twin
from fxmask.settings.key import SCHEDULES
from fxmask.settings.pipeline import is_a_pipeline, session_of
from fxmask.storage.about import plan_facts
from fxmask.timing import timed

MOST_DECIBELS = 300.0  # of images that are equal
STEPS = "num_inference_steps"


def measure(model: Any, runs: Sequence[Any], *, fewer_steps: bool = True) -> Quality:
    """Compare images made with a plan with those made in full, from the same noise; ``report`` and ``save`` know of it then.

    Args:
        model: an accelerated model, or an accelerated pipeline; of one with several denoisers, all of them know of it.
        runs: of a model, recorded runs that its plan was not made from, ``fxmask.record(model, scheduler, seed=1000)``; of a
            pipeline, calls by name, each with a ``generator`` of its own, at a setting that has a plan.
        fewer_steps: also compare with fewer steps that cost the same, where noise is not injected.

    Returns:
        Numbers. PSNR is of images in [-1, 1] for a model's runs, and of what a pipeline returns in [0, 1].

    Raises:
        InputError: there are no runs, or they are something else.
    """
    if not isinstance(runs, Sequence) or not runs:
        raise InputError("measuring needs one run at least: recorded runs for a model, calls by name for a pipeline")
    quality = _of_pipeline(model, runs, fewer_steps) if is_a_pipeline(model) else _of_model(model, runs, fewer_steps)
    for accelerated in _planned_in(model) if is_a_pipeline(model) else [model]:
        own = replace(quality, mask=digest_of_mask(accelerated.plan.source))
        accelerated.note(**{MEASURED: own.to_dict()})
    return quality


def _planned_in(pipe: Any) -> list[AcceleratedModel]:
    """The denoisers of a pipeline that have a plan at the setting that was used last."""
    latest = [(part.model, next(reversed(part.settings.values()), None)) for part in session_of(pipe).parts]
    return [model for model, known in latest if known is not None and known.variants is not None and known.refused is None]


def step_errors(accelerated: AcceleratedModel, run: Sampler) -> dict[str, list[float]]:
    """Relative L2 errors at every step of a run, of the samples that the denoiser is given and of its predictions.

    Args:
        accelerated: with a plan for the run's steps.
        run: recorded.

    Returns:
        T numbers each; of several lanes the mean.
    """
    order = iter(run.order)
    samples: list[list[float]] = [[] for _ in range(run.num_steps)]
    predictions: list[list[float]] = [[] for _ in range(run.num_steps)]

    def denoise(**call: Any) -> torch.Tensor:
        step, lane = next(order)
        with torch.no_grad():
            prediction = first_tensor(accelerated(**call)).clone()
        samples[step].append(relative_error(call[run.sample], run.calls[step][lane][run.sample]))
        predictions[step].append(relative_error(prediction, run.outputs[step][lane]))
        return prediction

    with accelerated.generation():
        run.rollout(denoise)
    means = ([statistics.fmean(values) for values in found if values] for found in (samples, predictions))
    return dict(zip(("sample", "prediction"), means, strict=True))


def _of_model(accelerated: Any, runs: Sequence[Any], fewer_steps: bool) -> Quality:
    if not getattr(type(accelerated), "is_accelerated", False):
        raise InputError(f"this {type(accelerated).__name__} is not accelerated; call fxmask.accelerate() first")
    wrong = next((run for run in runs if not isinstance(run, Sampler)), None)
    if wrong is not None:
        raise InputError(f"measuring a model needs recorded runs, got {type(wrong).__name__}; make them with fxmask.record")
    original = accelerated.original
    runs[0].rollout(accelerated)  # compiles
    fast, full = _in_turns(lambda run: run.rollout(accelerated), lambda run: run.rollout(original), runs)
    steps = max(1, round(runs[0].num_steps / accelerated.plan.mac_ratio))
    fewer = None
    if fewer_steps and not runs[0].stochastic:
        fewer = _unless_refused(lambda: [run.with_steps(original, steps).final for run in runs])
    references = [run.final for run in runs]
    return _quality(accelerated, [x for _, x in fast], references, fewer, steps, 2.0, (fast, full))


def _of_pipeline(pipe: Any, calls: Sequence[Any], fewer_steps: bool) -> Quality:
    wrong = next((call for call in calls if not isinstance(call, Mapping)), None)
    if wrong is not None:
        raise InputError(f"measuring a pipeline needs calls by name, got {type(wrong).__name__}; e.g. {{'prompt': 'a cat'}}")
    session_of(pipe)  # says what is wrong
    plain = make_twin(pipe, None)
    hide_progress(plain)
    made(pipe, calls[0])  # plans and compiles
    planned = _planned_in(pipe)
    if not planned:
        raise InputError("no denoiser of this pipeline has a plan at this setting; call it twice, or see its warnings")
    fast, full = _in_turns(lambda call: made(pipe, call), lambda call: made(plain, call), calls)
    steps = _steps_of(pipe, calls[0])
    fewer = None
    if fewer_steps and steps is not None:
        steps = max(1, round(steps / _ratio(planned)))
        fewer = _unless_refused(lambda: [made(plain, {**call, STEPS: steps}) for call in calls])
    return _quality(planned[0], [x for _, x in fast], [x for _, x in full], fewer, steps, 1.0, (fast, full))


def _ratio(planned: Sequence[AcceleratedModel]) -> float:
    """MACs of whole runs in full, over those with plans, of all denoisers together."""
    facts = [plan_facts(model.plan, model.program.batch_size) for model in planned]
    return float(sum(x["full_macs"] for x in facts) / max(1, sum(x["macs"] for x in facts)))


def _steps_of(pipe: Any, call: Mapping[str, Any]) -> int | None:
    """How many steps a call says that it has; ``None`` where it says so by a schedule of its own, or not at all."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get(STEPS)
    steps = call.get(STEPS, None if parameter is None else parameter.default)
    given = [name for name in SCHEDULES if call.get(name) is not None]
    return steps if isinstance(steps, int) and not given else None


def made(pipe: Any, call: Mapping[str, Any]) -> torch.Tensor:
    """What a pipeline makes of a call, float ``[N, ...]``; images are in [0, 1]. A generator is taken as it was given."""
    given = {name: _again(value) for name, value in call.items()}
    if "output_type" in inspect.signature(type(pipe).__call__).parameters:
        given.setdefault("output_type", "np")
    result = pipe(**given)
    first = result[0] if isinstance(result, tuple) else next(iter(result.values()))
    return torch.as_tensor(first).detach().float().cpu()


def _again(value: Any) -> Any:
    """A generator in the state in which it was given, however often the call is made."""
    if isinstance(value, torch.Generator):
        return torch.Generator(value.device).manual_seed(value.initial_seed())
    return [_again(x) for x in value] if isinstance(value, list) else value


Timed = list[tuple[float, torch.Tensor]]


def _in_turns(fast: Callable[[Any], Any], full: Callable[[Any], Any], items: Sequence[Any]) -> tuple[Timed, Timed]:
    """Seconds and results of both, turn by turn, so that a noisy machine slows both alike."""
    pairs = []
    with torch.no_grad():
        for item in items:
            pairs.append((timed(fast, item), timed(full, item)))
    return [a for a, _ in pairs], [b for _, b in pairs]


def _unless_refused(make: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor] | None:
    """What cannot be made with another number of steps is not compared."""
    try:
        with torch.no_grad():
            return make()
    except (FxmaskError, AttributeError, TypeError, ValueError):
        return None


def _quality(
    accelerated: AcceleratedModel,
    samples: Sequence[torch.Tensor],
    references: Sequence[torch.Tensor],
    fewer: Sequence[torch.Tensor] | None,
    steps: int | None,
    data_range: float,
    seconds: tuple[Timed, Timed],
) -> Quality:
    found, all_samples, all_references = (
        _decibels(samples, references, data_range),
        torch.cat(list(samples)),
        torch.cat(list(references)),
    )
    other = None if fewer is None or fewer[0].shape != references[0].shape else _decibels(fewer, references, data_range)
    fast, full = (statistics.median(x for x, _ in times) for times in seconds)
    device = module_device(accelerated.original)
    return Quality(
        mask=digest_of_mask(accelerated.plan.source),
        images=len(found),
        psnr=float(found.mean()),
        psnr_low=float(found.quantile(0.1)),
        error=relative_error(all_samples, all_references),
        fewer_steps=None if other is None else steps,
        fewer_psnr=None if other is None else float(other.mean()),
        fewer_psnr_low=None if other is None else float(other.quantile(0.1)),
        seconds=fast,
        full_seconds=full,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    )


def _decibels(samples: Sequence[torch.Tensor], references: Sequence[torch.Tensor], data_range: float) -> torch.Tensor:
    pairs = zip(samples, references, strict=True)
    return torch.cat([psnr(a, b, data_range).cpu() for a, b in pairs]).clamp_max(MOST_DECIBELS)
