"""Run a step graph as it is, one ATen operator after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx


def compile_eager(graph_module: fx.GraphModule) -> Callable[..., Any]:
    """The graph's own generated Python code."""
    return graph_module
