"""Recorded denoiser calls of some sampling runs, and their replay with any other denoiser.

A trajectory comes from the scheduler alone (Gaussian noise in, no data set) and keeps every random number that the
sampler drew, so that teacher and student see the same noise with deterministic and stochastic samplers alike.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fxmask.calls import Signature, first_tensor
from fxmask.errors import InputError, SchedulerError
from fxmask.inputs import ExampleInputs, example_call, module_device, module_dtype, resolve_conditioning

Call = Mapping[str, Any]
Denoiser = Callable[..., Any]
Loop = Generator[dict[str, Any], torch.Tensor, torch.Tensor]

_DRAWS = (
    torch.randn,
    torch.randn_like,
    torch.rand,
    torch.rand_like,
    torch.normal,
    torch.randint,
    torch.Tensor.normal_,
    torch.Tensor.uniform_,
)


class NoiseTape(TorchFunctionMode):
    """Records every random tensor that is drawn inside it, or plays a recording back."""

    def __init__(self, recorded: Sequence[torch.Tensor] | None = None) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []
        self._playback = None if recorded is None else iter(recorded)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _DRAWS:
            return func(*args, **(kwargs or {}))
        drawn = func(*args, **(kwargs or {})) if self._playback is None else None
        if drawn is not None:
            self.tensors.append(drawn.detach().clone())
            return drawn
        assert self._playback is not None
        noise = next(self._playback, None)
        if noise is None:
            raise SchedulerError("the sampler drew more noise than was recorded; it must be called as it was recorded")
        if func in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return args[0].copy_(noise)
        return noise.clone()


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The T denoiser calls of one batch of sampling runs.

    Attributes:
        calls: per step and lane the call's arguments by parameter name; the noisy sample is ``[B, ...]``.
        outputs: per step and lane the model's prediction, ``[B, ...]``.
        timesteps: the T timestep values as the denoiser receives them.
        initial_noise: the sample before the first step, ``[B, ...]``.
        noises: per step, every random tensor that the sampler drew.
        final: the samples after the last step, ``[B, ...]``.
        scheduler: a copy of the scheduler, set up and not yet stepped.
        step_kwargs: arguments passed on to ``scheduler.step``.
        sample: name of the denoiser's sample argument.
    """

    calls: tuple[tuple[Call, ...], ...]
    outputs: tuple[tuple[torch.Tensor, ...], ...]
    timesteps: tuple[float, ...]
    initial_noise: torch.Tensor
    noises: tuple[tuple[torch.Tensor, ...], ...]
    final: torch.Tensor
    scheduler: Any = field(repr=False)
    step_kwargs: Mapping[str, Any]
    sample: str

    @property
    def num_steps(self) -> int:
        """T, the number of denoiser calls (per lane)."""
        return len(self.calls)

    @property
    def order(self) -> tuple[tuple[int, int], ...]:
        """(step, lane) of every denoiser call, in order."""
        return tuple((i, lane) for i, step in enumerate(self.calls) for lane in range(len(step)))

    @property
    def stochastic(self) -> bool:
        """Whether the sampler injects noise."""
        return any(self.noises)

    @property
    def batch_size(self) -> int:
        """B."""
        return int(self.initial_noise.shape[0])

    def loop(self) -> Loop:
        """The sampler as a generator: yields the denoiser's calls, in order, and is sent the prediction of each.

        The same noise as in the recording. Its return value is the final samples, ``[B, ...]``.
        """
        scheduler = copy.deepcopy(self.scheduler)
        x = self.initial_noise.clone()
        for i, timestep in enumerate(scheduler.timesteps):
            (call,) = self.calls[i]
            output = yield {**call, self.sample: _scale(scheduler, x, timestep)}
            with torch.no_grad(), NoiseTape(self.noises[i]):
                x = _step(scheduler, _prediction(output, x, scheduler), timestep, x, self.step_kwargs)
        return x

    @property
    def can_change_steps(self) -> bool:
        """Whether ``with_steps`` works: the scheduler can be set to another number of steps."""
        return callable(getattr(self.scheduler, "set_timesteps", None))

    @torch.no_grad()
    def with_steps(self, model: torch.nn.Module, num_inference_steps: int) -> Trajectory:
        """The same start and conditioning, sampled with another number of the scheduler's own steps.

        Injected noise, where there is any, is not the same.
        """
        signature = Signature.of(model)
        scheduler = prepare_scheduler(self.scheduler, num_inference_steps, self.initial_noise.device)
        sigmas = [float(getattr(s, "init_noise_sigma", 1.0)) for s in (self.scheduler, scheduler)]
        noise = self.initial_noise / sigmas[0]
        return _sample(model, scheduler, self.calls[0][0], signature, noise, self.step_kwargs, torch.Generator().manual_seed(0))

    @torch.no_grad()
    def renoised(self, model: torch.nn.Module, seed: int) -> Trajectory:
        """The same conditioning, recorded with other noise."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(self.initial_noise.shape, generator=generator).to(self.initial_noise)
        scheduler, signature = copy.deepcopy(self.scheduler), Signature.of(model)
        return _sample(model, scheduler, self.calls[0][0], signature, noise, self.step_kwargs, generator)

    @torch.no_grad()
    def rollout(self, denoiser: Denoiser) -> torch.Tensor:
        """Replay the sampler with another denoiser and the same noise.

        Args:
            denoiser: called like the model. An ``AcceleratedModel`` runs inside a generation of its own.

        Returns:
            The final samples, ``[B, ...]``.
        """
        generation = getattr(denoiser, "generation", contextlib.nullcontext)
        loop = self.loop()
        try:
            with generation():
                call = next(loop)
                while True:
                    call = loop.send(first_tensor(denoiser(**call)))
        except StopIteration as end:
            final: torch.Tensor = end.value
            return final
        finally:
            loop.close()


@torch.no_grad()
def record(
    model: torch.nn.Module,
    scheduler: Any,
    num_inference_steps: int = 50,
    batch_size: int = 8,
    example_inputs: ExampleInputs = None,
    step_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Trajectory:
    """Sample a batch with the unaccelerated model and keep every call.

    Args:
        model: the denoiser, called as ``model(**{sample: x, timestep: t, **conditioning})``.
        scheduler: a diffusers scheduler, or anything with ``set_timesteps``, ``timesteps`` and ``step``. Not changed.
        num_inference_steps: passed to ``scheduler.set_timesteps``.
        batch_size: B; ignored where ``example_inputs`` has the sample.
        example_inputs: conditioning that cannot be inferred, a dict or a function (batch_size, generator) -> dict.
        step_kwargs: passed on to ``scheduler.step``, e.g. ``{"eta": 1.0}``.
        seed: of the initial and the injected noise.

    Raises:
        SchedulerError: the scheduler has no timesteps or no ``step``.
        InputError: arguments are missing; says which.
    """
    device, dtype = module_device(model), module_dtype(model)
    generator = torch.Generator().manual_seed(seed)
    scheduler = prepare_scheduler(scheduler, num_inference_steps, device)
    conditioning = resolve_conditioning(example_inputs, batch_size, generator)
    template = example_call(model, _as_timestep(scheduler.timesteps[0], device), conditioning, batch_size, dtype)
    signature = Signature.of(model)
    noise = torch.randn(template[signature.sample].shape, generator=generator).to(device, dtype)
    return _sample(model, scheduler, template, signature, noise, dict(step_kwargs or {}), generator)


def _sample(
    model: torch.nn.Module,
    scheduler: Any,
    template: Call,
    signature: Signature,
    noise: torch.Tensor,
    step_kwargs: Mapping[str, Any],
    generator: torch.Generator,
    tapes: Sequence[Sequence[torch.Tensor]] | None = None,
) -> Trajectory:
    """Sample from ``noise``, drawing from ``generator`` or playing ``tapes`` back, and keep every call."""
    x = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    start = copy.deepcopy(scheduler)
    initial = x.clone()
    options = dict(step_kwargs)
    if "generator" in inspect.signature(scheduler.step).parameters and "generator" not in options:
        options["generator"] = generator
    calls, outputs, noises, values = [], [], [], []
    for i, timestep in enumerate(scheduler.timesteps):
        call = dict(template)
        call[signature.sample] = _scale(scheduler, x, timestep)
        if signature.timestep is not None:
            form = torch.as_tensor(template[signature.timestep])
            call[signature.timestep] = _as_timestep(timestep, x.device).expand(form.shape)
        prediction = first_tensor(model(**call))
        with NoiseTape(tapes[i] if tapes is not None else None) as tape:
            x = _step(scheduler, _prediction(prediction, x, scheduler), timestep, x, options)
        calls.append((call,))
        outputs.append((prediction,))
        noises.append(tuple(tape.tensors))
        values.append(float(timestep))
    return Trajectory(
        calls=tuple(calls),
        outputs=tuple(outputs),
        timesteps=tuple(values),
        initial_noise=initial,
        noises=tuple(noises),
        final=x,
        scheduler=start,
        step_kwargs=dict(step_kwargs),
        sample=signature.sample,
    )


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


def _as_timestep(timestep: Any, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(timestep).to(device).reshape(())


def _scale(scheduler: Any, x: torch.Tensor, timestep: Any) -> torch.Tensor:
    scale = getattr(scheduler, "scale_model_input", None)
    return scale(x, timestep) if callable(scale) else x


def _prediction(prediction: torch.Tensor, x: torch.Tensor, scheduler: Any) -> torch.Tensor:
    """The part of the prediction that the sampler takes: models that also predict a variance double the channels."""
    learned = "learned" in str(getattr(getattr(scheduler, "config", None), "variance_type", ""))
    if not learned and x.dim() > 1 and prediction.dim() == x.dim() and prediction.shape[1] == 2 * x.shape[1]:
        return prediction.chunk(2, dim=1)[0]
    return prediction


def _step(scheduler: Any, prediction: torch.Tensor, timestep: Any, x: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
    try:
        result = scheduler.step(prediction, timestep, x, **options)
    except TypeError as error:
        raise InputError(f"{type(scheduler).__name__}.step does not take {sorted(options)}: {error}") from error
    return first_tensor(result)
