"""Streams: the values after the joins of residual branches, which are the paper's blocks (arXiv 2603.19939, Eq. 3).

    %f = ...(%x);  %g = mul(%gate, %f);  %y = add(%x, %g)            the branch is %f, the stream %y
    %f = conv(...(%x));  %a = add(%s, %f);  %y = div(%a, 1.4)        a ResBlock that divides by a scale: %y
    %a = add(%x, %f);  %y = add(%a, %h)  (%a read by nobody else)    parallel branches are one block with the stream %y

Skipping a stream replaces the shortcut too: what came before it in the same step is needed only where something else reads
it. Streams are an alternative to branches, so a mask lists one or the other.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import fx

from fxmask.ir.block import Block
from fxmask.ir.macs import shape_of
from fxmask.passes.conditions import functional, has_shapes, one_output_tuple
from fxmask.passes.dataflow import Dataflow
from fxmask.passes.observer import graph_pass
from fxmask.passes.residual_branches import ADDS, GATES, VIEWS, is_tensor

SUFFIX = ":stream"


@graph_pass(requires=(functional, has_shapes, one_output_tuple))
def find_streams(graph: fx.Graph, branches: Sequence[Block]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Name and cut values of the stream block of each branch block, in graph order.

    Branches that join one sum are one block. A branch whose value meets no residual addition has none.

    Args:
        graph: functional graph with shapes in ``meta["val"]``.
        branches: the branch blocks of ``find_blocks``.
    """
    nodes = {node.name: node for node in graph.nodes}
    flow = Dataflow.of(graph)
    groups: list[tuple[list[str], set[fx.Node]]] = []
    for block in branches:
        joins: set[fx.Node] = set()
        for value in block.values:
            joins |= _joins(nodes[value], flow)
        if not joins:
            continue
        same = [group for group in groups if group[1] & joins]
        groups = [group for group in groups if not group[1] & joins]
        names = [name for group in same for name in group[0]]
        groups.append(([*names, block.name], joins.union(*(group[1] for group in same))))
    ordered = [(names, sorted(joins, key=flow.index.__getitem__)) for names, joins in groups]
    ordered.sort(key=lambda group: flow.index[group[1][-1]])
    return tuple(("+".join(names) + SUFFIX, tuple(node.name for node in joins)) for names, joins in ordered)


def _joins(value: fx.Node, flow: Dataflow) -> set[fx.Node]:
    """Where a branch is added to the stream, by way of gates and views; nothing if one of its ways leads elsewhere."""
    found: set[fx.Node] = set()
    stack = [value]
    while stack:
        node = stack.pop()
        for user in node.users:
            if user not in flow.parent:
                continue
            if _adds(user, node, flow):
                found.add(_last_of_sum(user))
            elif _packet(user) in VIEWS or _packet(user) in GATES or user.target is operator.getitem:
                stack.append(user)
            else:
                return set()
    return found


def _adds(node: fx.Node, branch: fx.Node, flow: Dataflow) -> bool:
    """Whether a node adds the branch to another value of its shape that is not computed from it."""
    if _packet(node) not in ADDS:
        return False
    others = [given for given in node.all_input_nodes if given is not branch and is_tensor(given)]
    return any(shape_of(other) == shape_of(node) and not flow.depends(other, branch) for other in others)


def _last_of_sum(node: fx.Node) -> fx.Node:
    """The end of a sum whose parts nobody else reads, and of its division by a number."""
    while len(node.users) == 1:
        (user,) = node.users
        tensors = [given for given in user.all_input_nodes if is_tensor(given)]
        scaled = _packet(user) in GATES and tensors == [node]
        summed = _packet(user) in ADDS and len(tensors) == 2 and all(shape_of(x) == shape_of(user) for x in tensors)
        if not (scaled or summed):
            break
        node = user
    return node


def _packet(node: fx.Node) -> object:
    return getattr(node.target, "overloadpacket", None)
