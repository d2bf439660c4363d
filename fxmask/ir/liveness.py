"""Liveness: what is still needed when some values are given from outside.

live = what the outputs and ``roots`` are computed from, walking backwards and stopping at every given value.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx


def live_nodes(graph: fx.Graph, given: Collection[str], roots: Collection[str] = ()) -> tuple[list[fx.Node], list[fx.Node]]:
    """The live nodes, and the given nodes that they read, both in graph order.

    Args:
        graph: a functional graph.
        given: names of nodes whose values come from outside; what only they need is dead.
        roots: names of nodes that are needed besides the outputs.
    """
    return _walk(graph, given, {*roots, *(node.name for node in graph.find_nodes(op="output"))})


def needed_for(graph: fx.Graph, roots: Collection[str], given: Collection[str] = ()) -> list[fx.Node]:
    """What some values are computed from, and these, in graph order; the graph's outputs do not matter."""
    return _walk(graph, given, roots)[0]


def _walk(graph: fx.Graph, given: Collection[str], roots: Collection[str]) -> tuple[list[fx.Node], list[fx.Node]]:
    live: set[fx.Node] = set()
    read: list[fx.Node] = []
    ordered: list[fx.Node] = []
    for node in reversed(graph.nodes):
        if node.name not in roots and not any(user in live for user in node.users):
            continue
        if node.name in given:
            read.append(node)
        else:
            live.add(node)
            ordered.append(node)
    return ordered[::-1], read[::-1]
