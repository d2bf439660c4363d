"""Recording one call of a real pipeline, and replaying it with other denoisers.

    pipe, arguments --twin--> component calls, scheduler steps, random draws --> PipelineTrajectory
    PipelineTrajectory.loop(): the same call in a thread of its own, which hands every denoiser call out

Nothing here knows any pipeline. A pipeline is an object that holds modules and a scheduler; its denoiser is the module
whose output every ``scheduler.step`` waits for. What runs is never the pipeline itself but a *twin*: a shallow copy with
copied schedulers and with shallow copies of the modules (which share weights and submodules) whose ``forward`` reports to a
watcher. So there is nothing to undo, the user's pipeline may be changed or used meanwhile, and any number of replays can
run in lockstep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxmask._torch import pytree
from fxmask.errors import FxmaskError, InputError
from fxmask.ir.calls import Signature
from fxmask.ir.outputs import first_tensor, flatten_output
from fxmask.sampling.finite import refuse_not_finite
from fxmask.sampling.noise import FreshNoise, NoiseTape
from fxmask.sampling.pipeline_arguments import PipelineArguments, arguments_by_name, fresh_copies, same_tree
from fxmask.sampling.pipeline_listener import HeardCall, PipelineListener, PipelineListeners, check_one_denoiser
from fxmask.sampling.pipeline_replay import Answer, PipelineReplay, PlayedCall, RecordedRun
from fxmask.sampling.processors import processors_kept
from fxmask.sampling.recording import Recording
from fxmask.sampling.sampler import Call, Loop
from fxmask.sampling.twin import Module, hide_progress, is_pipeline, is_scheduler, make_twin

INTERRUPTED = "the call was interrupted"
PROPORTIONAL = 1e-2  # a start noise that was passed in, and the first sample made of it, agree up to a factor


@dataclass(frozen=True, eq=False, repr=False)
class PipelineTrajectory(Recording):
    """One recorded call of a pipeline.

    ``loop`` and ``rollout`` run the pipeline again, from its arguments to the last step of the denoiser, with the same random
    draws. What other components computed before the first denoiser call is played back; later calls of them (ControlNets)
    are made again. Of a denoiser with several outputs the first one is replayed and the others are the recorded ones.
    Callbacks in the arguments are called in every replay.

    Attributes:
        scheduler: a copy of the scheduler that stepped, set up and not yet stepped.
        step_kwargs: plain arguments of its ``step``.
        denoiser: the module that is called at every step.
        component: name of the pipeline's attribute that holds it.
        roles: for ``fxmask.capture``: tensor arguments that are the same at all steps (``"conditioning"``), and those that
            are not (``"step"``), e.g. residuals of a ControlNet.
        run: how the call is made again.
        lanes: per step the name of every call, ``None`` where the pipeline does not say it.
    """

    scheduler: Any
    step_kwargs: Mapping[str, Any]
    denoiser: torch.nn.Module
    component: str
    roles: Mapping[str, str]
    run: RecordedRun
    lanes: tuple[tuple[str | None, ...], ...] = ()

    def renoised(self, model: torch.nn.Module, seed: int) -> PipelineTrajectory:
        """The same call with other noise in every random draw, and in place of a start noise that was passed in.

        Raises:
            InputError: nothing random is in it.
        """
        tape = FreshNoise(seed)

        def leaf(value: Any) -> Any:
            return tape.start(value) if isinstance(value, torch.Tensor) and self._started_from(value) else value

        fresh = self.run.arguments.fresh()
        other = PipelineArguments(pytree.tree_map(leaf, fresh.args), pytree.tree_map(leaf, fresh.kwargs))
        recorded = _record(self.run.pipe, other.fresh(), other, tape, self.component, model)
        if torch.equal(recorded.initial_noise, self.initial_noise) and not recorded.stochastic:
            raise InputError(
                "this pipeline call draws no noise, so that there is no other sample to compare with; record several calls "
                "(with other generators, or other latents) and pass all of them to fxmask.learn"
            )
        return recorded

    @property
    def can_change_steps(self) -> bool:
        """Whether ``with_steps`` works: the call says how many steps, all of this denoiser, and draws no noise in them."""
        return self.run.whole and not self.stochastic and self.run.arguments.steps(self.run.pipe) is not None

    def with_steps(self, model: torch.nn.Module, num_inference_steps: int) -> PipelineTrajectory:
        """The same call, from the same noise, with about so many denoiser calls.

        Where the recorded call made more or fewer of them than it was asked for (solvers of second order, image to image), the
        number that is asked for is in proportion.

        Raises:
            InputError: the call does not say how many steps, shares them with another denoiser, or draws noise in them.
        """
        given = self.run.arguments.steps(self.run.pipe)
        if given is None or not self.can_change_steps:
            raise InputError(
                f"this call of {type(self.run.pipe).__name__} cannot be made with another number of steps; it must take "
                "num_inference_steps, use one denoiser, and draw no noise between steps"
            )
        asked = max(1, round(num_inference_steps * given / self.num_steps))
        other = self.run.arguments.fresh().with_steps(self.run.pipe, asked)
        return _record(self.run.pipe, other.fresh(), other, NoiseTape(self.run.draws), self.component, model)

    def _started_from(self, given: torch.Tensor) -> bool:
        """Whether the first sample is this argument, up to a factor."""
        start = self.initial_noise if self.run.start is None else self.run.start
        if given.shape != start.shape or not given.is_floating_point():
            return False
        a, b = start.double().flatten(), given.to(start.device).double().flatten()
        if not bool(b.any()):
            return False
        return bool((a - b * (a @ b) / (b @ b)).norm() <= PROPORTIONAL * a.norm())

    def loop(self) -> Loop:
        """The pipeline as a generator: yields the denoiser's calls, in order, and is sent the prediction of each.

        Closing it early ends the pipeline; an exception inside the pipeline is raised here.
        """
        return self._loop(idle=False)

    def idle_loop(self) -> Loop:
        """The same for whoever sends predictions without reading the calls; ControlNets and their like do not run for each."""
        return self._loop(idle=True)

    def _loop(self, idle: bool) -> Loop:
        replay = PipelineReplay(self.run, self.denoiser, self.component, self.roles, self.initial_noise.device, idle)
        try:
            handed = replay.start()
            while isinstance(handed, dict):
                prediction = yield handed
                handed = replay.answer(prediction)
            return handed
        finally:
            replay.close()


def record_pipeline(pipe: Any, *args: Any, component: str | None = None, **kwargs: Any) -> PipelineTrajectory:
    """Call a diffusers pipeline and keep every call of its denoiser; the trajectory can be learned from.

    The pipeline is not changed, except that a generator in its arguments moves on. An accelerated denoiser in it is taken
    for its original.

    Args:
        pipe: any object that holds modules and a scheduler as attributes and calls ``scheduler.step``.
        args: of the pipeline's call.
        component: name of the denoiser among the pipeline's attributes, where the last module called before each
            ``scheduler.step`` is not it. Of a pipeline that uses several denoisers one after the other, the trajectory is that
            part of the run in which this one is called: from the sample that it is handed to the one that it hands on.
        kwargs: of the pipeline's call.

    Returns:
        The trajectory of this call: ``fxmask.capture(t.denoiser, t.calls[0][0], roles=t.roles)`` and then ``fxmask.learn``.

    Raises:
        InputError: the pipeline has no modules, never steps a scheduler, or uses two denoisers and none of them was asked
            for; names them.
    """
    names = [name for name, value in getattr(pipe, "__dict__", {}).items() if isinstance(value, Module)]
    holds = names or any(is_pipeline(value) for value in getattr(pipe, "__dict__", {}).values())
    if not callable(pipe) or not holds:
        raise InputError(f"pipe must be a pipeline, which holds modules as attributes and is called; got {type(pipe).__name__}")
    if component is not None and component not in names and "." not in component:
        raise InputError(f"component={component!r} is no module of {type(pipe).__name__}; it has {names}")
    # A call made again starts from the same generators, and from tensors that nobody has changed since.
    again = PipelineArguments(fresh_copies(args), fresh_copies(kwargs))
    return _record(make_twin(pipe, None), PipelineArguments(args, kwargs), again, NoiseTape(), component)


def call_and_record(
    pipe: Any, args: Sequence[Any], kwargs: Mapping[str, Any], *, components: Sequence[str | None], max_bytes: int
) -> tuple[Any, list[PipelineTrajectory | str | None]]:
    """Call a pipeline for what it makes, and keep the calls of its denoisers by the way.

    Args:
        pipe: as for ``record_pipeline``; a copy of it runs, with the same parts.
        args: of its call.
        kwargs: of its call.
        components: names of the denoisers; ``None`` for one whose name is not known.
        max_bytes: what the recording of each may hold.

    Returns:
        What the pipeline returns, and of each denoiser the trajectory, or why there is none; ``None`` if it had no step.

    Raises:
        FxmaskError: the call was refused in the middle.
    """
    again = PipelineArguments(fresh_copies(tuple(args)), fresh_copies(dict(kwargs)))
    tape, clean_up = NoiseTape(), processors_kept(pipe)
    recorders = [PipelineListener(tape, component, max_bytes=max_bytes) for component in components]
    twin = make_twin(pipe, recorders[0] if len(recorders) == 1 else PipelineListeners(recorders))
    with tape:
        result = twin(*args, **kwargs)
    _hand_back(pipe, twin)
    if getattr(twin, "_interrupt", False) is True:
        return result, [INTERRUPTED] * len(recorders)
    if any(recorder.is_too_much for recorder in recorders):
        reason = (
            f"a recording of it takes more than {max_bytes / 2**20:.0f} MiB; pass a larger max_learning_bytes to accelerate()"
        )
        return result, [reason] * len(recorders)
    unused = [bool(recorder.stepping is not None and not recorder.steps) for recorder in recorders]
    some = not all(unused)
    found: list[PipelineTrajectory | str | None] = []
    for recorder, idle in zip(recorders, unused, strict=True):
        try:
            found.append(None if idle and some else _recorded(recorder, make_twin(pipe, None), again, None, clean_up))
        except FxmaskError as error:
            found.append(str(error))
    return result, found


def _hand_back(pipe: Any, twin: Any) -> None:
    """Put what a call left in the copy of a pipeline into the pipeline: how many steps it had, what guidance."""
    for name, value in vars(twin).items():
        before = vars(pipe).get(name)
        if value is before or isinstance(before, Module) or is_scheduler(before) or is_pipeline(before):
            continue
        if not isinstance(value, Module) and not is_scheduler(value):
            pipe.__dict__[name] = value


@torch.no_grad()
def _record(
    pipe: Any,
    now: PipelineArguments,
    again: PipelineArguments,
    tape: NoiseTape,
    component: str | None,
    model: Module | None = None,
) -> PipelineTrajectory:
    """Call a copy of ``pipe`` with the arguments ``now``; replays call it with ``again``."""
    recorder, clean_up = PipelineListener(tape, component, model), processors_kept(pipe)
    twin = make_twin(pipe, recorder)
    if model is not None:
        hide_progress(twin)
    with tape:
        twin(*now.args, **now.kwargs)
    return _recorded(recorder, pipe, again, model, clean_up)


@torch.no_grad()
def _recorded(
    recorder: PipelineListener, pipe: Any, again: PipelineArguments, model: Module | None, clean_up: Callable[[], None]
) -> PipelineTrajectory:
    """What was heard of a run, as a trajectory; replays call ``pipe`` with the arguments ``again``."""
    tape = recorder.tape
    check_one_denoiser(recorder)
    assert recorder.component is not None
    assert recorder.initial is not None
    assert recorder.final is not None
    denoiser = model if model is not None else recorder.steps[0][0].entry.module
    signature = Signature.of(denoiser)
    calls = tuple(tuple(_arguments(signature, h) for h in step) for step in recorder.steps)
    names = tuple(tuple(h.lane for h in step) for step in recorder.steps)
    outputs: list[tuple[torch.Tensor, ...]] = []
    answers: list[Answer] = []
    builds: dict[Any, Callable[[Sequence[Any]], Any]] = {}
    for step in recorder.steps:
        flat = [flatten_output(heard.output) for heard in step]
        for (tensors, rebuild), heard in zip(flat, step, strict=True):
            if not tensors:
                first_tensor(heard.output)  # says what is wrong
            build = builds.setdefault((type(heard.output), len(tensors)), rebuild)
            answers.append(Answer(build, tuple(tensors[1:])))
        outputs.append(tuple(tensors[0] for tensors, _ in flat))
    starts = [step[0].drawn for step in recorder.steps[1:]] + [recorder.end]
    ranges = zip([recorder.steps[0][0].drawn, *starts], starts, strict=False)
    prologue = tuple(PlayedCall(h.entry.component, h.entry.method, h.given, h.output) for h in recorder.prologue)
    timesteps = tuple(
        _timestep_value(step[0].get(signature.timestep) if signature.timestep else None, given)
        for step, given in zip(calls, recorder.step_timesteps, strict=True)
    )
    refuse_not_finite(denoiser, calls, outputs, timesteps)
    return PipelineTrajectory(
        calls=calls,
        outputs=tuple(outputs),
        timesteps=timesteps,
        initial_noise=recorder.initial,
        noises=tuple(tuple(tape.tensors[a:b]) for a, b in ranges),
        final=recorder.final,
        scheduler=recorder.scheduler,
        step_kwargs=recorder.step_kwargs,
        sample=signature.sample,
        denoiser=denoiser,
        component=recorder.component,
        roles=_roles(calls, signature, names),
        lanes=names,
        run=RecordedRun(
            pipe,
            again,
            tuple(tape.tensors[: recorder.end]),
            prologue,
            tuple(answers),
            recorder.num_scheduler_steps,
            recorder.start,
            recorder.heard_all,
            clean_up,
        ),
    )


def _arguments(signature: Signature, heard: HeardCall) -> dict[str, Any]:
    args, kwargs = heard.given
    return arguments_by_name(signature.parameters, args, kwargs)


def _timestep_value(timestep: Any, given: Any) -> float:
    """The timestep of a call; the scheduler's own where the denoiser takes none."""
    value = given if timestep is None else timestep
    if value is None:
        return float("nan")
    if not isinstance(value, torch.Tensor):
        return float(value)
    return float(value.max())  # parts of the sample that are given and not sampled are at 0


def _roles(calls: Sequence[Sequence[Call]], signature: Signature, names: Sequence[Sequence[str | None]]) -> dict[str, str]:
    """Which tensor arguments, besides sample and timestep, stay the same over the run, and which change.

    Guidance that starts or stops midway changes how many calls a step makes, or the rows of each: an argument is compared with
    what the lane was first given in that form.
    """
    roles: dict[str, str] = {}
    first: dict[Any, Any] = {}
    for step, lanes in zip(calls, names, strict=True):
        for lane, (call, named) in enumerate(zip(step, lanes, strict=True)):
            given = call.get(signature.sample)
            rows = given.shape[0] if isinstance(given, torch.Tensor) and given.dim() else None
            for name, value in call.items():
                if name in (signature.sample, signature.timestep) or not _has_tensor(value):
                    continue
                same = same_tree(first.setdefault((name, named or lane, len(step), rows), value), value)
                roles[name] = "conditioning" if same and roles.get(name) != "step" else "step"
    return roles


def _has_tensor(tree: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(tree))
