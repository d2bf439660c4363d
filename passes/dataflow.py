"""Facts about a graph that several passes share: who depends on whom, and what dies when a value is cut."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from fxmask.passes.count_macs import count_macs


@dataclass(frozen=True)
class Dataflow:
    """Dependence and cost facts of one graph.

    Attributes:
        nodes: in topological order; ``index`` is the position of each.
        ancestors: for each node, a bit set (``int``) of the positions of everything it is computed from.
        macs: multiply-accumulates of each node.
        parent: immediate post-dominator of each node: the next node that every path to the output goes through
            (the output node itself for the last ones; absent for nodes that the output does not need).
        exclusive: MACs of the nodes that die when the node's value is cut: the node's subtree under ``parent``.
    """

    nodes: tuple[fx.Node, ...]
    index: dict[fx.Node, int]
    ancestors: dict[fx.Node, int]
    macs: dict[fx.Node, int]
    parent: dict[fx.Node, fx.Node]
    exclusive: dict[fx.Node, int]

    @classmethod
    def of(cls, graph: fx.Graph) -> Dataflow:
        """Analyse ``graph``, in time near linear in its nodes and edges."""
        nodes = tuple(graph.nodes)
        index = {node: i for i, node in enumerate(nodes)}
        ancestors: dict[fx.Node, int] = {}
        for node in nodes:
            bits = 0
            for source in node.all_input_nodes:
                bits |= ancestors[source] | (1 << index[source])
            ancestors[node] = bits
        macs = {node: count_macs(node) for node in nodes}
        parent = _post_dominators(nodes, index)
        exclusive = dict(macs)
        for node in nodes:  # children come before their parent in topological order
            if node in parent and parent[node] is not node:
                exclusive[parent[node]] += exclusive[node]
        return cls(nodes, index, ancestors, macs, parent, exclusive)

    def depends(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether ``node`` is computed from ``source``, or is ``source``."""
        return node is source or bool(self.ancestors[node] >> self.index[source] & 1)

    def within(self, node: fx.Node, root: fx.Node) -> bool:
        """Whether ``node`` dies when ``root`` is cut (``root`` itself included)."""
        while self.index[node] < self.index[root]:
            if node not in self.parent:
                return False
            node = self.parent[node]
        return node is root

    def region(self, roots: Iterable[fx.Node]) -> list[fx.Node]:
        """Every node that is needed only through ``roots``, the roots included, in topological order."""
        cut = set(roots)
        live: set[fx.Node] = set()
        for node in reversed(self.nodes):
            needed = node.op == "output" or any(user in live for user in node.users)
            if needed and node not in cut:
                live.add(node)
        return [node for node in self.nodes if node not in live and (node in self.parent or node in cut)]


def _post_dominators(nodes: tuple[fx.Node, ...], index: dict[fx.Node, int]) -> dict[fx.Node, fx.Node]:
    """Immediate post-dominators (Cooper, Harvey and Kennedy, "A Simple, Fast Dominance Algorithm", 2001).

    The graph is acyclic, so one sweep from the output backwards is enough.
    """
    parent: dict[fx.Node, fx.Node] = {}
    for node in reversed(nodes):
        if node.op == "output":
            parent[node] = node
            continue
        meet: fx.Node | None = None
        for user in node.users:
            if user not in parent:
                continue  # a dead user
            other: fx.Node = user
            if meet is None:
                meet = other
            while meet is not other:
                if index[meet] < index[other]:
                    meet = parent[meet]
                else:
                    other = parent[other]
        if meet is not None:
            parent[node] = meet
    return parent
