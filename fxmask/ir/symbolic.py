"""SymbolicGraph: one captured graph for many shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from fxmask._torch import FakeTensorMode
from fxmask.ir.calls import BoundCall
from fxmask.ir.graph import attribute


@dataclass(frozen=True)
class SymbolicGraph:
    """A functional graph with symbolic sizes.

    Attributes:
        module: the graph.
        static: static leaves, types and devices of the calls that it covers.
        ranges: per input and dimension the sizes that it covers, (least, most).
    """

    module: fx.GraphModule
    static: Any
    ranges: dict[str, tuple[tuple[int, float], ...]]

    def covers(self, bound: BoundCall) -> bool:
        """Whether a call is within the ranges. Relations between dimensions are not checked; compare the results."""
        if static_key(bound) != self.static:
            return False
        for name, x in bound.tensors.items():
            ranges = self.ranges[name]
            if len(ranges) != x.dim() or not all(low <= n <= high for n, (low, high) in zip(x.shape, ranges, strict=True)):
                return False
        return True

    def at(self, bound: BoundCall) -> fx.GraphModule:
        """The graph for the sizes of one call: symbols are numbers, and every value has its shape.

        Raises:
            Exception: whatever an operator says of sizes that do not fit.
        """
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        graph = fx.Graph()
        copies: dict[fx.Node, Any] = {}
        values: dict[fx.Node, Any] = {}
        inputs = iter(bound.tensors.values())
        with mode:
            for node in self.module.graph.nodes:
                if node.op == "placeholder":
                    values[node] = mode.from_tensor(next(inputs), static_shapes=True)
                elif node.op == "get_attr":
                    values[node] = mode.from_tensor(attribute(self.module, node), static_shapes=True)
                elif node.op == "call_function":
                    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
                    values[node] = node.target(*args, **kwargs)
                if isinstance(values.get(node), (int, float, bool)):
                    copies[node] = values[node]  # a size: a number from here on
                    continue
                copies[node] = graph.node_copy(node, lambda n: copies[n])
                copies[node].meta = {**node.meta, "val": values.get(node)}
        return fx.GraphModule(self.module, graph, class_name="Program")


def static_key(bound: BoundCall) -> Any:
    """What a symbolic graph depends on: names, types, devices and static values, not sizes."""
    shapes, static = bound.key
    return tuple((name, dtype, device) for name, _, dtype, device in shapes), static
