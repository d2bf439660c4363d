"""Listening to one run of a pipeline: which component is the denoiser, what it was given, what it returned."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fxmask._torch import pytree
from fxmask.errors import InputError
from fxmask.ir.outputs import first_tensor
from fxmask.sampling.noise import NoiseTape
from fxmask.sampling.pipeline_arguments import CopyStore
from fxmask.sampling.twin import ComponentMethod, Module, unwatched


@dataclass
class HeardCall:
    """One call of a component.

    Attributes:
        entry: what was called.
        drawn: how many random tensors had been drawn before it.
        given: copies of (args, kwargs), if they are kept.
        output: a copy, ``None`` if there is none.
        drew: whether random numbers were drawn inside.
        lane: its name, where the pipeline says it.
    """

    entry: ComponentMethod
    drawn: int
    given: Any = None
    output: Any = None
    drew: bool = False
    lane: str | None = None


class PipelineListener:
    """Listens to one run of a pipeline.

    Args:
        tape: of all random draws.
        component: name of the denoiser; ``None``: the last component called before the first step. Where it is given, steps
            that wait for another denoiser are not its steps, and what is heard ends with the last of its own.
        model: runs in place of the denoiser.
        max_bytes: how much is kept at most; where it is more, all of it is dropped and nothing more is heard.

    Attributes:
        kept_bytes: how much is kept, or was when that became too much.
    """

    def __init__(
        self, tape: NoiseTape, component: str | None = None, model: Module | None = None, *, max_bytes: int | None = None
    ) -> None:
        self.max_bytes = max_bytes
        self.kept_bytes = 0
        self.lane: str | None = None
        self.tape = tape
        self.component = component
        self.model = model
        self.asked = component is not None
        self.seen: set[str] = set()
        self.prologue: list[HeardCall] = []
        self.steps: list[list[HeardCall]] = []
        self.scheduler: Any = None
        # The scheduler that steps first after the denoiser's first call; others follow it, e.g. for sound beside pictures.
        self.stepping: Any = None
        self.step_kwargs: dict[str, Any] = {}
        self.step_timesteps: list[Any] = []
        self.num_scheduler_steps = 0
        self.start: torch.Tensor | None = None  # the sample before the first step of all
        self.initial: torch.Tensor | None = None  # before the first step of the denoiser
        self.final: torch.Tensor | None = None
        self.end = 0  # random tensors drawn until the last step
        self._kept = CopyStore()
        self._output_bytes = 0
        self._before: list[HeardCall] = []
        self._pending: list[HeardCall] = []
        self._own = False  # whether the step under way is the denoiser's
        self._count = 0  # of scheduler steps, whosever

    @property
    def heard_all(self) -> bool:
        """Whether the steps are all that the schedulers took: no other denoiser made some of them, no step came after them."""
        first = self.start is not None and self.initial is not None and torch.equal(self.start, self.initial)
        return first and self._count == self.num_scheduler_steps

    def called(self, entry: ComponentMethod, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a component; keep what it was given and what it returned where that may be needed."""
        if self.is_too_much:
            return entry.original(*args, **kwargs)
        is_denoiser = entry.component == self.component and entry.method == "forward"
        keep = is_denoiser or not self.steps
        heard = HeardCall(entry, len(self.tape.tensors), lane=self.lane)
        if keep:
            heard.given = self._kept(f"{entry.component}.{entry.method}", (args, kwargs))
        run = self.model if is_denoiser and self.model is not None else entry.original
        if is_denoiser or not keep:  # networks that are called again and again: nothing is drawn in them
            with self.tape.aside() as drew:
                output = run(*args, **kwargs)
                heard.drew = drew()
        else:
            output = run(*args, **kwargs)
            heard.drew = len(self.tape.tensors) > heard.drawn
        if keep:
            with contextlib.suppress(Exception):  # what cannot be copied is computed again
                heard.output = copy.deepcopy(output)
            self.kept_bytes = self._kept.bytes + self._count_bytes(heard.output)
            if self.is_too_much:
                self._drop()
                return output
        self._pending.append(heard)
        if entry.method == "forward":
            self.seen.add(entry.component)
        return output

    @property
    def is_too_much(self) -> bool:
        """Whether more was to be kept than may be."""
        return self.max_bytes is not None and self.kept_bytes > self.max_bytes

    def _count_bytes(self, output: Any) -> int:
        """Bytes of what components have returned, this output included."""
        own = [x for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor)] if output is not None else []
        self._output_bytes += sum(x.numel() * x.element_size() for x in own)
        return self._output_bytes

    def _drop(self) -> None:
        self.prologue, self.steps, self._before, self._pending = [], [], [], []
        self._kept = CopyStore()
        self.tape.tensors.clear()

    def stepped(self, scheduler: Any, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a scheduler's step; what was called since the last one belongs to it."""
        if self.is_too_much:
            return step(*args, **kwargs)
        names = [heard.entry.component for heard in self._pending if heard.entry.method == "forward"]
        first, opening = self.stepping is None, not self.steps
        if first:
            self._begin(scheduler, names)
        if first or names:
            self._own = self._close(names)
        opening = opening and self._own
        if opening and scheduler is not self.stepping:  # another sampling loop came before this one
            self._begin(scheduler, names)
        given = list(inspect.signature(step).bind(*args, **kwargs).arguments.items())
        if self._own and (opening or names):
            self.step_timesteps.append(given[1][1] if len(given) > 1 else None)
        before = [x.detach().clone() for _, x in given[1:] if isinstance(x, torch.Tensor)] if first or opening else []
        result = step(*args, **kwargs)
        self._count += 1
        made = first_tensor(result).detach().clone()
        if first:
            self.start = _like(made, before)
        if self._own:
            self.num_scheduler_steps, self.end = self._count, len(self.tape.tensors)
            self.final = made if scheduler is self.stepping else self.final
        if opening:
            self.initial = _like(made, before)
            plain = {k: v for k, v in given[1:] if k in kwargs and isinstance(v, (bool, int, float, str))}
            self.step_kwargs = {k: v for k, v in plain.items() if k != "return_dict"}
        return result

    def _begin(self, scheduler: Any, names: Sequence[str]) -> None:
        self.stepping = scheduler
        self.scheduler = unwatched(scheduler)
        if self.component is None:
            self.component = names[-1] if names else None

    def _close(self, names: Sequence[str]) -> bool:
        """End a step: find the denoiser's calls in it. Whether there are any.

        Raises:
            InputError: another component would be the denoiser here, and none was asked for.
        """
        at = len(self.steps)
        pending, self._pending = self._pending, []
        if self.component is None:
            raise InputError(
                "scheduler.step was called before any module that is an attribute of the pipeline; the denoiser must be one"
            )
        calls = [h for h in pending if h.entry.component == self.component and h.entry.method == "forward"]
        if not self.asked and (not calls or names[-1] != self.component):
            other = names[-1] if names else "nothing"
            raise InputError(
                f"step {at} of the sampler waits for {other!r}, not for {self.component!r}, the denoiser of the steps before: "
                "this run uses more than one denoiser, and a mask is for one. fxmask.accelerate(pipe) accelerates both; or "
                f"record each one's steps by themselves, with record_pipeline(..., component={self.component!r}) and "
                f"component={other!r}"
            )
        if not self.steps:
            before = [*self._before, *(pending[: pending.index(calls[0])] if calls else pending)]
            self._before = [h for h in before if h.output is not None and not h.drew]
        if not calls:
            return False
        self.prologue = self._before
        if any(h.drew for h in calls):
            raise InputError(f"{self.component!r} draws random numbers when it is called; its values cannot be cached")
        if any(h.output is None for h in calls):
            raise InputError(
                f"the output of {self.component!r} cannot be copied; if the pipeline takes gradients of it, it cannot be "
                "accelerated"
            )
        self.steps.append(calls)
        return True


class PipelineListeners:
    """Several listeners to one run of a pipeline, each for a denoiser of its own.

    Args:
        listeners: these.
    """

    def __init__(self, listeners: Sequence[PipelineListener]) -> None:
        self._listeners = listeners

    @property
    def lane(self) -> str | None:
        """Name of the call that is made now."""
        return self._listeners[0].lane

    @lane.setter
    def lane(self, name: str | None) -> None:
        for listener in self._listeners:
            listener.lane = name

    def called(self, entry: ComponentMethod, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a component once; all hear of it."""
        for listener in self._listeners[1:]:
            entry = replace(entry, original=_told(listener, entry))
        return self._listeners[0].called(entry, args, kwargs)

    def stepped(self, scheduler: Any, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a scheduler's step once; all hear of it."""
        for listener in self._listeners[1:]:
            step = _stepping(listener, scheduler, step)
        return self._listeners[0].stepped(scheduler, step, args, kwargs)


def _told(listener: PipelineListener, entry: ComponentMethod) -> Callable[..., Any]:
    return lambda *args, **kwargs: listener.called(entry, args, kwargs)


def _stepping(listener: PipelineListener, scheduler: Any, step: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return listener.stepped(scheduler, step, args, kwargs)

    run.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]
    return run


def _like(made: torch.Tensor, given: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The sample among what a scheduler was given: it has the shape of what the scheduler made of it."""
    return next((x for x in given if x.shape == made.shape), None)


def check_one_denoiser(recorder: PipelineListener) -> None:
    """Raise ``InputError`` if no sampling loop was heard."""
    if not recorder.steps or recorder.initial is None:
        called = f"it called {sorted(recorder.seen)}" if recorder.seen else "it called none of its modules"
        what = "never called scheduler.step" if not recorder.steps else "gave scheduler.step no sample"
        if recorder.stepping is not None and not recorder.steps:
            raise InputError(f"component={recorder.component!r} is called in no step of the sampler; {called}")
        raise InputError(
            f"the pipeline {what} on a scheduler that it holds, so its sampling loop cannot be told apart ({called}). Record "
            "the denoiser with fxmask.record(model, scheduler, example_inputs=...)"
        )
