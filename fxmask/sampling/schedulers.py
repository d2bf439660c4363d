"""What sampling needs of a scheduler, whatever its class."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fxmask.errors import FxmaskError, InputError, SchedulerError
from fxmask.ir.calls import describe_tensor
from fxmask.ir.outputs import first_tensor


def prepare_scheduler(
    scheduler: Any, num_inference_steps: int, device: torch.device | None = None, options: Mapping[str, Any] | None = None
) -> Any:
    """A copy of the scheduler with its timesteps set.

    Args:
        scheduler: with ``step`` and ``timesteps``.
        num_inference_steps: of ``set_timesteps``, where it has that.
        device: where the timesteps go, if ``set_timesteps`` takes one.
        options: further arguments of ``set_timesteps``, e.g. ``{"mu": 1.15}``.

    Raises:
        SchedulerError: it has no ``step``, ``set_timesteps`` fails, or there are no timesteps after it.
        InputError: ``set_timesteps`` does not take the options.
    """
    require_scheduler(scheduler)
    scheduler = copy.deepcopy(scheduler)
    if callable(getattr(scheduler, "set_timesteps", None)):
        _set_timesteps(scheduler, num_inference_steps, device, dict(options or {}))
    elif options:
        raise InputError(f"{type(scheduler).__name__} has no set_timesteps, which scheduler_kwargs are for; leave them out")
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or len(timesteps) == 0:
        raise SchedulerError(
            f"{type(scheduler).__name__} has no timesteps after set_timesteps({num_inference_steps}); fxmask needs to "
            "know the sampling steps: give it `timesteps`, one value per denoiser call"
        )
    if hasattr(scheduler, "undo_step") and any(a < b for a, b in itertools.pairwise(map(float, timesteps))):
        raise SchedulerError(
            f"{type(scheduler).__name__} goes back in time between steps, by undo_step; record the pipeline that does so, by "
            "fxmask.record_pipeline(pipe, ...), or switch that off (scheduler_kwargs={'jump_n_sample': 1})"
        )
    return scheduler


def require_scheduler(scheduler: Any) -> None:
    """Refuse what cannot step.

    Raises:
        SchedulerError: says what to pass.
    """
    if callable(getattr(scheduler, "step", None)):
        return
    holds = callable(getattr(getattr(scheduler, "scheduler", None), "step", None))
    raise SchedulerError(
        f"{'no scheduler was given' if scheduler is None else f'{type(scheduler).__name__} has no step() method'}; pass "
        + ("its scheduler, pipe.scheduler" if holds else "a diffusers scheduler, or an object with ")
        + ("" if holds else "set_timesteps(n), timesteps and step(model_output, timestep, sample)")
    )


def _set_timesteps(scheduler: Any, num_inference_steps: int, device: torch.device | None, options: dict[str, Any]) -> None:
    name, set_timesteps = type(scheduler).__name__, scheduler.set_timesteps
    takes = inspect.signature(set_timesteps).parameters
    arguments = {**({"device": device} if "device" in takes and device else {}), **options}
    # What is given says how many there are; most schedulers refuse a number beside it.
    counted = options.keys() & {"sigmas", "timesteps"} and takes.get("num_inference_steps", inspect.Parameter).default is None
    given = () if counted else (num_inference_steps,)
    _require_fit(set_timesteps, given, arguments, f"{name}.set_timesteps", "scheduler_kwargs")
    try:
        set_timesteps(*given, **arguments)
    except Exception as error:  # schedulers check what they are given in many ways
        call = ", ".join([*map(str, given), *(f"{key}=..." for key in options)])
        reason = str(error).rstrip(".") or type(error).__name__
        others = [key for key in takes if key not in ("num_inference_steps", "device")]
        named = next((key for key in others if key in reason), others[0] if others else "")
        raise SchedulerError(
            f"{name}.set_timesteps({call}) fails: {reason}. Take another number of steps"
            + (f", or pass what it needs besides ({others}) as scheduler_kwargs={{{named!r}: ...}}" if others else "")
        ) from error


def _require_fit(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str, source: str
) -> None:
    """Refuse arguments that a function of the scheduler does not take, and miss those that it needs.

    Raises:
        InputError: names them; ``source`` is the argument of ours that they are passed with.
    """
    parameters = inspect.signature(function)
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.parameters.values())
    unknown = [key for key in kwargs if key not in parameters.parameters and not anything]
    if unknown:
        raise InputError(f"{name} does not take {sorted(unknown)}, it takes {list(parameters.parameters)}; change {source}")
    known = parameters.bind_partial(*args, **kwargs).arguments
    missing = [
        key
        for key, p in parameters.parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and key not in known
    ]
    if missing:
        given = ", ".join(f"{key!r}: ..." for key in missing)
        raise InputError(
            f"{name} needs {missing}, which only you can give; pass {source}={{{given}}}, or record the pipeline that does so, "
            "with fxmask.record_pipeline(pipe, ...)"
        )


def timestep_tensor(timestep: Any, device: torch.device) -> torch.Tensor:
    """A timestep as a tensor without dimensions."""
    return torch.as_tensor(timestep).to(device).reshape(())


def scale_input(scheduler: Any, x: torch.Tensor, timestep: Any) -> torch.Tensor:
    """The sample as the denoiser is given it."""
    scale = getattr(scheduler, "scale_model_input", None)
    return scale(x, timestep) if callable(scale) else x


def sampler_prediction(prediction: torch.Tensor, x: torch.Tensor, scheduler: Any) -> torch.Tensor:
    """The part of the prediction that the sampler takes: models that also predict a variance double the channels."""
    learned = "learned" in str(getattr(getattr(scheduler, "config", None), "variance_type", ""))
    if not learned and x.dim() > 1 and prediction.dim() == x.dim() and prediction.shape[1] == 2 * x.shape[1]:
        return prediction.chunk(2, dim=1)[0]
    return prediction


def step_scheduler(
    scheduler: Any, prediction: torch.Tensor, timestep: Any, x: torch.Tensor, options: Mapping[str, Any]
) -> torch.Tensor:
    """The next sample.

    Raises:
        InputError: the scheduler does not take these options, or needs others.
        SchedulerError: its ``step`` fails.
    """
    name = type(scheduler).__name__
    _require_fit(scheduler.step, (prediction, timestep, x), options, f"{name}.step", "step_kwargs")
    try:
        result = scheduler.step(prediction, timestep, x, **options)
    except FxmaskError:
        raise
    except Exception as error:  # of a sampler of any kind
        raise SchedulerError(
            f"{name}.step fails at timestep {float(timestep):g}, for the sample {describe_tensor(x)} and the prediction "
            f"{describe_tensor(prediction)}: {error}. What it needs besides is passed with step_kwargs; a sampling loop of "
            "another kind is recorded with fxmask.record_pipeline(pipe, ...)"
        ) from error
    following = first_tensor(result)
    if following.shape != x.shape or following.is_floating_point() != x.is_floating_point():
        raise SchedulerError(
            f"{name}.step made {describe_tensor(following)} of a sample that was {describe_tensor(x)}, and fxmask.record runs "
            "samplers that keep shape and type. Record another loop with fxmask.record_pipeline(pipe, ...)"
        )
    return following
