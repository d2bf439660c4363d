"""What a backend does for the step graphs of one program."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import fx


class Compiler(Protocol):
    """Makes callables of step graphs."""

    def prepare(self, graph_modules: Sequence[fx.GraphModule]) -> None:
        """See all step graphs of a plan before the first of them is compiled."""

    def compile(self, graph_module: fx.GraphModule) -> Callable[..., Any]:
        """A callable that computes what the graph computes."""


@runtime_checkable
class PrologueCompiler(Compiler, Protocol):
    """Also compiles what runs once per generation, which others run operator by operator."""

    def compile_once(self, graph_module: fx.GraphModule) -> Callable[..., Any]:
        """A callable that computes what a graph that is no step's computes."""

    def compile_batched(self, row: fx.GraphModule, num_steps: int, trace: Callable[[], fx.GraphModule]) -> Callable[..., Any]:
        """See ``fxmask.passes.batch_steps.BatchCompiler``."""


class Capturer(Protocol):
    """Records work on memory that stays where it is, to be done again without Python and without launches."""

    def problem(self, device: torch.device) -> str | None:
        """Why nothing can be recorded on a device, or ``None``."""

    def is_idle(self, device: torch.device) -> bool:
        """Whether a recording can be made or replayed now: nobody else is recording what is done."""

    def ordered(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """What is done inside comes after all that was done inside before, on whatever stream and in whatever thread."""

    def record(self, prepare: Callable[[], None], run: Callable[[], None], device: torch.device) -> Callable[[], None]:
        """Record ``run`` without doing it, inside ``ordered``.

        Args:
            prepare: does the same work with results that nobody reads; whatever only happens at a first call happens here.
            run: reads and writes memory that stays where it is and stays alive.
            device: that all of it is on.

        Returns:
            What does the work, inside ``ordered``.

        Raises:
            BackendError: it cannot be recorded; says why.
        """
