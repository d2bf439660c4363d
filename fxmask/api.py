"""The visible, ordered list of stages behind accelerate(), learn(), load() and compile(). Only this module knows them all."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm

from fxmask.backends import get_backend
from fxmask.errors import InputError, MaskError
from fxmask.files.foreign import foreign_errors_as
from fxmask.frontend.capture import capture
from fxmask.frontend.examples import ExampleInputs
from fxmask.frontend.modules import module_device, require_denoiser, require_eval
from fxmask.ir.mask import Mask
from fxmask.ir.plan import Plan
from fxmask.ir.program import Program
from fxmask.learning.candidate import ParetoPoint
from fxmask.learning.effort import EFFORTS, Limits
from fxmask.learning.instant.levels import ReuseErrors, ReusePlan, best_plan, probed, reuses_of
from fxmask.learning.instant.parts import PartsLearner, learner_of
from fxmask.learning.instant.plans import InstantPlan, formed_share, keeper
from fxmask.learning.outcome import Outcome
from fxmask.learning.paper.learner import learn_paper
from fxmask.learning.paper.options import PaperOptions
from fxmask.learning.precision import check_learn_dtype, exact, widened
from fxmask.learning.prices import measure_latency, per_step
from fxmask.learning.ranks import Group
from fxmask.learning.room import Room
from fxmask.learning.search import Search
from fxmask.learning.student import output_blocks
from fxmask.passes.rectify import rectify
from fxmask.runtime.checks import Checks
from fxmask.runtime.compare_steps import compare_steps
from fxmask.runtime.model import AcceleratedModel
from fxmask.sampling.same_sampler import abbreviated, cannot_make, is_same_grid, sampler_facts, scheduler_facts, timesteps_of
from fxmask.sampling.sampler import Sampler
from fxmask.sampling.schedulers import require_scheduler
from fxmask.sampling.trajectory import record
from fxmask.settings.checked import checks_of
from fxmask.settings.pipeline import is_a_pipeline, session_of
from fxmask.settings.pipeline import restore as restore_pipeline
from fxmask.settings.saved import load_settings, save_settings
from fxmask.settings.session import Session
from fxmask.settings.start import accelerate_pipeline
from fxmask.storage.about import LEARNED, kept_facts
from fxmask.storage.differences import scheduler_differences
from fxmask.storage.folders import read_again
from fxmask.storage.hub import local_folder
from fxmask.storage.packages import agrees, is_package, read_package
from fxmask.storage.plan_file import FOREIGN
from fxmask.storage.plans import facts_of, load_plan
from fxmask.storage.saved_program import capture_saved

logger = logging.getLogger(__name__)
RECORDED_BATCH = 8
RECORDED_RUNS = 4  # to learn from; the last quarter is kept for the final comparison. With many ranks, two for each
STEPS = 50  # that a sampler takes, where nothing is said
LEARNERS = ("default", "paper")
COSTS = ("macs", "latency")

T = TypeVar("T")


def accelerate(
    model: Any,
    scheduler: Any = None,
    *,
    num_inference_steps: int | Sequence[int] | None = None,
    speedup: float | None = None,
    macs: float | None = None,
    max_error: float | None = None,
    mask: Mask | None = None,
    example_inputs: ExampleInputs = None,
    example_calls: Sequence[Mapping[str, Any]] | None = None,
    step_kwargs: Mapping[str, Any] | None = None,
    scheduler_kwargs: Mapping[str, Any] | None = None,
    guidance_scale: float | None = None,
    unconditional: ExampleInputs = None,
    max_graphs: int | None = None,
    max_cache_bytes: int | None = None,
    max_learning_bytes: int | None = None,
    learn_dtype: torch.dtype = torch.float32,
    learner: str = "default",
    effort: str = "instant",
    cost: str = "macs",
    checkpoint: str | Path | None = None,
    backend: str = "auto",
    mode: str | None = None,
    component: str | Sequence[str] | None = None,
    improve: str | None = None,
    every: int = 0,
    compiling: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Any:
    """Accelerate a denoiser for a sampler, or a pipeline in place.

    With ``effort="instant"`` a plan is made of recorded predictions alone. For a model one run is recorded now. A pipeline is
    returned at once: its first call at any setting (steps, size, scheduler, guidance, adapters) runs in full, makes what it
    always made, and is recorded in passing; from the second call on that setting is accelerated. With ``example_calls``, or
    more effort, calls of the pipeline are recorded and learned from now: their settings are fast from the first call on.
    ``example_inputs``, ``step_kwargs``, ``scheduler_kwargs``, ``guidance_scale`` and ``unconditional`` are for models.

    Args:
        model: the denoiser, in eval mode; its weights are shared, not copied. Or a pipeline: an object that holds modules and a
            scheduler as attributes and is called. It is returned, with its denoiser replaced; ``fxmask.restore`` undoes that.
        scheduler: a diffusers scheduler, or anything with ``set_timesteps``, ``timesteps`` and ``step``. Needed, and not
            changed.
        num_inference_steps: how many steps the sampler will take; 50, if not given. Of a pipeline, at which numbers of steps
            the example calls are made, one or several; as each call says, if not given.
        speedup: ratio of total MACs over the steps, e.g. 2.0, which is also the default outcome.
        macs: or the fraction of the full MACs to keep, e.g. 0.5.
        max_error: or the largest relative L2 error of the final sample, e.g. 0.05.
        mask: or a mask of your own; nothing is learned then. At most one of these four.
        example_inputs: dict of forward arguments, or a function (batch_size, generator) -> dict, for conditioning that
            cannot be inferred; sample and timestep may be included.
        example_calls: of a pipeline: keyword arguments of calls to learn from, e.g. ``[{"prompt": "a red house"}]``. Without
            them ``effort="quick"`` and ``"default"`` make calls with neutral prompts, or class labels, of their own.
        step_kwargs: passed on to ``scheduler.step`` while recording, e.g. ``{"eta": 1.0}``.
        scheduler_kwargs: passed on to ``scheduler.set_timesteps``, e.g. ``{"mu": 1.15}`` where images' sizes shift timesteps.
        guidance_scale: of a model that is sampled with classifier-free guidance in one batch, first without the conditioning.
        unconditional: the arguments without conditioning; see ``fxmask.record``.
        max_graphs: at most this many distinct step graphs; each costs seconds to compile.
        max_cache_bytes: at most this many cached bytes at once, per lane, for a batch of ``RECORDED_BATCH``.
        max_learning_bytes: how much memory learning may take besides model and recorded runs; half of what is free where the
            model is, if not given. The mask is the same, up to rounding; with less memory more is computed again.
        learn_dtype: a model of less precision is learned from a copy in this type, made for that time only.
        learner: ``"default"``, or ``"paper"`` for the learner of arXiv 2603.19939.
        effort: ``"instant"`` (none but the recorded run, and six calls where the sampler injects noise), ``"quick"`` or
            ``"default"``: how many sampling runs learning may take; see ``fxmask.learn``. Of a pipeline, the instant plan is
            kept where no better one is found; ``pipe.unet.improve(effort="quick")`` goes on from there.
        cost: what ``speedup`` and ``macs`` are ratios of: ``"macs"``, or ``"latency"``, seconds measured on this machine.
        checkpoint: a file that keeps what learning has measured; the same call goes on from it. Of a pipeline a folder, with a
            file for each denoiser and setting. Nothing is measured for ``"instant"``.
        backend: ``"auto"`` (Inductor, the compiler of torch.compile; steps are replayed as CUDA graphs where the model is on an
            NVIDIA GPU), ``"inductor"`` (never replayed), ``"cudagraph"`` (an error where nothing can be replayed),
            ``"package"`` (ahead of time: slow to compile, see ``AcceleratedModel.export``) or ``"eager"``.
        mode: how Inductor compiles: ``"regions"`` (the default: equal parts of all step graphs once) or ``"whole"`` (each
            step graph on its own, which takes longer to compile).
        component: name of the pipeline's denoiser, where it is none of the usual ones; or names of several.
        improve: ``"background"``: plans of a pipeline are made better in a thread of its own, when further runs were recorded.
        every: one call of a pipeline in so many runs in full and is recorded, so that plans follow what it is used for;
            0: none.
        compiling: ``"background"``: step graphs compile in a thread of their own while the original answers, to the end of the
            run in which that is over.
        seed: of the recorded noise and of learning.
        progress: show progress bars.

    Returns:
        The accelerated model, to be used in place of ``model``; ``accelerated.original`` is ``model``, as it was.

    Raises:
        InputError, SchedulerError, OutcomeError, MaskError, CaptureError: each says what to do.
    """
    outcome = Outcome(speedup, macs, max_error)
    if mask is not None:
        outcome.refuse_with("mask")
        _expect(mask, Mask, "mask", "fxmask.Mask(compute=..., timesteps=..., blocks=...)")
    get_backend(backend).compiler(mode)
    _check_choice("effort", effort, ("instant", *EFFORTS))
    _check_choice("compiling", compiling, (None, "background"))
    _check_choice("cost", cost, COSTS)
    if is_a_pipeline(model):
        return accelerate_pipeline(
            model,
            scheduler,
            outcome,
            refused={
                "mask": mask is not None,
                "learner": learner != "default",
                "cost": cost != "macs",
                "example_inputs": example_inputs is not None,
                "step_kwargs": bool(step_kwargs),
                "scheduler_kwargs": bool(scheduler_kwargs),
                "guidance_scale": guidance_scale is not None,
                "unconditional": unconditional is not None,
            },
            example_calls=example_calls,
            num_inference_steps=num_inference_steps,
            effort=effort,
            limits=Limits(max_graphs, max_cache_bytes),
            max_learning_bytes=max_learning_bytes,
            checkpoint=checkpoint,
            backend=backend,
            mode=mode,
            component=component,
            improve=improve,
            every=every,
            compiling=compiling,
            seed=seed,
            progress=progress,
        )
    model = require_eval(model)
    for_pipelines = {"component": component is not None, "improve": improve is not None, "every": bool(every)}
    for_pipelines["example_calls"] = example_calls is not None
    named = [name for name, given in for_pipelines.items() if given]
    if named:
        raise InputError(f"{named} is for a pipeline, which is called again and again; leave it out for a model")
    get_backend(backend).capturer_for(module_device(model))
    if learner == "paper" and effort == "instant":
        effort = "default"  # it has one, of its own
    own_mask = mask
    # 1. record
    recorded = functools.partial(
        record,
        model,
        scheduler,
        num_inference_steps=_one_number(num_inference_steps),
        batch_size=RECORDED_BATCH,
        example_inputs=example_inputs,
        step_kwargs=step_kwargs,
        scheduler_kwargs=scheduler_kwargs,
        guidance_scale=guidance_scale,
        unconditional=unconditional,
    )
    seeds = _seeds(seed, mask, effort)
    trajectories = [recorded(seed=s) for s in tqdm(seeds, desc="recording", unit="run", disable=not progress)]
    first = trajectories[0]
    # 2. capture, and find the blocks
    program = capture(model, first.calls[0][0])
    if mask is None and effort == "instant" and not output_blocks(program):
        logger.warning(
            "%s has no block that is its whole output, which effort='instant' forecasts; learning with effort='quick'",
            type(model).__name__,
        )
        effort = "quick"
        seeds = _seeds(seed, mask, effort)
        trajectories += [recorded(seed=s) for s in seeds[1:]]
    # 3. learn
    checks: Checks | None = None
    instant = mask is None and effort == "instant"
    if instant:
        mask, checks = _fit_at_once(program, trajectories, outcome, Limits(max_graphs, max_cache_bytes), cost, backend)
    elif mask is None:
        mask = learn(
            program,
            trajectories,
            speedup=speedup,
            macs=macs,
            max_error=max_error,
            max_graphs=max_graphs,
            max_cache_bytes=max_cache_bytes,
            max_learning_bytes=max_learning_bytes,
            learn_dtype=learn_dtype,
            seed=seed,
            progress=progress,
            learner=learner,
            effort=effort,
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
    # 4. rectify
    plan = rectify(program, mask)
    # 5. specialise and compile
    facts = sampler_facts(first) or {}
    if own_mask is None:
        facts[LEARNED] = _learned_facts(trajectories, seeds, outcome, learner, effort, cost)
    accelerated = AcceleratedModel(program, plan, backend, mode, facts=facts, checks=checks, progress=progress)
    if instant:
        limits = Limits(max_graphs, max_cache_bytes)
        session = Session(accelerated, None, outcome, limits=limits, backend=backend, mode=mode, progress=progress)
        session.take_over(program, trajectories, mask, checks)
    aside = compiling == "background"
    return accelerated if backend == "eager" else accelerated.compile_all(progress=progress, background=aside)


def restore(model: Any) -> Any:
    """Undo ``accelerate``: put the original denoiser back into a pipeline.

    Args:
        model: an accelerated pipeline, or an accelerated model.

    Returns:
        The pipeline, or the original of the model. What is not accelerated is returned as it is.
    """
    if isinstance(model, torch.nn.Module):
        return model.original if getattr(type(model), "is_accelerated", False) else model
    return restore_pipeline(model)


def save(model: Any, folder: str | Path) -> None:
    """Save the plans of an accelerated pipeline, of all settings that have one, or the plan of an accelerated model.

    ``fxmask.load(folder, pipe)`` reads them. No weights, and no recorded runs. A README.md says what the plans were
    learned on and what was measured, with their heat maps, so that the folder can be pushed to a hub. Other READMEs stay.

    Raises:
        InputError: it is not accelerated, or no setting has a plan yet.
        MaskError: the folder holds something else or cannot be written.
    """
    if isinstance(model, torch.nn.Module):
        if not getattr(type(model), "is_accelerated", False):
            raise InputError(f"this {type(model).__name__} is not accelerated; call fxmask.accelerate() first")
        model.save(folder)  # type: ignore[operator]
    else:
        save_settings(session_of(model), Path(folder))


def _fit_at_once(
    program: Program, runs: Sequence[Sampler], outcome: Outcome, limits: Limits, cost: str, backend: str
) -> tuple[Mask, Checks | None]:
    """The plan of recorded runs alone; where the sampler injects noise, and of a few further calls."""
    prices = None
    if cost == "latency":
        prices = per_step(program, measure_latency(program, backend))
    learner = learner_of(runs, program)
    share, keeps = formed_share(program, prices), keeper(program, runs[0], limits)
    plan: InstantPlan | ReusePlan = learner.best(outcome, share, keeps)
    reuses = reuses_of(program, outcome, prices) if runs[-1].stochastic else []
    if (
        reuses
        and not isinstance(learner, PartsLearner)
        and isinstance(plan, InstantPlan)
        and len(plan.computed) < learner.steps
    ):
        errors = ReuseErrors(learner, probed(program, learner, plan, reuses), fresh=False)
        plan = best_plan(learner, outcome, share, reuses, errors, keeps)
    return plan.mask(program, runs[0], sampler_facts(runs[0])), checks_of(learner, plan, outcome.max_error)


def learn(
    program: Program,
    calls: Sampler | Sequence[Sampler],
    *,
    speedup: float | None = None,
    macs: float | None = None,
    max_error: float | None = None,
    max_graphs: int | None = None,
    max_cache_bytes: int | None = None,
    max_learning_bytes: int | None = None,
    learn_dtype: torch.dtype = torch.float32,
    learner: str = "default",
    effort: str = "default",
    checkpoint: str | Path | None = None,
    options: PaperOptions | None = None,
    cost: str = "macs",
    backend: str = "auto",
    seed: int = 0,
    progress: bool = True,
    lanes: str = "own",
) -> Mask:
    """Choose the mask, and its forecasts, that meet an outcome with the smallest error of the final samples.

    Args:
        program: the captured denoiser.
        calls: recorded sampling runs. Of 16 images and more the last quarter of the runs is kept for the final comparison; of
            fewer, half of them, and both halves judge what the other one gave; of one run alone, runs with fresh noise are
            recorded for it. With ``effort="instant"`` all of them are fitted.
        speedup: ratio of total MACs, e.g. 2.0, which is also the default outcome.
        macs: or the fraction of the full MACs to keep.
        max_error: or the largest relative L2 error of the final samples, on held-out noise. If nothing that saves MACs keeps
            it, the mask computes everything, with a warning.
        max_graphs: at most this many distinct step graphs.
        max_cache_bytes: bound of ``Plan.peak_cache_bytes``, at the captured batch size.
        max_learning_bytes: how much memory learning may take besides model and recorded runs; half of what is free where the
            model is, if not given. The mask is the same, up to rounding; with less memory more is computed again.
        learn_dtype: a model of less precision is learned from a copy in this type, made for that time only.
        learner: ``"default"``, or ``"paper"`` for the learner of arXiv 2603.19939: passes over the steps with fresh noise and
            the recorded runs' conditioning, 200 of them or 40 with ``effort="quick"``.
        effort: ``"default"`` (120 full sampling runs of work, and the last step of refinement, at most 25; from 16 images
            on, where the sampler injects noise or lanes have rows of their own, about 15 more on one rank, to compare the
            best plans on fresh noise),
            ``"quick"`` (18), or ``"instant"`` (none: forecasts of the whole output are fitted on the recorded predictions;
            where the sampler injects noise, six calls on the recorded images tell whether reused branches or a stage serve
            better).
        checkpoint: a file that keeps what was measured; the same call goes on from it.
        options: of the paper's learner.
        cost: what a speed-up is a ratio of: ``"macs"``, or ``"latency"``, seconds measured on this machine
            (``fxmask.learning.prices``). ``macs=`` is then a fraction of the full run's seconds.
        backend: what latencies are measured with.
        seed: of everything random. Same seed, same mask.
        progress: show a progress bar. Ctrl-C ends the learning and returns the best plan so far.
        lanes: ``"own"``: where guidance makes several calls per step, or calls that hold several lanes in one batch, the
            plans in which these have rows of their own (``Mask.lanes``) are tried too, for at most 60 units more, with
            ``effort="quick"`` for 6, and one that is better on fresh noise is taken, with quick effort or fewer than 16 images
            one that is better on these by more than the standard error. That needs one rank. ``"alike"``: all lanes do the
            same.

    Raises:
        InputError: an option is unknown or of another learner, or the recorded runs do not belong together.
        OutcomeError: the outcome is contradictory or out of reach; says what is reachable.
    """
    _expect(program, Program, "program", "fxmask.learn(fxmask.capture(model, calls.calls[0][0]), calls)")
    program.require_one_sample()
    outcome = Outcome(speedup, macs, max_error)
    limits = Limits(max_graphs, max_cache_bytes)
    _check_choice("learner", learner, LEARNERS)
    _check_choice("effort", effort, ("instant", *EFFORTS))
    _check_choice("cost", cost, COSTS)
    _check_choice("lanes", lanes, ("own", "alike"))
    trajectories = _listed(calls)
    check_learn_dtype(learn_dtype)
    if effort == "instant" and learner == "default":
        return _fit_at_once(program, trajectories, outcome, limits, cost, backend)[0]
    room = _room(max_learning_bytes, program)
    if learner == "paper":
        _check_choice("effort", effort, tuple(EFFORTS))
        if cost != "macs":
            raise InputError(f"learner='paper' counts MACs; leave out cost={cost!r}")
    elif options is not None:
        raise InputError("options= are those of learner='paper'; leave them out, or choose that learner")
    with exact():
        learned, trajectories, deployed = widened(program, trajectories, learn_dtype, room)
        if learner == "paper":
            options = options or PaperOptions()
            return learn_paper(
                learned,
                trajectories,
                outcome,
                limits=limits,
                seed=seed,
                progress=progress,
                options=options,
                effort=effort,
                checkpoint=checkpoint,
                deployed=deployed,
            )
        search = Search(
            learned,
            trajectories,
            effort=EFFORTS[effort],
            limits=limits,
            seed=seed,
            progress=progress,
            checkpoint=checkpoint,
            cost=cost,
            backend=backend,
            room=room,
            deployed=deployed,
            lanes=lanes,
        )
        if outcome.max_error is not None:
            return search.meet_error(outcome.max_error).mask
        return search.best(outcome.budget).mask


def pareto(
    program: Program,
    calls: Sampler | Sequence[Sampler],
    *,
    speedups: Iterable[float] = (1.5, 2.0, 3.0),
    max_graphs: int | None = None,
    max_cache_bytes: int | None = None,
    max_learning_bytes: int | None = None,
    learn_dtype: torch.dtype = torch.float32,
    effort: str = "default",
    checkpoint: str | Path | None = None,
    cost: str = "macs",
    backend: str = "auto",
    seed: int = 0,
    progress: bool = True,
    lanes: str = "own",
) -> tuple[ParetoPoint, ...]:
    """Plans for several speed-ups from one run of learning; what is measured is shared. Arguments as for ``learn``.

    ``fxmask.draw_pareto(points, axes)`` plots error against MACs.
    """
    _expect(program, Program, "program", "fxmask.pareto(fxmask.capture(model, calls.calls[0][0]), calls)")
    program.require_one_sample()
    _check_choice("effort", effort, tuple(EFFORTS))
    _check_choice("cost", cost, COSTS)
    _check_choice("lanes", lanes, ("own", "alike"))
    if not isinstance(speedups, Iterable):
        raise InputError(f"speedups must be several numbers, got {speedups!r}; e.g. speedups=(1.5, 2.0)")
    wanted = [Outcome(speedup=s) for s in speedups]
    limits = Limits(max_graphs, max_cache_bytes)
    check_learn_dtype(learn_dtype)
    room = _room(max_learning_bytes, program)
    with exact():
        learned, trajectories, deployed = widened(program, _listed(calls), learn_dtype, room)
        search = Search(
            learned,
            trajectories,
            effort=EFFORTS[effort],
            limits=limits,
            seed=seed,
            progress=progress,
            checkpoint=checkpoint,
            cost=cost,
            backend=backend,
            room=room,
            deployed=deployed,
            lanes=lanes,
        )
        return tuple(search.best(outcome.budget) for outcome in wanted)


def compile(
    program: Program, plan: Plan, backend: str = "auto", *, mode: str | None = None, progress: bool = True
) -> AcceleratedModel:
    """Make a callable model of a program and a plan. Step graphs compile at their first call, or by ``compile_all``.

    Args:
        program: from ``fxmask.capture``.
        plan: from ``fxmask.rectify`` of the same program.
        backend: ``"auto"`` (Inductor, the compiler of torch.compile; steps are replayed as CUDA graphs where the model is on an
            NVIDIA GPU), ``"inductor"`` (never replayed), ``"cudagraph"`` (an error where nothing can be replayed),
            ``"package"`` (ahead of time: slow to compile, see ``AcceleratedModel.export``) or ``"eager"``.
        mode: how Inductor compiles: ``"regions"`` (the default) or ``"whole"``; see ``accelerate``.
        progress: show a bar while step graphs compile, also later for another shape.

    Raises:
        MaskError: the plan belongs to another program.
        BackendError: unknown backend or mode.
    """
    _expect(program, Program, "program", "fxmask.compile(fxmask.capture(model, call), plan)")
    _expect(plan, Plan, "plan", "fxmask.compile(program, fxmask.rectify(program, mask))")
    program.require_verified()
    return AcceleratedModel(program, plan, backend, mode, facts=plan.source.sampler, progress=progress)


def load(
    folder: str | Path,
    model: Any,
    scheduler: Any = None,
    *,
    backend: str | None = None,
    mode: str | None = None,
    allow_compiled: bool = False,
    progress: bool = True,
) -> Any:
    """Accelerate a model with what ``AcceleratedModel.save`` or ``export`` wrote, or a pipeline with what ``save`` wrote.

    A folder from ``export`` holds machine code. With ``allow_compiled=True`` it is loaded without capture and without
    compilation; each step graph is compared once with what it was compiled from.

    Args:
        folder: the saved plan, or the package; or ``owner/name`` of one on the hub, ``owner/name@revision`` of a version of it.
        model: the same architecture, in eval mode; its weights are its own.
        scheduler: if given, must be what the plan was made for, where that is known: a plan that was compiled by
            ``fxmask.compile`` knows its timesteps only.
        backend: other than the saved one; a package is then taken for the saved plan that it is too.
        mode: of the backend, other than the saved one.
        allow_compiled: run the machine code of a package. Only for folders of which you trust everyone who could write them.
        progress: show a progress bar while compiling.

    Raises:
        InputError: the model is in training mode, or the folder is a package and ``allow_compiled`` is not set.
        MaskError: the plan is damaged, or model or scheduler differ; says in what.
        BackendError: the package was compiled for another version of PyTorch, kind of device or processor.
    """
    if isinstance(folder, torch.nn.Module):
        raise InputError("the folder comes first: fxmask.load(folder, model, scheduler)")
    if is_a_pipeline(model):
        place = local_folder(folder)
        return load_settings(place, model, backend=backend or "auto", mode=mode, progress=progress)
    model, place = require_denoiser(model), local_folder(folder, allow_compiled=allow_compiled)
    packaged = backend in (None, "package") and read_again(place, lambda: is_package(place))
    if packaged and not allow_compiled:
        raise InputError(
            f"{folder} is a package, which runs machine code from that folder; pass allow_compiled=True if you trust whoever "
            "wrote it, or backend='auto' to take only its plan and compile here"
        )
    if packaged:
        loaded: AcceleratedModel = read_again(place, lambda: _load_package(place, model, scheduler, progress))
        return loaded
    mask, facts, example = load_plan(place)
    facts = facts_of(place, mask, facts)
    _refuse_other_scheduler(folder, facts, mask, scheduler)
    program = capture_saved(folder, model, mask, facts, example)
    with foreign_errors_as(MaskError, f"the plan in {folder} does not fit this {type(model).__name__}", FOREIGN):
        plan = rectify(program, mask, start=facts["start"])
    accelerated = AcceleratedModel(
        program,
        plan,
        backend or facts["backend"],
        mode if backend or mode else facts.get("mode"),
        facts=kept_facts(facts),
        progress=progress,
    )
    return accelerated if (backend or facts["backend"]) == "eager" else accelerated.compile_all(progress=progress)


def _load_package(folder: Path, model: torch.nn.Module, scheduler: Any, progress: bool) -> AcceleratedModel:
    """A model whose step graphs are in a package; they are compared with the model before it is handed out."""
    package = read_package(folder, model, progress=progress)
    _refuse_other_scheduler(folder, package.facts, package.mask, scheduler)
    with foreign_errors_as(MaskError, f"the package in {folder} is damaged", FOREIGN):
        plan = rectify(package.program, package.mask, start=package.facts["start"])
        accelerated = AcceleratedModel(
            package.program, plan, "package", compiler=package.compiler, facts=kept_facts(package.facts)
        )
        executor = accelerated.executor
        executor.graphs.prepare(plan)
        if package.compiler.missing:
            raise MaskError(
                f"the package in {folder} was exported by another version of fxmask, which cuts graphs differently; "
                "load it with backend='auto', which captures and compiles, and export that"
            )
        tensors = list(package.program.example.tensors.values())
        with torch.no_grad():
            package.compare(executor.run_full(tensors))
            compare_steps(executor, agrees)
    return accelerated


def _one_number(steps: int | Sequence[int] | None) -> int:
    if isinstance(steps, (list, tuple)):
        raise InputError(f"num_inference_steps={steps!r}: several numbers of steps are for a pipeline; a model has one plan")
    return STEPS if steps is None else steps  # type: ignore[return-value]


def _room(max_learning_bytes: int | None, program: Program) -> Room:
    """How much memory learning may take; ranks that share a machine share what is free there."""
    device = module_device(program.model)
    room = Room.of(max_learning_bytes, device)
    if max_learning_bytes is None and device.type == "cpu":
        return Room(max(1, (room.given or 1) // Group.current().size))
    return room


def _seeds(seed: int, mask: Mask | None, effort: str) -> list[int]:
    """Of the runs that are recorded: one where nothing learns from them, or one is enough."""
    count = 1 if mask is not None or effort == "instant" else max(RECORDED_RUNS, 2 * Group.current().size)
    return [seed + k for k in range(count)]


def _learned_facts(
    runs: Sequence[Sampler], seeds: Sequence[int], outcome: Outcome, learner: str, effort: str, cost: str
) -> dict[str, Any]:
    """What a plan was learned on, and what was asked for."""
    asked = {name: value for name, value in vars(outcome).items() if value is not None} or {"speedup": 1 / outcome.budget}
    how = {"learner": learner} if learner != "default" else {"effort": effort}
    facts = {"runs": len(runs), "images": sum(run.batch_size for run in runs), "seeds": list(seeds), **how, "asked": asked}
    return {**facts, **({"cost": cost} if cost != "macs" else {})}


def _refuse_other_scheduler(folder: str | Path, facts: Mapping[str, Any], mask: Mask, scheduler: Any) -> None:
    if scheduler is None:
        return
    require_scheduler(scheduler)
    known, count = facts.get("scheduler"), facts.get("num_inference_steps")
    if not known:
        usual = cannot_make(scheduler, mask.timesteps)
        found = [] if usual is None else [_other_timesteps(mask.timesteps, usual)]
    else:
        found = scheduler_differences(known, scheduler_facts(scheduler))
        grid, options = facts.get("scheduler_timesteps"), facts.get("scheduler_kwargs")
        now = timesteps_of(scheduler, count, options) if grid and count and not found else None
        if grid and now is not None and not is_same_grid(grid, now):
            found = [_other_timesteps(grid, now)]
    if found:
        raise MaskError(
            f"the plan in {folder} was made for another scheduler:\n  " + "\n  ".join(found) + "\nPass the one of that plan, "
            "configured as it was, or leave it out if the denoiser is given the saved timesteps all the same"
        )


def _other_timesteps(saved: Sequence[float], now: Sequence[float]) -> str:
    return f"timesteps: saved {abbreviated(saved)}, now {abbreviated(now)}"


def _check_choice(name: str, given: str | None, choices: Sequence[str | None]) -> None:
    if given not in choices:
        raise InputError(f"{name}={given!r} is unknown; choose one of {list(choices)}")


def _listed(calls: Sampler | Sequence[Sampler]) -> list[Sampler]:
    trajectories: list[Sampler] = [calls] if isinstance(calls, Sampler) else list(calls) if isinstance(calls, Sequence) else []
    if not trajectories and isinstance(calls, Sequence):
        raise InputError("learning needs at least one recorded run; make it with fxmask.record or fxmask.record_pipeline")
    wrong = next((x for x in trajectories if not isinstance(x, Sampler)), None) if trajectories else calls
    if wrong is not None:
        raise InputError(
            f"learning needs recorded runs, got {type(wrong).__name__}; make them with fxmask.record(model, scheduler) or "
            "fxmask.record_pipeline(pipe, ...)"
        )
    return trajectories


def _expect(given: Any, kind: type[T], name: str, call: str) -> None:
    """Refuse an argument of another type, and name the call that was meant."""
    if is_a_pipeline(given):
        raise InputError(
            f"{name} must be a fxmask.{kind.__name__}, got {type(given).__name__}, a pipeline; call fxmask.accelerate(pipe), "
            "which records, learns and compiles"
        )
    if not isinstance(given, kind):
        raise InputError(f"{name} must be a fxmask.{kind.__name__}, got {type(given).__name__}; call {call}")
