"""A recorded pipeline call, running again with other predictions."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxmask._torch import pytree
from fxmask.errors import SchedulerError
from fxmask.ir.calls import Signature
from fxmask.ir.outputs import first_tensor
from fxmask.sampling.noise import NoiseTape
from fxmask.sampling.pipeline_arguments import PipelineArguments, arguments_by_name, same_tree
from fxmask.sampling.twin import ComponentMethod, hide_progress, make_twin


@dataclass
class Answer:
    """What the pipeline is given for a prediction: how it is put in its place, and the denoiser's other outputs."""

    rebuild: Callable[[Sequence[Any]], Any]
    rest: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class PlayedCall:
    """A call of another component before the first denoiser call, e.g. of a text encoder, and what it returned."""

    component: str
    method: str
    given: Any
    output: Any


@dataclass(frozen=True)
class RecordedRun:
    """How a recorded call of a pipeline is made again, until the last step of its denoiser.

    Attributes:
        pipe: a copy of the pipeline.
        arguments: of the call.
        draws: every random tensor.
        prologue: what other components returned before the first denoiser call.
        answers: how each prediction is put in place.
        num_scheduler_steps: until the last step of the denoiser.
        start: the sample before the first step of all; another denoiser's, perhaps.
        whole: whether these are all steps of the call.
        clean_up: what the pipeline would have done at its end.
    """

    pipe: Any
    arguments: PipelineArguments
    draws: tuple[torch.Tensor, ...]
    prologue: tuple[PlayedCall, ...]
    answers: tuple[Answer, ...]
    num_scheduler_steps: int
    start: torch.Tensor | None = None
    whole: bool = True
    clean_up: Callable[[], None] = lambda: None


class _Finished(BaseException):
    """Ends a pipeline right after its last scheduler step: nothing is decoded."""


class _Closed(BaseException):
    """Ends a pipeline whose predictions nobody will send any more."""


class PipelineReplay:
    """A recorded pipeline call, running again in a thread of its own, in strict alternation with whoever holds this.

    If it is ``idle``, nobody reads the denoiser's calls: what other components (ControlNets) make for them is made once only.

    A thread, because the pipeline must stop in the middle of each denoiser call; of its own, because grad mode, autocast and
    the tape of random draws are settings of a thread.
    """

    def __init__(
        self,
        run: RecordedRun,
        denoiser: torch.nn.Module,
        component: str,
        roles: Mapping[str, str],
        device: torch.device,
        idle: bool = False,
    ) -> None:
        self._run = run
        self._component = component
        self._device = device
        self._signature = Signature.of(denoiser)
        self._changing = {self._signature.sample, *(name for name, role in roles.items() if role == "step")}
        self._played: dict[tuple[str, str], deque[PlayedCall]] = {}
        for played in self._run.prologue:
            self._played.setdefault((played.component, played.method), deque()).append(played)
        self._idle: dict[tuple[str, str], Any] | None = {} if idle else None
        self._calls = self._steps = 0
        self._stepping: Any = None
        self._final: torch.Tensor | None = None
        self._closed = False
        self.lane: str | None = None
        self._out: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._in: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    # In the caller's thread

    def start(self) -> dict[str, Any] | torch.Tensor:
        """Begin; the first denoiser call."""
        enter = _settings_here(self._device)
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
                pipe = make_twin(self._run.pipe, self)
                hide_progress(pipe)
                fresh = self._run.arguments.fresh()
                pipe(*fresh.args, **fresh.kwargs)
            raise SchedulerError(
                f"the pipeline ended after {self._steps} of {self._run.num_scheduler_steps} scheduler steps; it does not do "
                "the same when it is called again"
            )
        except _Finished:
            self._run.clean_up()
            self._out.put(self._final)
        except _Closed:
            self._run.clean_up()
        except BaseException as error:  # raised again in the caller's thread
            self._run.clean_up()
            self._out.put(error)

    def called(self, entry: ComponentMethod, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hand a denoiser call out; play back what was computed before the first one; run the rest."""
        if self._closed:
            raise _Closed
        if entry.component != self._component or entry.method != "forward":
            waiting = self._played.get((entry.component, entry.method))
            played = waiting.popleft() if waiting and not self._calls else None
            if played is not None and same_tree(played.given, (args, kwargs)):
                return copy.deepcopy(played.output)
            return self._beside(entry, args, kwargs)
        if self._calls >= len(self._run.answers):
            raise SchedulerError(f"the pipeline calls {entry.component!r} more often than when it was recorded")
        answer = self._run.answers[self._calls]
        self._calls += 1
        self._out.put(self._own(arguments_by_name(self._signature.parameters, args, kwargs)))
        prediction = self._in.get()
        if prediction is None:
            raise _Closed
        return answer.rebuild([prediction.detach().clone(), *(x.clone() for x in answer.rest)])

    def _beside(self, entry: ComponentMethod, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run another component; in an idle replay once, and then what it returned stands for what it would return."""
        if self._idle is None or not self._calls:
            return entry.original(*args, **kwargs)
        key = entry.component, entry.method
        if key not in self._idle:
            self._idle[key] = entry.original(*args, **kwargs)
        return copy.deepcopy(self._idle[key])

    def _own(self, call: dict[str, Any]) -> dict[str, Any]:
        """The call with copies of what the pipeline may change later. Conditioning stays the same tensors."""
        clone = functools.partial(pytree.tree_map_only, torch.Tensor, torch.clone)
        return {name: clone(value) if name in self._changing else value for name, value in call.items()}

    def stepped(self, scheduler: Any, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Step; after the last step, end the pipeline."""
        if self._closed:
            raise _Closed
        if self._stepping is None and self._calls:
            self._stepping = scheduler
        result = step(*args, **kwargs)
        if scheduler is self._stepping:
            self._final = first_tensor(result)
        self._steps += 1
        if self._steps < self._run.num_scheduler_steps:
            return result
        if self._calls != len(self._run.answers):
            raise SchedulerError(
                f"the pipeline called {self._component!r} {self._calls} times, and {len(self._run.answers)} times "
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
