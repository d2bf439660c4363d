"""accelerate(): the visible, ordered list of stages. The only module that knows them all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from fxmask.backends import get_backend
from fxmask.distributed import Group
from fxmask.errors import InputError, MaskError
from fxmask.inputs import ExampleInputs, module_device
from fxmask.learning import learn
from fxmask.mask import Mask, Plan
from fxmask.outcome import Outcome
from fxmask.packaging import is_package, read_package
from fxmask.passes.rectify import rectify
from fxmask.program import Program
from fxmask.runtime import AcceleratedModel
from fxmask.saving import differences, load_plan, scheduler_facts
from fxmask.tracing import capture
from fxmask.trajectory import record

RECORDED_BATCH = 8
RECORDED_RUNS = 4  # to learn from; the last quarter is kept for the final comparison. With many ranks, two for each


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
    max_cache_bytes: int | None = None,
    learner: str = "default",
    effort: str = "default",
    cost: str = "macs",
    checkpoint: str | Path | None = None,
    backend: str = "inductor",
    mode: str | None = None,
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
        max_cache_bytes: at most this many cached bytes at once, per lane, for a batch of ``RECORDED_BATCH``.
        learner: ``"default"``, or ``"paper"`` for the learner of arXiv 2603.19939.
        effort: ``"default"`` or ``"quick"``: how many sampling runs learning may take; see ``fxmask.learn``.
        cost: what ``speedup`` and ``macs`` are ratios of: ``"macs"``, or ``"latency"``, seconds measured on this machine.
        checkpoint: a file that keeps what learning has measured; the same call goes on from it.
        backend: ``"inductor"`` (the compiler of torch.compile), ``"cudagraph"`` (the same, replayed on an NVIDIA GPU),
            ``"package"`` (the same, ahead of time: slow to compile, see ``AcceleratedModel.export``) or ``"eager"``.
        mode: how Inductor compiles: ``"regions"`` (the default: equal parts of all step graphs once) or ``"whole"`` (each
            step graph on its own, which takes longer to compile).
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
    get_backend(backend).compiler(mode)
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if model.training:
        raise InputError(f"{type(model).__name__} is in training mode; call model.eval() first")
    if mask is None:
        group = Group.current()
        seeds = [seed + k for k in range(max(RECORDED_RUNS, 2 * group.size))]
    else:
        seeds = [seed]
    trajectories = [
        record(model, scheduler, num_inference_steps, RECORDED_BATCH, example_inputs, step_kwargs, s)
        for s in tqdm(seeds, desc="recording", unit="run", disable=not progress)
    ]
    first = trajectories[0]
    program = capture(model, first.calls[0][0])
    if mask is None:
        mask = learn(
            program,
            trajectories,
            speedup,
            macs,
            max_error,
            max_graphs,
            seed,
            progress,
            learner=learner,
            effort=effort,
            max_cache_bytes=max_cache_bytes,
            checkpoint=checkpoint,
            cost=cost,
            backend=backend,
        )
    elif mask.timesteps != first.timesteps:
        raise MaskError(
            f"the mask is for {mask.num_steps} steps from timestep {mask.timesteps[0]:g}, the scheduler makes "
            f"{first.num_steps} from {first.timesteps[0]:g}; pass the num_inference_steps and scheduler that the "
            "mask was made for"
        )
    plan = rectify(program, mask)
    accelerated = compile(program, plan, backend, mode)
    return _finish(accelerated, _facts(scheduler, num_inference_steps, step_kwargs), progress)


def load(
    folder: str | Path,
    model: torch.nn.Module,
    scheduler: Any = None,
    *,
    backend: str | None = None,
    mode: str | None = None,
    progress: bool = True,
) -> AcceleratedModel:
    """Accelerate a model with what ``AcceleratedModel.save`` or ``export`` wrote.

    A folder from ``export`` is loaded without capture and without compilation, unless another ``backend`` is asked for. It
    holds machine code, so load only what you trust.

    Args:
        folder: the saved plan, or the package.
        model: the same architecture, in eval mode; its weights are its own.
        scheduler: if given, must be what the plan was made for.
        backend: other than the saved one; a package is then taken for the saved plan that it is too.
        mode: of the backend, other than the saved one.
        progress: show a progress bar while compiling.

    Raises:
        InputError: the model is in training mode.
        MaskError: the plan is damaged, or model or scheduler differ; says in what.
        BackendError: the package was compiled for another version of PyTorch, kind of device or processor.
    """
    if is_package(folder) and backend in (None, "package"):
        return _load_package(folder, model, scheduler, progress)
    mask, facts, example = load_plan(folder)
    _refuse_other_scheduler(folder, facts, scheduler)
    device = module_device(model)
    roles = {name.split(".")[0]: role for name, role in facts["roles"].items()}
    program = capture(model, pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), example), roles)
    if program.fingerprint != mask.fingerprint:
        names = {b.name for b in program.blocks}
        missing = [name for name in mask.blocks if name not in names]
        raise MaskError(
            f"the plan in {folder} was made for another model: {facts['model']} with fingerprint {mask.fingerprint}, this "
            f"{type(model).__name__} has {program.fingerprint}"
            + (f"; it has no blocks {missing[:5]}" if missing else "; it has blocks of these names, but other operators")
        )
    accelerated = compile(
        program,
        rectify(program, mask, facts["start"]),
        backend or facts["backend"],
        mode if backend or mode else facts.get("mode"),
    )
    return _finish(accelerated, _about_sampler(facts), progress)


def _load_package(folder: str | Path, model: torch.nn.Module, scheduler: Any, progress: bool) -> AcceleratedModel:
    """A model whose step graphs are in a package; they are compared with the model before it is handed out."""
    package = read_package(folder, model, progress)
    _refuse_other_scheduler(folder, package.facts, scheduler)
    plan = rectify(package.program, package.mask, package.facts["start"])
    accelerated = AcceleratedModel(package.program, plan, "package", compiler=package.compiler)
    accelerated._fxmask.facts.update(_about_sampler(package.facts))
    executor = accelerated._fxmask.variants[package.program.example.key].executor(plan.start)
    executor.graphs.prepare(plan)
    if package.compiler.missing:
        raise MaskError(
            f"the package in {folder} was exported by another version of fxmask, which cuts graphs differently; "
            "load it with backend='inductor', which captures and compiles, and export that"
        )
    tensors = list(package.program.example.tensors.values())
    with torch.no_grad():
        executor.begin(tensors)
        package.compare(executor.run_full(tensors))
    return accelerated


def _refuse_other_scheduler(folder: str | Path, facts: Mapping[str, Any], scheduler: Any) -> None:
    found = differences(facts.get("scheduler", {}), scheduler_facts(scheduler)) if scheduler is not None else []
    if found:
        raise MaskError(f"the plan in {folder} was made for another scheduler:\n  " + "\n  ".join(found))


def _about_sampler(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in facts.items() if k in ("scheduler", "num_inference_steps", "step_kwargs")}


def _finish(accelerated: AcceleratedModel, facts: Mapping[str, Any], progress: bool) -> AcceleratedModel:
    """The model with what ``save`` will write, compiled if its backend compiles anything."""
    accelerated._fxmask.facts.update(facts)
    return accelerated if accelerated._fxmask.backend == "eager" else accelerated.compile_all(progress)


def _facts(scheduler: Any, num_inference_steps: int, step_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    plain = {key: value for key, value in (step_kwargs or {}).items() if isinstance(value, (bool, int, float, str))}
    return {"scheduler": scheduler_facts(scheduler), "num_inference_steps": num_inference_steps, "step_kwargs": plain}


def compile(program: Program, plan: Plan, backend: str = "inductor", mode: str | None = None) -> AcceleratedModel:
    """Make a callable model of a program and a plan. Step graphs compile at their first call, or by ``compile_all``.

    Args:
        program: from ``fxmask.capture``.
        plan: from ``fxmask.rectify`` of the same program.
        backend: ``"inductor"`` (the compiler of torch.compile), ``"cudagraph"`` (the same, replayed on an NVIDIA GPU),
            ``"package"`` (the same, ahead of time: slow to compile, see ``AcceleratedModel.export``) or ``"eager"``.
        mode: how Inductor compiles: ``"regions"`` (the default) or ``"whole"``; see ``accelerate``.

    Raises:
        MaskError: the plan belongs to another program.
        BackendError: unknown backend or mode.
    """
    program.require_verified()
    return AcceleratedModel(program, plan, backend, mode)
