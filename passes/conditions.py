"""Conditions: what a pass may require of a graph, and ensure. Each is a function ``graph -> problem or None``."""

from __future__ import annotations

from torch import fx

from fxmask.ir.graph import is_assert, mutates


def functional(graph: fx.Graph) -> str | None:
    """No operator writes to its inputs."""
    node = next((n for n in graph.nodes if n.op == "call_function" and mutates(n) and not is_assert(n)), None)
    return f"{node.format_node()} writes to its input" if node is not None else None


def has_shapes(graph: fx.Graph) -> str | None:
    """Every computed value has its shape in ``meta["val"]``."""
    node = next((n for n in graph.nodes if n.op in ("call_function", "placeholder") and "val" not in n.meta), None)
    return f"{node.name} has no shape" if node is not None else None


def no_dead_code(graph: fx.Graph) -> str | None:
    """Every computed value has a user."""
    node = next((n for n in graph.nodes if n.op not in ("placeholder", "output") and not n.users), None)
    return f"nobody uses {node.name}" if node is not None else None


def one_output_tuple(graph: fx.Graph) -> str | None:
    """The graph returns one flat tuple of values."""
    outputs = list(graph.find_nodes(op="output"))
    flat = len(outputs) == 1 and isinstance(outputs[0].args[0], (tuple, list))
    return None if flat and all(isinstance(n, fx.Node) for n in outputs[0].args[0]) else "its output is not a flat tuple"
