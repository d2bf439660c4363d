"""What sampling needs of a scheduler, whatever its class."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from fxmask.errors import InputError, SchedulerError
from fxmask.ir.outputs import first_tensor


def prepare_scheduler(scheduler: Any, num_inference_steps: int, device: torch.device | None = None) -> Any:
    """A copy of the scheduler with its timesteps set.

    Raises:
        SchedulerError: it has no ``step``, or no timesteps after ``set_timesteps``.
    """
    if not callable(getattr(scheduler, "step", None)):
        raise SchedulerError(
            f"{type(scheduler).__name__} has no step() method; pass a diffusers scheduler, or an object with "
            "set_timesteps(n), timesteps and step(model_output, timestep, sample)"
        )
    scheduler = copy.deepcopy(scheduler)
    if callable(getattr(scheduler, "set_timesteps", None)):
        takes_device = "device" in inspect.signature(scheduler.set_timesteps).parameters
        scheduler.set_timesteps(num_inference_steps, **({"device": device} if takes_device and device else {}))
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or len(timesteps) == 0:
        raise SchedulerError(
            f"{type(scheduler).__name__} has no timesteps after set_timesteps({num_inference_steps}); fxmask needs to "
            "know the sampling steps: give it `timesteps`, one value per denoiser call"
        )
    return scheduler


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
        InputError: the scheduler does not take these options.
    """
    try:
        result = scheduler.step(prediction, timestep, x, **options)
    except TypeError as error:
        raise InputError(f"{type(scheduler).__name__}.step does not take {sorted(options)}: {error}") from error
    return first_tensor(result)
