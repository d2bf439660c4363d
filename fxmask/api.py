"""accelerate(): the visible, ordered list of stages. The only module that knows them all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fxmask.backends import get_backend
from fxmask.errors import InputError, MaskError
from fxmask.inputs import ExampleInputs
from fxmask.learning import Outcome, learn
from fxmask.mask import Mask, Plan
from fxmask.passes.rectify import rectify
from fxmask.program import Program
from fxmask.runtime import AcceleratedModel
from fxmask.tracing import capture
from fxmask.trajectory import record

RECORDED_BATCH = 8


def accelerate(
    model: torch.nn.Module,
    scheduler: Any,
    *,
    num_inference_steps: int = 50,
    speedup: float | None = None,
    macs: float | None = None,
    max_error: float | None = None,
    mask: Mask | None = None,
    example_inputs: ExampleInputs = None,
    step_kwargs: Mapping[str, Any] | None = None,
    max_graphs: int | None = None,
    backend: str = "inductor",
    seed: int = 0,
    progress: bool = True,
) -> AcceleratedModel:
    """Accelerate a denoiser for a sampler.

    Args:
        model: the denoiser, in eval mode; its weights are shared, not copied.
        scheduler: a diffusers scheduler, or anything with ``set_timesteps``, ``timesteps`` and ``step``. Not changed.
        num_inference_steps: how many steps the sampler will take.
        speedup: ratio of total MACs over the steps, e.g. 2.0, which is also the default outcome.
        macs: or the fraction of the full MACs to keep, e.g. 0.5.
        max_error: or the largest relative L2 error of the final sample, e.g. 0.05.
        mask: or a mask of your own; nothing is learned then. At most one of these four.
        example_inputs: dict of forward arguments, or a function (batch_size, generator) -> dict, for conditioning that
            cannot be inferred; sample and timestep may be included.
        step_kwargs: passed on to ``scheduler.step`` while recording, e.g. ``{"eta": 1.0}``.
        max_graphs: at most this many distinct step graphs; each costs seconds to compile.
        backend: ``"inductor"`` (torch.compile) or ``"eager"``.
        seed: of the recorded noise and of learning.
        progress: show progress bars.

    Returns:
        The accelerated model, to be used in place of ``model``.

    Raises:
        InputError, SchedulerError, OutcomeError, MaskError, CaptureError: each says what to do.
    """
    outcome = Outcome(speedup, macs, max_error)
    if mask is not None:
        outcome.refuse_with("mask")
    get_backend(backend)
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if model.training:
        raise InputError(f"{type(model).__name__} is in training mode; call model.eval() first")
    trajectory = record(model, scheduler, num_inference_steps, RECORDED_BATCH, example_inputs, step_kwargs, seed)
    program = capture(model, trajectory.calls[0][0])
    if mask is None:
        mask = learn(program, trajectory, speedup, macs, max_error, max_graphs, seed, progress)
    elif mask.timesteps != trajectory.timesteps:
        raise MaskError(
            f"the mask is for {mask.num_steps} steps from timestep {mask.timesteps[0]:g}, the scheduler makes "
            f"{trajectory.num_steps} from {trajectory.timesteps[0]:g}; pass the num_inference_steps and scheduler that the "
            "mask was made for"
        )
    plan = rectify(program, mask)
    accelerated = compile(program, plan, backend)
    return accelerated.compile_all(progress) if backend != "eager" else accelerated


def compile(program: Program, plan: Plan, backend: str = "inductor") -> AcceleratedModel:
    """Make a callable model of a program and a plan. Step graphs compile at their first call, or by ``compile_all``.

    Args:
        program: from ``fxmask.capture``.
        plan: from ``fxmask.rectify`` of the same program.
        backend: ``"inductor"`` (torch.compile) or ``"eager"``.

    Raises:
        MaskError: the plan belongs to another program.
        BackendError: unknown backend.
    """
    return AcceleratedModel(program, plan, backend)
