"""Recorded denoiser calls of some sampling runs, and their replay with any other denoiser.

A trajectory comes from the scheduler alone (Gaussian noise in, no data set) and keeps every random number that the
sampler drew, so that teacher and student see the same noise with deterministic and stochastic samplers alike.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fxmask._torch import pytree
from fxmask.errors import InputError
from fxmask.frontend.examples import ExampleInputs, example_call, resolve_conditioning
from fxmask.frontend.modules import module_device, module_dtype, require_denoiser
from fxmask.ir.calls import Signature
from fxmask.ir.outputs import first_tensor
from fxmask.sampling.finite import refuse_not_finite
from fxmask.sampling.noise import NoiseTape
from fxmask.sampling.recording import Recording
from fxmask.sampling.sampler import Call, Loop
from fxmask.sampling.schedulers import prepare_scheduler, sampler_prediction, scale_input, step_scheduler, timestep_tensor


@dataclass(frozen=True, eq=False, repr=False)
class Trajectory(Recording):
    """Sampling runs recorded from a scheduler alone.

    Attributes:
        scheduler: a copy of the scheduler, set up and not yet stepped.
        step_kwargs: arguments passed on to ``scheduler.step``.
        scheduler_kwargs: arguments that were passed on to ``scheduler.set_timesteps``.
        guidance_scale: of classifier-free guidance: every call holds the batch twice, without and with the conditioning, and
            the sampler is given ``without + scale * (with - without)`` (Ho and Salimans, arXiv 2207.12598). ``None``: none.
    """

    scheduler: Any
    step_kwargs: Mapping[str, Any]
    scheduler_kwargs: Mapping[str, Any] = field(default_factory=dict)
    guidance_scale: float | None = None

    def loop(self) -> Loop:
        """The sampler as a generator: yields the denoiser's calls, in order, and is sent the prediction of each.

        The same noise as in the recording. Its return value is the final samples, ``[B, ...]``.
        """
        scheduler = copy.deepcopy(self.scheduler)
        x = self.initial_noise.clone()
        for i, timestep in enumerate(scheduler.timesteps):
            (call,) = self.calls[i]
            output = yield {**call, self.sample: twice(scale_input(scheduler, x, timestep), self.guidance_scale)}
            with torch.no_grad(), NoiseTape(self.noises[i]):
                output = guided(output, self.guidance_scale)
                x = step_scheduler(scheduler, sampler_prediction(output, x, scheduler), timestep, x, self.step_kwargs)
        return x

    def fresh_loop(self, seed: int) -> Loop:
        """The sampler as a generator, with the same conditioning and noise drawn from ``seed``; nothing is kept of the run."""
        scheduler, generator = copy.deepcopy(self.scheduler), torch.Generator().manual_seed(seed)
        scale = float(getattr(scheduler, "init_noise_sigma", 1.0))
        x = scale * torch.randn(self.initial_noise.shape, generator=generator).to(self.initial_noise)
        options = _with_generator(scheduler, self.step_kwargs, generator)
        for i, timestep in enumerate(scheduler.timesteps):
            (call,) = self.calls[i]
            output = yield {**call, self.sample: scale_input(scheduler, x, timestep)}
            with torch.no_grad():
                x = step_scheduler(scheduler, sampler_prediction(output, x, scheduler), timestep, x, options)
        return x

    @property
    def can_change_steps(self) -> bool:
        """Whether ``with_steps`` works: the scheduler can be set to another number of steps."""
        fixed = self.scheduler_kwargs.keys() & {"sigmas", "timesteps"}
        return callable(getattr(self.scheduler, "set_timesteps", None)) and not fixed

    @torch.no_grad()
    def with_steps(self, model: torch.nn.Module, num_inference_steps: int) -> Trajectory:
        """The same start and conditioning, sampled with another number of the scheduler's own steps.

        Injected noise, where there is any, is not the same.
        """
        signature = Signature.of(model)
        scheduler = prepare_scheduler(self.scheduler, num_inference_steps, self.initial_noise.device, self.scheduler_kwargs)
        sigmas = [float(getattr(s, "init_noise_sigma", 1.0)) for s in (self.scheduler, scheduler)]
        noise = self.initial_noise / sigmas[0]
        start = torch.Generator().manual_seed(0)
        given = self.step_kwargs, start, None, self.guidance_scale
        sampled = _sample(model, scheduler, self.calls[0][0], signature, noise, *given)
        return replace(sampled, scheduler_kwargs=self.scheduler_kwargs)

    @torch.no_grad()
    def in_type(self, model: torch.nn.Module, dtype: torch.dtype) -> Trajectory:
        """The same start, conditioning and noise, recorded with a model in a type of more precision.

        Args:
            model: the denoiser in that type.
            dtype: the type; tensors that have more precision keep it.
        """

        def wide(x: torch.Tensor) -> torch.Tensor:
            return x.to(torch.promote_types(x.dtype, dtype)) if x.is_floating_point() else x

        call, tapes = pytree.tree_map_only(torch.Tensor, wide, (dict(self.calls[0][0]), self.noises))
        start = wide(self.initial_noise) / float(getattr(self.scheduler, "init_noise_sigma", 1.0))
        scheduler, signature = copy.deepcopy(self.scheduler), Signature.of(model)
        given = self.step_kwargs, torch.Generator(), tapes, self.guidance_scale
        sampled = _sample(model, scheduler, call, signature, start, *given)
        return replace(sampled, scheduler_kwargs=self.scheduler_kwargs)

    def rows(self, first: int, end: int) -> Trajectory | None:
        """Some of the samples of the batch, as runs of their own; ``None`` if the sampler is not one for each sample alone.

        Whether the denoiser is, only the denoiser can tell.
        """
        if self.guidance_scale is not None:
            return None  # calls hold every sample twice
        count = self.batch_size

        def part(x: torch.Tensor) -> torch.Tensor:
            return x[first:end] if x.dim() and len(x) == count else x

        names = ("calls", "outputs", "initial_noise", "noises", "final")
        parts = pytree.tree_map_only(torch.Tensor, part, {name: getattr(self, name) for name in names})
        piece = replace(self, **parts)
        outputs = iter([output for step in piece.outputs for output in step])
        with torch.no_grad():
            again = piece.rollout(lambda **_call: next(outputs))
        return piece if torch.allclose(again, piece.final, rtol=1e-4, atol=1e-5) else None

    @torch.no_grad()
    def renoised(self, model: torch.nn.Module, seed: int) -> Trajectory:
        """The same conditioning, recorded with other noise."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(self.initial_noise.shape, generator=generator).to(self.initial_noise)
        scheduler, signature = copy.deepcopy(self.scheduler), Signature.of(model)
        given = self.step_kwargs, generator, None, self.guidance_scale
        sampled = _sample(model, scheduler, self.calls[0][0], signature, noise, *given)
        return replace(sampled, scheduler_kwargs=self.scheduler_kwargs)


@torch.no_grad()
def record(
    model: torch.nn.Module,
    scheduler: Any = None,
    *,
    num_inference_steps: int = 50,
    batch_size: int = 8,
    example_inputs: ExampleInputs = None,
    step_kwargs: Mapping[str, Any] | None = None,
    scheduler_kwargs: Mapping[str, Any] | None = None,
    guidance_scale: float | None = None,
    unconditional: ExampleInputs = None,
    seed: int = 0,
) -> Trajectory:
    """Sample a batch with the unaccelerated model and keep every call.

    Args:
        model: the denoiser, called as ``model(**{sample: x, timestep: t, **conditioning})``.
        scheduler: a diffusers scheduler, or anything with ``set_timesteps``, ``timesteps`` and ``step``. Needed, and not
            changed.
        num_inference_steps: passed to ``scheduler.set_timesteps``.
        batch_size: B; ignored where ``example_inputs`` has the sample.
        example_inputs: conditioning that cannot be inferred, a dict or a function (batch_size, generator) -> dict.
        step_kwargs: passed on to ``scheduler.step``, e.g. ``{"eta": 1.0}``.
        scheduler_kwargs: passed on to ``scheduler.set_timesteps``, e.g. ``{"mu": 1.15}`` where images' sizes shift timesteps.
        guidance_scale: of classifier-free guidance; every call then holds the batch twice, first without the conditioning.
        unconditional: with guidance, the arguments that say "no conditioning", by name, e.g. the empty prompt's embedding; a
            dict or a function like ``example_inputs``. What it does not name is the same in both halves.
        seed: of the initial and the injected noise.

    Raises:
        SchedulerError: the scheduler has no timesteps or no ``step``, or one of its methods fails.
        InputError: arguments are missing, or the model's predictions are not finite; says which, and where.
    """
    model = require_denoiser(model)
    device, dtype = module_device(model), module_dtype(model)
    generator = torch.Generator().manual_seed(seed)
    scheduler = prepare_scheduler(scheduler, num_inference_steps, device, scheduler_kwargs)
    conditioning = resolve_conditioning(example_inputs, batch_size, generator)
    rows = batch_size
    if guidance_scale is not None:
        conditioning = _both(conditioning, resolve_conditioning(unconditional, batch_size, generator))
        rows = 2 * batch_size
    elif unconditional is not None:
        raise InputError("unconditional= is for guidance; pass guidance_scale= too")
    template = example_call(model, timestep_tensor(scheduler.timesteps[0], device), conditioning, rows, dtype)
    signature = Signature.of(model)
    sample = template[signature.sample]
    if not isinstance(sample, torch.Tensor):
        raise InputError(
            f"the sample ({signature.sample!r}) of {type(model).__name__} is a {type(sample).__name__}, and a scheduler alone "
            "samples one tensor; call the denoiser in a loop of your own, with a mask that needs no learning"
        )
    shape = sample.shape if guidance_scale is None else (sample.shape[0] // 2, *sample.shape[1:])
    noise = torch.randn(shape, generator=generator).to(device, dtype)
    given = dict(step_kwargs or {}), generator, None, guidance_scale
    sampled = _sample(model, scheduler, template, signature, noise, *given)
    return replace(sampled, scheduler_kwargs=dict(scheduler_kwargs or {}))


def _sample(
    model: torch.nn.Module,
    scheduler: Any,
    template: Call,
    signature: Signature,
    noise: torch.Tensor,
    step_kwargs: Mapping[str, Any],
    generator: torch.Generator,
    tapes: Sequence[Sequence[torch.Tensor]] | None = None,
    guidance_scale: float | None = None,
) -> Trajectory:
    """Sample from ``noise``, drawing from ``generator`` or playing ``tapes`` back, and keep every call."""
    x = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    start = copy.deepcopy(scheduler)
    initial = x.clone()
    options = _with_generator(scheduler, step_kwargs, generator)
    calls, outputs, noises, values = [], [], [], []
    for i, timestep in enumerate(scheduler.timesteps):
        call = dict(template)
        call[signature.sample] = twice(scale_input(scheduler, x, timestep), guidance_scale)
        if signature.timestep is not None:
            form = torch.as_tensor(template[signature.timestep])
            call[signature.timestep] = timestep_tensor(timestep, x.device).expand(form.shape)
        prediction = first_tensor(model(**call))
        with NoiseTape(tapes[i] if tapes is not None else None) as tape:
            combined = sampler_prediction(guided(prediction, guidance_scale), x, scheduler)
            x = step_scheduler(scheduler, combined, timestep, x, options)
        calls.append((call,))
        outputs.append((prediction,))
        noises.append(tuple(tape.tensors))
        values.append(float(timestep))
    refuse_not_finite(model, calls, outputs, values)
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
        guidance_scale=guidance_scale,
    )


def twice(x: torch.Tensor, guidance_scale: float | None) -> torch.Tensor:
    """What a denoiser is given for a batch of samples: with guidance each of them twice."""
    return x if guidance_scale is None else torch.cat([x, x])


def guided(prediction: torch.Tensor, guidance_scale: float | None) -> torch.Tensor:
    """What a sampler is given for a prediction."""
    if guidance_scale is None:
        return prediction
    without, conditional = prediction.chunk(2)
    return without + guidance_scale * (conditional - without)


def _both(conditioning: dict[str, Any], unconditional: dict[str, Any]) -> dict[str, Any]:
    """Arguments for the batch without conditioning, then the batch with it.

    Raises:
        InputError: they do not go together; names them.
    """
    missing = sorted(set(unconditional) - set(conditioning))
    if missing:
        raise InputError(f"unconditional= names {missing}, which example_inputs does not have; give both for each argument")

    def join(name: str, a: Any, b: Any) -> Any:
        if not isinstance(b, torch.Tensor) or not b.dim():
            return b
        if not isinstance(a, torch.Tensor) or a.shape != b.shape:
            shapes = [list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__ for x in (a, b)]
            raise InputError(f"{name} of unconditional= is {shapes[0]}, and {shapes[1]} in example_inputs; give equal shapes")
        return torch.cat([a, b])

    def part(name: str) -> Any:
        a, b = unconditional.get(name, conditioning[name]), conditioning[name]
        if pytree.tree_structure(a) != pytree.tree_structure(b):
            raise InputError(f"{name} of unconditional= holds other things than in example_inputs; give equal structures")
        return pytree.tree_map(lambda x, y: join(name, x, y), a, b)

    return {name: part(name) for name in conditioning}


def _with_generator(scheduler: Any, step_kwargs: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """The arguments of ``scheduler.step`` besides, with a generator where it takes one and none is given."""
    takes = "generator" in inspect.signature(scheduler.step).parameters and "generator" not in step_kwargs
    return {**step_kwargs, **({"generator": generator} if takes else {})}
