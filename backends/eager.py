"""Run a step graph as it is, one ATen operator after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx


class Eager:
    """The graph's own generated Python code."""

    def prepare(self, graph_modules: Sequence[fx.GraphModule]) -> None:
        """Nothing depends on other graphs."""

    def compile(self, graph_module: fx.GraphModule) -> Callable[..., Any]:
        """The graph itself."""
        return graph_module
