"""One symbolic capture for many shapes.

A new batch size or resolution needs new graphs, but not a new export each time: the model is exported once with the
changed dimensions symbolic, and the symbols are replaced by numbers for each form of call. What an export can not keep
symbolic (a branch on the batch size, an attention mask of fixed size) is not covered; the caller then exports again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxmask.calls import BoundCall
from fxmask.ladder import distinct


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
        if _static_key(bound) != self.static:
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
                    values[node] = mode.from_tensor(operator.attrgetter(str(node.target))(self.module), static_shapes=True)
                elif node.op == "call_function":
                    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
                    values[node] = node.target(*args, **kwargs)
                if isinstance(values.get(node), (int, float, bool)):
                    copies[node] = values[node]  # a size: a number from here on
                    continue
                copies[node] = graph.node_copy(node, lambda n: copies[n])
                copies[node].meta = {**node.meta, "val": values.get(node)}
        return fx.GraphModule(self.module, graph, class_name="Program")


def export_symbolic(
    old: BoundCall,
    new: BoundCall,
    wrapper: torch.nn.Module,
    functionalize: Callable[[torch.export.ExportedProgram], fx.GraphModule],
) -> SymbolicGraph | None:
    """Export with every dimension symbolic in which two calls differ; ``None`` if they differ in more than sizes.

    Args:
        old: the call that the model was captured with.
        new: the call that it is to be captured for.
        wrapper: presents the model as a function of a flat list of tensors.
        functionalize: makes the exported program a functional graph.
    """
    if _static_key(old) != _static_key(new):
        return None
    pairs = list(zip(old.tensors.values(), new.tensors.values(), strict=True))
    if any(a.dim() != b.dim() for a, b in pairs):
        return None
    # A size of 1 would be taken for broadcasting, so it cannot stand for others.
    example = [b if all(n > 1 or m == 1 for n, m in zip(b.shape, a.shape, strict=True)) else a for a, b in pairs]
    dynamic = tuple({d: torch.export.Dim.AUTO for d in range(a.dim()) if a.shape[d] != b.shape[d]} for a, b in pairs)
    exported = torch.export.export(wrapper, distinct(example), dynamic_shapes=(dynamic,), strict=False)
    module = functionalize(exported)
    placeholders = module.graph.find_nodes(op="placeholder")
    ranges = {
        name: tuple(_range(size, exported.range_constraints) for size in node.meta["val"].shape)
        for name, node in zip(new.tensors, placeholders, strict=True)
    }
    return SymbolicGraph(module, _static_key(new), ranges)


def _range(size: Any, constraints: Any) -> tuple[int, float]:
    if isinstance(size, int):
        return size, size
    found = constraints.get(size.node.expr)
    if found is None:  # a relation between dimensions, e.g. 2 * n
        return 0, float("inf")
    return int(found.lower), float(found.upper)


def _static_key(bound: BoundCall) -> Any:
    shapes, static = bound.key
    return tuple((name, dtype, device) for name, _, dtype, device in shapes), static
