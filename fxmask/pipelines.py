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

import contextlib
import contextvars
import copy
import functools
import inspect
import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from fxmask.calls import Signature, first_tensor, flatten_output, leaf_name
from fxmask.errors import InputError, SchedulerError
from fxmask.runtime import AcceleratedModel
from fxmask.trajectory import _DRAWS, Call, Loop, NoiseTape, Trajectory

METHODS = ("forward", "encode")  # that are watched; an autoencoder is not called through its forward
EQUAL_COPIES = 4  # how many latest values of an argument are looked through for an equal one: two lanes, or a few more
PROPORTIONAL = 1e-2  # a start noise that was passed in, and the first sample made of it, agree up to a factor

Module = torch.nn.Module


# Twins: copies of a pipeline that report to a watcher


@dataclass(frozen=True)
class _Entry:
    """A method of a component: its original, bound to the component's copy."""

    component: str
    method: str
    module: Module
    original: Callable[..., Any]


class _Watcher(Protocol):
    """What a twin reports to, and what answers in its place."""

    def called(self, entry: _Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A component is called."""

    def stepped(self, scheduler: Any, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A scheduler is called."""


def _twin(pipe: Any, watcher: _Watcher | None, memo: dict[int, Any] | None = None, prefix: str = "") -> Any:
    """A copy of a pipeline that reports to ``watcher``; without one, a copy that keeps the schedulers' present state."""
    memo = {} if memo is None else memo
    twin = object.__new__(type(pipe))
    memo[id(pipe)] = twin
    twin.__dict__.update(pipe.__dict__)
    for name, value in pipe.__dict__.items():
        if id(value) not in memo:
            if isinstance(value, Module):
                memo[id(value)] = _plain(value) if watcher is None else _watched_module(value, prefix + name, watcher)
            elif _is_scheduler(value):
                memo[id(value)] = copy.deepcopy(value) if watcher is None else _watched_scheduler(value, watcher)
            elif _is_pipeline(value):
                _twin(value, watcher, memo, f"{prefix}{name}.")
            else:
                continue
        twin.__dict__[name] = memo[id(value)]
    return twin


def _is_scheduler(value: Any) -> bool:
    return callable(getattr(value, "step", None)) and (hasattr(value, "set_timesteps") or hasattr(value, "timesteps"))


def _is_pipeline(value: Any) -> bool:
    """Whether an attribute of a pipeline is another one, which holds its own components."""
    return callable(value) and hasattr(value, "__dict__") and any(map(_is_scheduler, vars(value).values()))


def _plain(module: Module) -> Module:
    return module.original if type(module) is AcceleratedModel else module


def _watched_module(module: Module, name: str, watcher: _Watcher) -> Module:
    module = _plain(module)
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_compiled_call_impl"] = None  # module.compile() would go past ``forward``
    for method in METHODS:
        original = getattr(twin, method, None)
        if callable(original):
            twin.__dict__[method] = _reporting(_Entry(name, method, module, original), watcher)
    return twin


def _reporting(entry: _Entry, watcher: _Watcher) -> Callable[..., Any]:
    @functools.wraps(entry.original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return watcher.called(entry, args, kwargs)

    return call


def _watched_scheduler(scheduler: Any, watcher: _Watcher) -> Any:
    """A copy of another class, not with another attribute: copies that the pipeline makes of it must step themselves."""
    cls = type(scheduler)

    @functools.wraps(cls.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        return watcher.stepped(self, functools.partial(cls.step, self), args, kwargs)

    twin = copy.deepcopy(scheduler)
    twin.__class__ = type(cls.__name__, (cls,), {"step": step, "__module__": cls.__module__, "__doc__": cls.__doc__})
    return twin


def _unwatched(scheduler: Any) -> Any:
    plain = copy.deepcopy(scheduler)
    plain.__class__ = type(scheduler).__mro__[1]
    return plain


# Recording


class _Kept:
    """Copies of arguments. A tensor equal to one of the latest under the same name is the same copy."""

    def __init__(self) -> None:
        self._latest: dict[str, list[torch.Tensor]] = {}

    def __call__(self, owner: str, tree: Any) -> Any:
        return pytree.tree_map_with_path(lambda path, leaf: self._leaf(f"{owner} {leaf_name(path)}", leaf), tree)

    def _leaf(self, name: str, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        latest = self._latest.get(name, [])
        for kept in latest:
            if _same_leaf(kept, leaf):
                return kept
        fresh = leaf.detach().clone()
        self._latest[name] = [fresh, *latest][:EQUAL_COPIES]
        return fresh


def _same_leaf(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    try:
        return type(a) is type(b) and bool(a == b)
    except Exception:  # arrays of another library, whose comparison has no single truth
        return False


def _same_tree(a: Any, b: Any) -> bool:
    (ours, spec), (theirs, other) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    return spec == other and all(map(_same_leaf, ours, theirs))


@dataclass
class _Heard:
    """One call of a component.

    Attributes:
        entry: what was called.
        drawn: how many random tensors had been drawn before it.
        given: copies of (args, kwargs), if they are kept.
        output: a copy, ``None`` if there is none.
        drew: whether random numbers were drawn inside.
    """

    entry: _Entry
    drawn: int
    given: Any = None
    output: Any = None
    drew: bool = False


@dataclass
class _Answer:
    """What the pipeline is given for a prediction: how it is put in its place, and the denoiser's other outputs."""

    rebuild: Callable[[Sequence[Any]], Any]
    rest: tuple[torch.Tensor, ...]


class _Recorder:
    """Listens to one run of a pipeline.

    Args:
        tape: of all random draws.
        component: name of the denoiser; ``None``: the last component called before the first step.
        model: runs in place of the denoiser.
    """

    def __init__(self, tape: NoiseTape, component: str | None = None, model: Module | None = None) -> None:
        self.tape = tape
        self.component = component
        self.model = model
        self.asked = component is not None
        self.seen: set[str] = set()
        self.prologue: list[_Heard] = []
        self.steps: list[list[_Heard]] = []
        self.scheduler: Any = None
        self.stepping: Any = None  # the scheduler that stepped first; others follow it, e.g. for sound beside pictures
        self.step_kwargs: dict[str, Any] = {}
        self.step_timesteps: list[Any] = []
        self.num_scheduler_steps = 0
        self.initial: torch.Tensor | None = None
        self.final: torch.Tensor | None = None
        self.end = 0  # random tensors drawn until the last step
        self._kept = _Kept()
        self._pending: list[_Heard] = []

    def called(self, entry: _Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a component; keep what it was given and what it returned where that may be needed."""
        is_denoiser = entry.component == self.component and entry.method == "forward"
        keep = self.stepping is None or is_denoiser
        heard = _Heard(entry, len(self.tape.tensors))
        if keep:
            heard.given = self._kept(f"{entry.component}.{entry.method}", (args, kwargs))
        run = self.model if is_denoiser and self.model is not None else entry.original
        output = run(*args, **kwargs)
        heard.drew = len(self.tape.tensors) > heard.drawn
        if keep:
            with contextlib.suppress(Exception):  # what cannot be copied is computed again
                heard.output = copy.deepcopy(output)
        self._pending.append(heard)
        if entry.method == "forward":
            self.seen.add(entry.component)
        return output

    def stepped(self, scheduler: Any, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a scheduler's step; what was called since the last one belongs to it."""
        names = [heard.entry.component for heard in self._pending if heard.entry.method == "forward"]
        first = self.stepping is None
        if first:
            self._begin(scheduler, names)
        if first or names:
            self._close(names)
        self._pending.clear()
        given = list(inspect.signature(step).bind(*args, **kwargs).arguments.items())
        if first or names:
            self.step_timesteps.append(given[1][1] if len(given) > 1 else None)
        before = [x.detach().clone() for _, x in given[1:] if isinstance(x, torch.Tensor)] if first else []
        result = step(*args, **kwargs)
        self.num_scheduler_steps += 1
        self.end = len(self.tape.tensors)
        if scheduler is self.stepping:
            self.final = first_tensor(result).detach().clone()
        if first:
            assert self.final is not None
            shape = self.final.shape
            self.initial = next((x for x in before if x.shape == shape), None)
            plain = {k: v for k, v in given[1:] if k in kwargs and isinstance(v, (bool, int, float, str))}
            self.step_kwargs = {k: v for k, v in plain.items() if k != "return_dict"}
        return result

    def _begin(self, scheduler: Any, names: Sequence[str]) -> None:
        self.stepping = scheduler
        self.scheduler = _unwatched(scheduler)
        if self.component is None:
            self.component = names[-1] if names else None

    def _close(self, names: Sequence[str]) -> None:
        """End a step: find the denoiser's calls in it.

        Raises:
            InputError: there are none, or another component would be the denoiser here.
        """
        at = len(self.steps)
        if self.component is None:
            raise InputError(
                "scheduler.step was called before any module that is an attribute of the pipeline; the denoiser must be one"
            )
        calls = [h for h in self._pending if h.entry.component == self.component and h.entry.method == "forward"]
        if not calls or (names[-1] != self.component and not self.asked):
            raise InputError(
                f"step {at} of the sampler waits for {names[-1] if names else 'nothing'!r}, not for {self.component!r}, the "
                "denoiser of the steps before or the one asked for: this run uses more than one denoiser, and a mask is for "
                "one. Record a run that uses only one of them throughout"
            )
        if not self.steps:
            before = self._pending[: self._pending.index(calls[0])]
            self.prologue = [h for h in before if h.output is not None and not h.drew]
        if any(h.drew for h in calls):
            raise InputError(f"{self.component!r} draws random numbers when it is called; its values cannot be cached")
        if any(h.output is None for h in calls):
            raise InputError(
                f"the output of {self.component!r} cannot be copied; if the pipeline takes gradients of it, it cannot be "
                "accelerated"
            )
        self.steps.append(calls)


def _check_one_denoiser(recorder: _Recorder) -> None:
    if not recorder.steps or recorder.initial is None:
        called = f"it called {sorted(recorder.seen)}" if recorder.seen else "it called none of its modules"
        what = "never called scheduler.step" if not recorder.steps else "gave scheduler.step no sample"
        raise InputError(
            f"the pipeline {what} on a scheduler that it holds, so its sampling loop cannot be told apart ({called}). Record "
            "the denoiser with fxmask.record(model, scheduler, example_inputs=...)"
        )


def record_pipeline(pipe: Any, *args: Any, component: str | None = None, **kwargs: Any) -> PipelineTrajectory:
    """Call a diffusers pipeline and keep every call of its denoiser; the trajectory can be learned from.

    The pipeline is not changed, except that a generator in its arguments moves on. An accelerated denoiser in it is taken
    for its original.

    Args:
        pipe: any object that holds modules and a scheduler as attributes and calls ``scheduler.step``.
        args: of the pipeline's call.
        component: name of the denoiser among the pipeline's attributes, where the last module called before each
            ``scheduler.step`` is not it.
        kwargs: of the pipeline's call.

    Returns:
        The trajectory of this call: ``fxmask.capture(t.denoiser, t.calls[0][0], t.roles)`` and then ``fxmask.learn``.

    Raises:
        InputError: the pipeline has no modules, never steps a scheduler, or uses two denoisers; names them.
    """
    names = [name for name, value in getattr(pipe, "__dict__", {}).items() if isinstance(value, Module)]
    holds = names or any(_is_pipeline(value) for value in getattr(pipe, "__dict__", {}).values())
    if not callable(pipe) or not holds:
        raise InputError(f"pipe must be a pipeline, which holds modules as attributes and is called; got {type(pipe).__name__}")
    if component is not None and component not in names and "." not in component:
        raise InputError(f"component={component!r} is no module of {type(pipe).__name__}; it has {names}")
    # A call made again starts from the same generators, and from tensors that nobody has changed since.
    again = _Arguments(_fresh(args), _fresh(kwargs))
    return _record(_twin(pipe, None), _Arguments(args, kwargs), again, NoiseTape(), component)


@dataclass(frozen=True)
class _Arguments:
    """Of one call of a pipeline."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def fresh(self) -> _Arguments:
        return _Arguments(_fresh(self.args), _fresh(self.kwargs))


def _fresh(tree: Any) -> Any:
    """Copies of tensors and generators, in the state that they are in."""

    def leaf(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.detach().clone()
        if isinstance(value, torch.Generator):
            twin = torch.Generator(value.device)
            twin.set_state(value.get_state())
            return twin
        return value

    return pytree.tree_map(leaf, tree)


@torch.no_grad()
def _record(
    pipe: Any, now: _Arguments, again: _Arguments, tape: NoiseTape, component: str | None, model: Module | None = None
) -> PipelineTrajectory:
    """Call a copy of ``pipe`` with the arguments ``now``; replays call it with ``again``."""
    recorder = _Recorder(tape, component, model)
    twin = _twin(pipe, recorder)
    if model is not None:
        _hide_progress(twin)
    with tape:
        twin(*now.args, **now.kwargs)
    _check_one_denoiser(recorder)
    assert recorder.component is not None
    assert recorder.initial is not None
    assert recorder.final is not None
    denoiser = model if model is not None else recorder.steps[0][0].entry.module
    signature = Signature.of(denoiser)
    calls = tuple(tuple(_arguments(signature, h) for h in step) for step in recorder.steps)
    outputs: list[tuple[torch.Tensor, ...]] = []
    answers: list[_Answer] = []
    builds: dict[Any, Callable[[Sequence[Any]], Any]] = {}
    for step in recorder.steps:
        flat = [flatten_output(heard.output) for heard in step]
        for (tensors, rebuild), heard in zip(flat, step, strict=True):
            if not tensors:
                first_tensor(heard.output)  # says what is wrong
            build = builds.setdefault((type(heard.output), len(tensors)), rebuild)
            answers.append(_Answer(build, tuple(tensors[1:])))
        outputs.append(tuple(tensors[0] for tensors, _ in flat))
    starts = [step[0].drawn for step in recorder.steps[1:]] + [recorder.end]
    ranges = zip([recorder.steps[0][0].drawn, *starts], starts, strict=False)
    prologue = tuple(_Played(h.entry.component, h.entry.method, h.given, h.output) for h in recorder.prologue)
    return PipelineTrajectory(
        calls=calls,
        outputs=tuple(outputs),
        timesteps=tuple(
            _timestep_value(step[0].get(signature.timestep) if signature.timestep else None, given)
            for step, given in zip(calls, recorder.step_timesteps, strict=True)
        ),
        initial_noise=recorder.initial,
        noises=tuple(tuple(tape.tensors[a:b]) for a, b in ranges),
        final=recorder.final,
        scheduler=recorder.scheduler,
        step_kwargs=recorder.step_kwargs,
        sample=signature.sample,
        denoiser=denoiser,
        component=recorder.component,
        roles=_roles(calls, signature),
        run=_Run(pipe, again, tuple(tape.tensors[: recorder.end]), prologue, tuple(answers), recorder.num_scheduler_steps),
    )


def _arguments(signature: Signature, heard: _Heard) -> dict[str, Any]:
    args, kwargs = heard.given
    return _by_name(signature.parameters, args, kwargs)


def _by_name(parameters: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of one call by parameter name, those that ``**kwargs`` takes among them."""
    named: dict[str, Any] = {}
    for name, value in parameters.bind(*args, **kwargs).arguments.items():
        kind = parameters.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            raise InputError(f"the denoiser takes *{name}, and the pipeline passes {len(value)} such arguments without names")
        named.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return named


def _timestep_value(timestep: Any, given: Any) -> float:
    """The timestep of a call; the scheduler's own where the denoiser takes none."""
    value = given if timestep is None else timestep
    if value is None:
        return float("nan")
    if not isinstance(value, torch.Tensor):
        return float(value)
    return float(value.max())  # parts of the sample that are given and not sampled are at 0


def _roles(calls: Sequence[Sequence[Call]], signature: Signature) -> dict[str, str]:
    """Which tensor arguments, besides sample and timestep, stay the same over the run, and which change."""
    roles: dict[str, str] = {}
    for step in calls:
        for lane, call in enumerate(step):
            first = calls[0][lane] if lane < len(calls[0]) else call
            for name, value in call.items():
                if name in (signature.sample, signature.timestep) or not _has_tensor(value):
                    continue
                same = name in first and _same_tree(first[name], value)
                roles[name] = "conditioning" if same and roles.get(name) != "step" else "step"
    return roles


def _has_tensor(tree: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(tree))


def _hide_progress(pipe: Any) -> None:
    for part in (pipe, *filter(_is_pipeline, vars(pipe).values())):
        shown = vars(part).get("_progress_bar_config")
        part.__dict__["_progress_bar_config"] = {**(shown if isinstance(shown, dict) else {}), "disable": True}


# Replaying


@dataclass(frozen=True)
class _Played:
    """A call of another component before the first denoiser call, e.g. of a text encoder, and what it returned."""

    component: str
    method: str
    given: Any
    output: Any


@dataclass(frozen=True)
class _Run:
    """How a recorded call of a pipeline is made again."""

    pipe: Any
    arguments: _Arguments
    draws: tuple[torch.Tensor, ...]
    prologue: tuple[_Played, ...]
    answers: tuple[_Answer, ...]
    num_scheduler_steps: int


class _Finished(BaseException):
    """Ends a pipeline right after its last scheduler step: nothing is decoded."""


class _Closed(BaseException):
    """Ends a pipeline whose predictions nobody will send any more."""


class _Replay:
    """A recorded pipeline call, running again in a thread of its own, in strict alternation with whoever holds this.

    A thread, because the pipeline must stop in the middle of each denoiser call; of its own, because grad mode, autocast and
    the tape of random draws are settings of a thread.
    """

    def __init__(self, trajectory: PipelineTrajectory) -> None:
        self._trajectory = trajectory
        self._run = trajectory.run
        self._signature = Signature.of(trajectory.denoiser)
        self._played: dict[tuple[str, str], deque[_Played]] = {}
        for played in self._run.prologue:
            self._played.setdefault((played.component, played.method), deque()).append(played)
        self._calls = self._steps = 0
        self._stepping: Any = None
        self._final: torch.Tensor | None = None
        self._closed = False
        self._out: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._in: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    # In the caller's thread

    def start(self) -> dict[str, Any] | torch.Tensor:
        """Begin; the first denoiser call."""
        enter = _settings_here(self._trajectory.initial_noise.device)
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._work, enter), name="fxmask replay", daemon=True)
        self._thread.start()
        return self._receive()

    def answer(self, prediction: torch.Tensor) -> dict[str, Any] | torch.Tensor:
        """Go on with a prediction; the next denoiser call, or the final samples."""
        self._in.put(prediction)
        return self._receive()

    def close(self) -> None:
        """End the thread, wherever it is."""
        self._closed = True
        if self._thread is not None:
            self._in.put(None)
            self._thread.join()

    def _receive(self) -> dict[str, Any] | torch.Tensor:
        message: dict[str, Any] | torch.Tensor | BaseException = self._out.get()
        if isinstance(message, BaseException):
            raise message
        return message

    # In the pipeline's thread

    def _work(self, enter: Callable[[], contextlib.ExitStack]) -> None:
        try:
            with enter(), NoiseTape(self._run.draws):
                pipe = _twin(self._run.pipe, self)
                _hide_progress(pipe)
                fresh = self._run.arguments.fresh()
                pipe(*fresh.args, **fresh.kwargs)
            raise SchedulerError(
                f"the pipeline ended after {self._steps} of {self._run.num_scheduler_steps} scheduler steps; it does not do "
                "the same when it is called again"
            )
        except _Finished:
            self._out.put(self._final)
        except _Closed:
            pass
        except BaseException as error:  # raised again in the caller's thread
            self._out.put(error)

    def called(self, entry: _Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hand a denoiser call out; play back what was computed before the first one; run the rest."""
        if self._closed:
            raise _Closed
        if entry.component != self._trajectory.component or entry.method != "forward":
            waiting = self._played.get((entry.component, entry.method))
            played = waiting.popleft() if waiting and not self._calls else None
            if played is not None and _same_tree(played.given, (args, kwargs)):
                return copy.deepcopy(played.output)
            return entry.original(*args, **kwargs)
        if self._calls >= len(self._run.answers):
            raise SchedulerError(f"the pipeline calls {entry.component!r} more often than when it was recorded")
        answer = self._run.answers[self._calls]
        self._calls += 1
        self._out.put(self._own(_by_name(self._signature.parameters, args, kwargs)))
        prediction = self._in.get()
        if prediction is None:
            raise _Closed
        return answer.rebuild([prediction.detach().clone(), *(x.clone() for x in answer.rest)])

    def _own(self, call: dict[str, Any]) -> dict[str, Any]:
        """The call with copies of what the pipeline may change later. Conditioning stays the same tensors."""
        changing = {self._signature.sample, *(n for n, role in self._trajectory.roles.items() if role == "step")}
        clone = functools.partial(pytree.tree_map_only, torch.Tensor, torch.clone)
        return {name: clone(value) if name in changing else value for name, value in call.items()}

    def stepped(self, scheduler: Any, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Step; after the last step, end the pipeline."""
        if self._closed:
            raise _Closed
        self._stepping = scheduler if self._stepping is None else self._stepping
        result = step(*args, **kwargs)
        if scheduler is self._stepping:
            self._final = first_tensor(result)
        self._steps += 1
        if self._steps < self._run.num_scheduler_steps:
            return result
        if self._calls != len(self._run.answers):
            raise SchedulerError(
                f"the pipeline called {self._trajectory.component!r} {self._calls} times, and {len(self._run.answers)} times "
                "when it was recorded; it does not do the same when it is called again"
            )
        raise _Finished


def _settings_here(device: torch.device) -> Callable[[], contextlib.ExitStack]:
    """This thread's settings of torch, to be entered in another thread; gradients off."""
    inference, default = torch.is_inference_mode_enabled(), torch.get_default_device()
    autocast, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def enter() -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.no_grad())
        if default.type != "cpu":
            stack.enter_context(default)
        if autocast:
            stack.enter_context(torch.autocast(device.type, dtype))
        if stream is not None:
            stack.enter_context(torch.cuda.stream(stream))
        return stack

    return enter


class _FreshNoise(NoiseTape):
    """Gives every random draw other values, whatever generator it would have come from, and records them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seeds = torch.Generator().manual_seed(seed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _DRAWS:
            return func(*args, **(kwargs or {}))
        own = {name: value for name, value in (kwargs or {}).items() if name != "generator"}
        seed = int(torch.randint(2**62, (), generator=self._seeds))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return super().__torch_function__(func, types, args, own)

    def start(self, given: torch.Tensor) -> torch.Tensor:
        """Noise in place of a start noise that was passed in."""
        return torch.randn(given.shape, generator=self._seeds).to(given)


@dataclass(frozen=True, eq=False)
class PipelineTrajectory(Trajectory):
    """One recorded call of a pipeline.

    ``loop`` and ``rollout`` run the pipeline again, from its arguments to its last scheduler step, with the same random
    draws. What other components computed before the first denoiser call is played back; later calls of them (ControlNets)
    are made again. Of a denoiser with several outputs the first one is replayed and the others are the recorded ones.
    Callbacks in the arguments are called in every replay.

    Attributes:
        denoiser: the module that is called at every step.
        component: name of the pipeline's attribute that holds it.
        roles: for ``fxmask.capture``: tensor arguments that are the same at all steps (``"conditioning"``), and those that
            are not (``"step"``), e.g. residuals of a ControlNet.
        run: how the call is made again.
    """

    denoiser: torch.nn.Module = field(repr=False)
    component: str
    roles: Mapping[str, str]
    run: _Run = field(repr=False)

    @property
    def can_change_steps(self) -> bool:
        """False: the pipeline sets its own steps."""
        return False

    def with_steps(self, model: torch.nn.Module, num_inference_steps: int) -> Trajectory:
        """Not possible.

        Raises:
            InputError: always.
        """
        raise InputError(
            "a recorded pipeline call keeps its steps; call fxmask.record_pipeline again with "
            f"num_inference_steps={num_inference_steps}"
        )

    def renoised(self, model: torch.nn.Module, seed: int) -> PipelineTrajectory:
        """The same call with other noise in every random draw, and in place of a start noise that was passed in.

        Raises:
            InputError: nothing random is in it.
        """
        tape = _FreshNoise(seed)

        def leaf(value: Any) -> Any:
            return tape.start(value) if isinstance(value, torch.Tensor) and self._started_from(value) else value

        fresh = self.run.arguments.fresh()
        other = _Arguments(pytree.tree_map(leaf, fresh.args), pytree.tree_map(leaf, fresh.kwargs))
        recorded = _record(self.run.pipe, other.fresh(), other, tape, self.component, model)
        if torch.equal(recorded.initial_noise, self.initial_noise) and not recorded.stochastic:
            raise InputError(
                "this pipeline call draws no noise, so that there is no other sample to compare with; record several calls "
                "(with other generators, or other latents) and pass all of them to fxmask.learn"
            )
        return recorded

    def _started_from(self, given: torch.Tensor) -> bool:
        """Whether the first sample is this argument, up to a factor."""
        if given.shape != self.initial_noise.shape or not given.is_floating_point():
            return False
        a, b = self.initial_noise.double().flatten(), given.to(self.initial_noise.device).double().flatten()
        if not bool(b.any()):
            return False
        return bool((a - b * (a @ b) / (b @ b)).norm() <= PROPORTIONAL * a.norm())

    def loop(self) -> Loop:
        """The pipeline as a generator: yields the denoiser's calls, in order, and is sent the prediction of each.

        Closing it early ends the pipeline; an exception inside the pipeline is raised here.
        """
        replay = _Replay(self)
        try:
            handed = replay.start()
            while isinstance(handed, dict):
                prediction = yield handed
                handed = replay.answer(prediction)
            return handed
        finally:
            replay.close()
