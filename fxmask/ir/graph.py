"""Small questions about graphs and their nodes, each asked in one place."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from fxmask._torch import HigherOrderOperator, OpOverload

MARK = "fxmask_"  # keys of ``meta`` that passes set for later ones begin so


def mutates(node: fx.Node) -> bool:
    """Whether the node's operator writes to one of its inputs."""
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def made_functional(node: fx.Node) -> Any:
    """The operator that a node calls on copies of the arguments that it writes to; ``None`` for any other node.

    ``auto_functionalized(op, x=%x, _all_bases=[%out])`` is ``op(%x, out)`` on a copy of ``%out``, which it returns.
    """
    wrapped = isinstance(node.target, HigherOrderOperator) and str(node.target).startswith("auto_functionalized")
    return node.args[0] if wrapped and isinstance(node.args[0], OpOverload) else None


def operator_of(node: fx.Node) -> Any:
    """What a node calls: its target, or the operator that it calls on copies."""
    return made_functional(node) or node.target


def is_random(node: fx.Node) -> bool:
    """Whether the node's operator draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(operator_of(node), "tags", ())


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that a node was recorded in; empty for the model itself."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""


def is_assert(node: fx.Node) -> bool:
    """Whether the node only checks something and computes nothing."""
    name = getattr(node.target, "__name__", str(node.target)) if callable(node.target) else str(node.target)
    return node.op == "call_function" and ("_assert" in name or name.startswith("sym_constrain_range"))


def is_view(node: fx.Node) -> bool:
    """Whether a node's value always shares memory with its input."""
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and is_view(source)
    schema = getattr(node.target, "_schema", None)
    returns = schema.returns if schema is not None else ()
    if not any(r.alias_info is not None for r in returns):
        return False
    value, source = node.meta.get("val"), node.all_input_nodes[0].meta.get("val")
    if isinstance(value, torch.Tensor) and isinstance(source, torch.Tensor):
        return value.dtype == source.dtype  # ``to`` returns its input, or converts it
    return True


def attribute(module: torch.nn.Module, node: fx.Node) -> Any:
    """What a ``get_attr`` node stands for: a weight, a constant, or a subgraph."""
    return operator.attrgetter(str(node.target))(module)


def output_node(graph: fx.Graph) -> fx.Node:
    """The node that returns."""
    node: fx.Node = next(iter(graph.find_nodes(op="output")))
    return node


def returned(graph: fx.Graph) -> list[fx.Node]:
    """The values of a graph that returns a flat tuple of them."""
    values: Any = output_node(graph).args[0]
    return list(values)


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """The arguments of a graph, in order."""
    return list(graph.find_nodes(op="placeholder"))


def value_bytes(node: fx.Node) -> int:
    """Bytes of a node's tensor; 0 if it is none."""
    value = node.meta.get("val")
    return int(value.numel()) * value.element_size() if isinstance(value, torch.Tensor) else 0


def copy_nodes(
    nodes: Iterable[fx.Node],
    graph: fx.Graph,
    copies: dict[fx.Node, fx.Node],
    instead: Callable[[fx.Node], fx.Node | None] = lambda node: None,
) -> None:
    """Append copies of nodes to another graph, with their ``meta``; the one loop that does this.

    Args:
        nodes: in topological order. Outputs, and nodes that ``copies`` has, are passed over.
        graph: to append to.
        copies: node -> its copy; what the nodes read must be in it, and it grows.
        instead: a node of ``graph`` that takes a copy's place, or ``None``.
    """
    for node in nodes:
        if node.op != "output" and node not in copies:
            taken = instead(node)
            copies[node] = graph.node_copy(node, copies.__getitem__) if taken is None else taken


def replace_node(old: fx.Node, new: fx.Node) -> None:
    """Let every user of a node read another one, which takes over its value's shape and its marks, and erase the old one.

    Regions are told apart and shared by marks in ``meta`` (``fxmask.passes.split_regions``); a node that is replaced in any
    other way loses them.
    """
    for key, value in old.meta.items():
        if key == "val" or key.startswith(MARK):
            new.meta.setdefault(key, value)
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    old.graph.erase_node(old)
