"""Residual branches: what is added to a stream that it was computed from."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from fxmask.ir.macs import shape_of
from fxmask.passes.dataflow import Dataflow

aten = torch.ops.aten
ADDS = (aten.add, aten.sub, aten.addcmul)
GATES = (aten.mul, aten.div)
VIEWS = frozenset(
    getattr(aten, name)
    for name in (
        "view reshape slice select split split_with_sizes chunk unbind transpose permute unsqueeze squeeze flatten unflatten "
        "contiguous clone _to_copy to narrow movedim view_as reshape_as _unsafe_view dropout alias detach t type_as"
    ).split()
)


SHORTCUT_RATIO = 0.35  # a shortcut owns at most this fraction of its branch's MACs


@dataclass(frozen=True)
class Branch:
    """A residual branch: the value to cut, and the sum that it is a term of (``(x + f) + g`` is one sum)."""

    value: fx.Node
    sum: int


def residual_branches(flow: Dataflow, sample: fx.Node) -> list[Branch]:
    """One candidate per residual addition whose branch saves anything, nested ones included."""
    found: dict[fx.Node, Branch] = {}
    sums: dict[fx.Node, int] = {}
    for node in flow.nodes:
        term = _branch_operand(node, flow, sample, sums)
        if term is None:
            continue
        branch, stream = term
        sums[node] = sums[stream] if stream in sums and not flow.depends(branch, stream) else len(sums)
        value = _climb(_strip_gates(branch, flow, sample), flow)
        if flow.exclusive[value]:  # else a rotation or an embedding, not a branch
            found[value] = Branch(value, sums[node])
    return list(found.values())


def _branch_operand(
    node: fx.Node, flow: Dataflow, sample: fx.Node, sums: Mapping[fx.Node, int]
) -> tuple[fx.Node, fx.Node] | None:
    """The operands of a residual addition, the branch first, or ``None`` if ``node`` is no residual addition."""
    operands = _addends(node, flow, sample)
    if operands is None:
        return None
    left, right = operands
    if shape_of(left) != shape_of(node) or math.prod(shape_of(right)) != math.prod(shape_of(node)):
        return None
    for stream, branch in ((left, right), (right, left)):
        if flow.depends(branch, sample) and flow.depends(branch, _strip_gates(stream, flow, sample)):
            return branch, stream
    if not (flow.depends(left, sample) and flow.depends(right, sample)):
        return None
    if (left in sums) != (right in sums):  # (x + f(x)) + g(x): the stream, and a branch parallel to the last one
        return (right, left) if left in sums else (left, right)
    light, heavy = sorted((left, right), key=lambda n: flow.exclusive[n])
    largest = max(flow.exclusive[term] for term in _terms(heavy))  # in a sum of equals nobody is the shortcut
    if largest > 0 and flow.exclusive[light] <= SHORTCUT_RATIO * largest:
        return heavy, light
    return None


def _addends(node: fx.Node, flow: Dataflow, sample: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """What a needed node adds: two values, or a value and the one moving factor of an ``addcmul``."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet not in ADDS or node not in flow.parent:
        return None
    if packet is aten.addcmul:  # x + value * a * b
        moving = [a for a in node.args[1:3] if isinstance(a, fx.Node) and flow.depends(a, sample)]
        left, right = node.args[0], moving[0] if len(moving) == 1 else None
    else:
        left, right = node.args[0], _as_node(node.args[1]) if len(node.args) > 1 else None
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left is right:
        return None
    if not (is_tensor(left) and is_tensor(right)):
        return None
    return left, right


def _as_node(argument: object) -> fx.Node | None:
    return argument if isinstance(argument, fx.Node) else None


def _terms(node: fx.Node) -> list[fx.Node]:
    """The terms of a sum of any length; the node itself if it is none."""
    terms, stack = [], [node]
    while stack:
        term = stack.pop()
        parts = [a for a in term.args[:2] if isinstance(a, fx.Node) and is_tensor(a) and shape_of(a) == shape_of(term)]
        if getattr(term.target, "overloadpacket", None) is aten.add and len(parts) == 2 and len(term.users) == 1:
            stack += parts
        else:
            terms.append(term)
    return terms


def _strip_gates(value: fx.Node, flow: Dataflow, sample: fx.Node) -> fx.Node:
    """Go up through multiplications by what does not depend on the sample, so that gates stay fresh."""
    inner = value
    while True:
        if _overload(inner) in VIEWS and inner.all_input_nodes and is_tensor(inner.all_input_nodes[0]):
            source = inner.all_input_nodes[0]
            if len(source.users) > 1 or math.prod(shape_of(source)) != math.prod(shape_of(inner)):
                return value
            inner = source
            continue
        ungated = _ungated(inner, flow, sample)
        if ungated is None:
            return value
        value = inner = ungated


def _ungated(value: fx.Node, flow: Dataflow, sample: fx.Node) -> fx.Node | None:
    """The moving factor of a product with something that does not depend on the sample."""
    if _overload(value) not in GATES:
        return None
    moving = [a for a in value.args[:2] if isinstance(a, fx.Node) and flow.depends(a, sample)]
    if len(moving) != 1 or not is_tensor(moving[0]) or shape_of(moving[0]) != shape_of(value):
        return None
    return None if _overload(value) is aten.div and value.args[0] is not moving[0] else moving[0]


def _climb(value: fx.Node, flow: Dataflow) -> fx.Node:
    """Where a branch is one of several views of a value that owns more, the value."""
    best = node = value
    while (_overload(node) in VIEWS or node.target is operator.getitem) and node.all_input_nodes:
        node = node.all_input_nodes[0]
        if node.op != "call_function" or node not in flow.parent:
            break
        if is_tensor(node) and flow.exclusive[node] > flow.exclusive[best]:
            best = node
    return best


def _overload(node: fx.Node) -> object:
    return getattr(node.target, "overloadpacket", None)


def is_tensor(node: fx.Node) -> bool:
    """Whether a node is one tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)
