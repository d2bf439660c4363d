"""Facts about a graph that several passes share: who depends on whom, and what dies when a value is cut.

Everything here costs time near linear in the nodes: dominance questions are answered by intervals of a walk over the tree
(``a`` is below ``b`` if ``a``'s number is inside ``b``'s interval), and what dies with a set of values is found by walking
up from these values alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from fxmask.ir.macs import count_macs

Interval = tuple[int, int]
Values = tuple[fx.Node, ...]  # the cut values of one block


@dataclass(frozen=True)
class Dataflow:
    """Dependence and cost facts of one graph.

    Attributes:
        nodes: in topological order; ``index`` is the position of each.
        macs: multiply-accumulates of each node.
        parent: immediate post-dominator of each node: the next node that every path to the output goes through
            (the output node itself for the last ones; absent for nodes that the output does not need).
        exclusive: MACs of the nodes that die when the node's value is cut: the node's subtree under ``parent``.
        below: interval of each node in a walk over the tree of ``parent``.
        dominated: interval of each node in a walk over the tree of dominators from ``source``, for those that depend on it.
        source: the node that ``dominated`` starts from, if any.
    """

    nodes: tuple[fx.Node, ...]
    index: dict[fx.Node, int]
    macs: dict[fx.Node, int]
    parent: dict[fx.Node, fx.Node]
    exclusive: dict[fx.Node, int]
    below: dict[fx.Node, Interval]
    dominated: dict[fx.Node, Interval]
    source: fx.Node | None = None

    @classmethod
    def of(cls, graph: fx.Graph, source: fx.Node | None = None) -> Dataflow:
        """Analyse ``graph``; with a ``source``, also what depends on it."""
        nodes = tuple(graph.nodes)
        index = {node: i for i, node in enumerate(nodes)}
        macs = {node: count_macs(node) for node in nodes}
        parent = _post_dominators(nodes, index)
        exclusive = dict(macs)
        for node in nodes:  # children come before their parent in topological order
            if node in parent and parent[node] is not node:
                exclusive[parent[node]] += exclusive[node]
        below = _intervals(nodes[::-1], parent)
        dominated = _intervals(nodes, _dominators(nodes, index, source)) if source is not None else {}
        return cls(nodes, index, macs, parent, exclusive, below, dominated, source)

    def depends(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether ``node`` is computed from ``source``, or is ``source``."""
        if node is source:
            return True
        if source is self.source:
            return node in self.dominated
        if self._inside(self.dominated, node, source):
            return True
        first = self.index[source]
        seen, stack = {node}, [node]
        while stack:  # only what lies between the two
            for given in stack.pop().all_input_nodes:
                if given is source:
                    return True
                if self.index[given] > first and given not in seen:
                    seen.add(given)
                    stack.append(given)
        return False

    def within(self, node: fx.Node, root: fx.Node) -> bool:
        """Whether ``node`` dies when ``root`` is cut (``root`` itself included)."""
        return node is root or self._inside(self.below, node, root)

    @staticmethod
    def _inside(intervals: Mapping[fx.Node, Interval], node: fx.Node, root: fx.Node) -> bool:
        inner, outer = intervals.get(node), intervals.get(root)
        return inner is not None and outer is not None and outer[0] <= inner[0] < outer[1]

    def region(self, roots: Iterable[fx.Node]) -> list[fx.Node]:
        """Every node that is needed only through ``roots``, the roots included, in topological order."""
        dead = set(roots)
        queue = [(-self.index[given], given.name, given) for root in dead for given in root.all_input_nodes]
        heapq.heapify(queue)
        seen = {given for _, _, given in queue} | dead
        while queue:  # the last node first, so that its users are settled
            _, _, node = heapq.heappop(queue)
            if node in dead or any(user not in dead and user in self.parent for user in node.users):
                continue
            dead.add(node)
            for given in node.all_input_nodes:
                if given not in seen:
                    seen.add(given)
                    heapq.heappush(queue, (-self.index[given], given.name, given))
        return sorted(dead, key=self.index.__getitem__)

    def saving(self, roots: Sequence[fx.Node]) -> int:
        """MACs of what dies when ``roots`` are cut together."""
        if len(roots) == 1 and roots[0] in self.parent:
            return self.exclusive[roots[0]]
        return sum(self.macs[node] for node in self.region(roots))

    def meet(self, nodes: Sequence[fx.Node]) -> fx.Node:
        """The first node that every path from any of ``nodes`` to the output goes through."""
        met = nodes[0]
        for other in nodes[1:]:
            met = _meet(met, other, self.parent, self.index)
        return met


def _post_dominators(nodes: Sequence[fx.Node], index: Mapping[fx.Node, int]) -> dict[fx.Node, fx.Node]:
    """Immediate post-dominators (Cooper, Harvey and Kennedy, "A Simple, Fast Dominance Algorithm", 2001).

    The graph is acyclic, so one sweep from the output backwards is enough.
    """
    parent: dict[fx.Node, fx.Node] = {}
    for node in reversed(nodes):
        if node.op == "output":
            parent[node] = node
            continue
        met: fx.Node | None = None
        for user in node.users:
            if user in parent:  # else a dead user
                met = user if met is None else _meet(met, user, parent, index)
        if met is not None:
            parent[node] = met
    return parent


def _dominators(nodes: Sequence[fx.Node], index: Mapping[fx.Node, int], source: fx.Node) -> dict[fx.Node, fx.Node]:
    """Immediate dominators, by paths from ``source``, of all that depends on it. The source is its own."""
    parent = {source: source}
    backwards = {node: -i for node, i in index.items()}
    for node in nodes:
        met: fx.Node | None = None
        for given in node.all_input_nodes:
            if given in parent:
                met = given if met is None else _meet(met, given, parent, backwards)
        if met is not None and node is not source:
            parent[node] = met
    return parent


def _meet(a: fx.Node, b: fx.Node, parent: Mapping[fx.Node, fx.Node], index: Mapping[fx.Node, int]) -> fx.Node:
    """The lowest common ancestor in a tree whose parents have larger indices than their children."""
    while a is not b:
        if index[a] < index[b]:
            a = parent[a]
        else:
            b = parent[b]
    return a


def _intervals(downwards: Sequence[fx.Node], parent: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, Interval]:
    """For each node of a tree its number in a walk and the number after its subtree; parents first in ``downwards``."""
    size = {node: 1 for node in downwards if node in parent}
    for node in reversed(downwards):
        if node in parent and parent[node] is not node:
            size[parent[node]] += size[node]
    first: dict[fx.Node, int] = {}
    free: dict[fx.Node, int] = {}
    roots = 0
    for node in downwards:
        if node not in parent:
            continue
        above = parent[node]
        if above is node:
            first[node], roots = roots, roots + size[node]
        else:
            first[node] = free[above]
            free[above] += size[node]
        free[node] = first[node] + 1
    return {node: (start, start + size[node]) for node, start in first.items()}
