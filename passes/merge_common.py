"""Common subexpressions: nodes with the same operator and arguments are computed once.

    before:  %a = sin(%f); %b = sin(%f); %y = add(%a, %b)
    after:   %a = sin(%f);               %y = add(%a, %a)

The graphs are functional, so equal nodes have equal values, unless they draw random numbers.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from fxmask.ir.graph import is_random, replace_node
from fxmask.passes.conditions import functional
from fxmask.passes.observer import PassResult, graph_pass


@graph_pass(requires=(functional,), ensures=(functional,), otherwise=PassResult)
def merge_common(graph: fx.Graph) -> PassResult:
    """Merge equal nodes of a functional graph in place."""
    known: dict[Any, fx.Node] = {}
    merged = 0
    for node in list(graph.nodes):
        if node.op not in ("call_function", "get_attr"):
            continue
        if is_random(node):
            continue
        key = (node.op, node.target, _hashable(node.args), _hashable(node.kwargs))
        if key in known:
            replace_node(node, known[key])
            merged += 1
        else:
            known[key] = node
    return PassResult(graph, merged)


def _hashable(value: Any) -> Any:
    """Arguments as a key. ``1``, ``1.0`` and ``True`` are equal in Python, not in an operator's arguments."""
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _hashable(v)) for k, v in value.items())
    return value if isinstance(value, fx.Node) else (type(value), repr(value))
