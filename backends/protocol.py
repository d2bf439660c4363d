"""What a backend does for the step graphs of one program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

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

    def compile_batched(self, row: fx.GraphModule, num_steps: int, trace: Callable[[], fx.GraphModule]) -> Callable[..., Any]:
        """See ``fxmask.passes.batch_steps.BatchCompiler``."""
