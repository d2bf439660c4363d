"""Which marked generation, and which lane in it, a call belongs to.

The innermost one of the calling context; but generators share the context of whoever advances them, so that of two that are
advanced in turn, each inside a generation of its own, neither is simply the inner one. There a call belongs to the generation
whose generator is running.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, Generic, TypeVar

G = TypeVar("G")
PAUSING = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


@dataclass(frozen=True)
class _Mark(Generic[G]):
    generation: G
    owner: FrameType | None  # the generator or coroutine that entered it; None: a function, which runs until it leaves it


class Marks(Generic[G]):
    """The generations that are marked in a context, the innermost last."""

    def __init__(self) -> None:
        self._stack: contextvars.ContextVar[tuple[_Mark[G], ...]] = contextvars.ContextVar("fxmask_generations", default=())

    def enter(self, generation: G) -> None:
        """Mark a generation; called by its ``__enter__``."""
        mark = _Mark(generation, _pausing_owner(sys._getframe(2)))
        self._stack.set((*self._stack.get(), mark))

    def leave(self, generation: G) -> None:
        """Take the latest mark of a generation away, whichever others were entered meanwhile."""
        stack = self._stack.get()
        for k in range(len(stack) - 1, -1, -1):
            if stack[k].generation is generation:
                self._stack.set((*stack[:k], *stack[k + 1 :]))
                return

    def current(self) -> G | None:
        """The generation that a call belongs to; ``None`` if none is marked."""
        stack = self._stack.get()
        if len(stack) < 2:
            return stack[0].generation if stack else None
        running = set(_frames(sys._getframe(1)))
        chosen = next((mark for mark in reversed(stack) if mark.owner is None or mark.owner in running), stack[-1])
        return chosen.generation


class LaneName:
    """The name of the lane whose call is made in a context; ``None`` where nobody says it.

    diffusers' pipelines do: ``with transformer.cache_context("cond"): ...``.
    """

    def __init__(self) -> None:
        self._name: contextvars.ContextVar[tuple[str | None, Any]] = contextvars.ContextVar("fxmask_lane", default=(None, None))

    @property
    def now(self) -> str | None:
        """The name here."""
        return self._name.get()[0]

    @property
    def whole(self) -> Any:
        """What the call is a part of; ``None`` if it is one of its own."""
        return self._name.get()[1]

    @contextlib.contextmanager
    def called(self, name: str, whole: Any = None) -> Iterator[None]:
        """Calls inside are of this lane, and a part of ``whole``, if that is given."""
        before = self._name.get()
        self._name.set((name, whole))
        try:
            yield
        finally:
            self._name.set(before)


def _frames(frame: FrameType | None) -> list[FrameType]:
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def _pausing_owner(frame: FrameType | None) -> FrameType | None:
    """The generator whose ``with`` statement entered, if it is one; ``contextlib`` enters for others."""
    frame = _outside_contextlib(frame)
    while frame is not None and frame.f_code.co_flags & PAUSING:
        caller = frame.f_back
        if caller is None or not _is_contextlib(caller):
            return frame
        frame = _outside_contextlib(caller)
    return None


def _outside_contextlib(frame: FrameType | None) -> FrameType | None:
    while frame is not None and _is_contextlib(frame):
        frame = frame.f_back
    return frame


def _is_contextlib(frame: FrameType) -> bool:
    return frame.f_code.co_filename == contextlib.__file__
