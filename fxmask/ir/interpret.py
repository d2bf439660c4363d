"""Running a graph node by node. Everything that looks at values on the way goes through here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

OnValue = Callable[[fx.Node, Any], Any]


class _Watched(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, on_value: OnValue) -> None:
        super().__init__(module)
        self._on_value = on_value

    def run_node(self, n: fx.Node) -> Any:
        """One node; what ``on_value`` returns takes its value's place."""
        value = super().run_node(n)
        return value if n.op == "output" else self._on_value(n, value)


def interpret(module: fx.GraphModule, inputs: Sequence[Any], on_value: OnValue) -> Any:
    """The outputs of a graph whose values go through ``on_value``.

    Args:
        module: the graph.
        inputs: its arguments.
        on_value: ``(node, value) -> value``, called for every argument, weight and computed value; what it returns is used
            in the value's place.
    """
    return _Watched(module, on_value).run(*inputs)
