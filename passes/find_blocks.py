"""Find what is worth skipping, from the dataflow alone.

    %f = ...(%x);  %g = mul(%gate, %f);  %y = add(%x, %g)      x is an ancestor of f: a residual branch.
                                                               Cut at %f: the cheap gate stays fresh.
    %s = conv1x1(%x);  %f = conv(...(%x));  %y = add(%s, %f)   no ancestor, but one side owns far more MACs:
                                                               a branch with a convolution shortcut.

The cost of a cut is the MACs of the nodes that die with it, i.e. its subtree under post-dominance. Besides branches,
values of the whole stream (outputs of U-Net levels or transformer stages) and the denoiser's output are candidates.
No class or module name decides anything; module paths only give the blocks names that a person recognises.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fxmask.passes.count_macs import shape_of
from fxmask.passes.dataflow import Dataflow
from fxmask.passes.observer import functional, graph_pass, has_shapes, one_output_tuple
from fxmask.program import Block

aten = torch.ops.aten

ADDS = (aten.add, aten.addcmul)
GATES = (aten.mul, aten.div)

MIN_BRANCH_SHARE = 0.002  # of all MACs; a cheaper branch is not worth a cache
MIN_STAGE_SHARE = 0.06  # stages whose savings differ by less than this are the same candidate
SHORTCUT_RATIO = 0.35  # a shortcut owns at most this fraction of its branch's MACs
NESTED_SHARE = 0.75  # inner branches replace an outer one if they own at least this share of it
OUTPUT_SHARE = 0.97  # a stage that saves this much of everything is the output under another name
NAME_SHARE = 0.9  # a block is named after a module that owns this share of its MACs


@dataclass(frozen=True)
class _Branch:
    value: fx.Node
    macs: int


@graph_pass(requires=(functional, has_shapes, one_output_tuple))
def find_blocks(graph: fx.Graph, sample: fx.Node, batch_size: int) -> tuple[Block, ...]:
    """The blocks of a functional graph, in graph order.

    Args:
        graph: functional graph with shapes in ``meta["val"]``.
        sample: the placeholder of the noisy sample.
        batch_size: of the captured call, for bytes per sample.
    """
    flow = Dataflow.of(graph)
    total = sum(flow.macs.values())
    found = _residual_branches(flow, sample, total)
    branches, outer = _choose_level(flow, found)
    stages = _stages(flow, sample, total, branches, outer)
    picks: list[tuple[str, tuple[fx.Node, ...]]] = [("branch", (b.value,)) for b in branches]
    picks += [("stage", (node,)) for node in stages]
    outputs = _outputs(graph, flow, sample)
    if outputs:
        picks.append(("output", outputs))
    picks.sort(key=lambda pick: (flow.index[pick[1][-1]], pick[0] == "output"))
    weights = _macs_by_module(flow.nodes, flow)
    names = _unique([_name(kind, flow.region(values), flow, weights) for kind, values in picks])
    return tuple(_describe(name, kind, values, flow, batch_size) for name, (kind, values) in zip(names, picks, strict=True))


def describe_blocks(
    graph: fx.Graph, blocks: Sequence[Block], values: Mapping[str, tuple[str, ...]], batch_size: int
) -> tuple[Block, ...]:
    """The same blocks on another graph of the same model, with MACs and bytes counted anew.

    Args:
        graph: the other graph.
        blocks: the blocks to carry over.
        values: for each block name, the names of its cut values in ``graph``.
        batch_size: of the call that ``graph`` was captured with.
    """
    flow = Dataflow.of(graph)
    nodes = {node.name: node for node in graph.nodes}
    return tuple(_describe(b.name, b.kind, tuple(nodes[v] for v in values[b.name]), flow, batch_size) for b in blocks)


def _describe(name: str, kind: str, values: tuple[fx.Node, ...], flow: Dataflow, batch_size: int) -> Block:
    return Block(
        name=name,
        kind=kind,
        values=tuple(node.name for node in values),
        macs=sum(flow.macs[node] for node in flow.region(values)),
        bytes=sum(_bytes(node) for node in values) // max(1, batch_size),
    )


def _residual_branches(flow: Dataflow, sample: fx.Node, total: int) -> list[_Branch]:
    """One candidate per residual addition, nested ones included."""
    found: dict[fx.Node, _Branch] = {}
    joins: set[fx.Node] = set()
    for node in flow.nodes:
        branch = _branch_operand(node, flow, sample, joins)
        if branch is None:
            continue
        joins.add(node)
        value = _strip_gates(branch, flow, sample)
        if flow.exclusive[value] >= max(1, MIN_BRANCH_SHARE * total):
            found[value] = _Branch(value, flow.exclusive[value])
    return list(found.values())


def _branch_operand(node: fx.Node, flow: Dataflow, sample: fx.Node, joins: set[fx.Node]) -> fx.Node | None:
    """The operand of a residual addition that is the branch, or ``None`` if ``node`` is no residual addition."""
    if getattr(node.target, "overloadpacket", None) not in ADDS or node not in flow.parent:
        return None
    if node.target.overloadpacket is aten.addcmul:  # type: ignore[union-attr]  # x + value * a * b
        left, factors = node.args[0], [a for a in node.args[1:3] if isinstance(a, fx.Node)]
        moving = [a for a in factors if flow.depends(a, sample)]
        right = moving[0] if len(moving) == 1 else None
    else:
        left, right = (node.args[0], _as_node(node.args[1])) if len(node.args) > 1 else (None, None)
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left is right:
        return None
    if not (flow.depends(left, sample) and flow.depends(right, sample)):
        return None
    if shape_of(left) != shape_of(node) or math.prod(shape_of(right)) != math.prod(shape_of(node)):
        return None
    if flow.depends(right, left):
        return right
    if flow.depends(left, right):
        return left
    if (left in joins) != (right in joins):  # (x + f(x)) + g(x): the stream, and a branch parallel to the last one
        return right if left in joins else left
    light, heavy = sorted((left, right), key=lambda n: flow.exclusive[n])
    if flow.exclusive[heavy] > 0 and flow.exclusive[light] <= SHORTCUT_RATIO * flow.exclusive[heavy]:
        return heavy
    return None


def _as_node(argument: object) -> fx.Node | None:
    return argument if isinstance(argument, fx.Node) else None


def _strip_gates(value: fx.Node, flow: Dataflow, sample: fx.Node) -> fx.Node:
    """Go up through multiplications by what does not depend on the sample, so that gates stay fresh."""
    while getattr(value.target, "overloadpacket", None) in GATES:
        operands = [a for a in value.args[:2] if isinstance(a, fx.Node)]
        moving = [a for a in operands if flow.depends(a, sample)]
        if len(moving) != 1 or shape_of(moving[0]) != shape_of(value):
            break
        if value.target.overloadpacket is aten.div and value.args[0] is not moving[0]:  # type: ignore[union-attr]
            break
        value = moving[0]
    return value


def _choose_level(flow: Dataflow, found: list[_Branch]) -> tuple[list[_Branch], list[fx.Node]]:
    """Of nested branches keep the inner ones if they own most of the outer one, else the outer one.

    Returns the disjoint branches, and the outer values that are left over (candidates for stages).
    """
    ordered = sorted(found, key=lambda b: flow.index[b.value])
    chosen: list[_Branch] = []
    outer: list[fx.Node] = []
    for branch in ordered:  # an inner branch comes before the one that contains it
        inside = [b for b in chosen if flow.within(b.value, branch.value)]
        if inside and sum(b.macs for b in inside) >= NESTED_SHARE * branch.macs:
            outer.append(branch.value)
            continue
        chosen = [b for b in chosen if b not in inside] + [branch]
    return chosen, outer


def _stages(
    flow: Dataflow, sample: fx.Node, total: int, branches: Sequence[_Branch], outer: Sequence[fx.Node]
) -> list[fx.Node]:
    """Values of the whole stream with clearly different savings, the one nearest to the output of each kind."""
    inside = {node for branch in branches for node in flow.region([branch.value])}
    kept: list[fx.Node] = []
    for node in reversed(flow.nodes):
        saving = flow.exclusive[node]
        if node.op != "call_function" or node not in flow.parent or node in inside or _is_tuple(node):
            continue
        if not MIN_STAGE_SHARE * total <= saving < OUTPUT_SHARE * total or not flow.depends(node, sample):
            continue
        larger = [flow.exclusive[k] - saving for k in kept if flow.within(node, k)]
        smaller = [saving - b.macs for b in branches if flow.within(b.value, node)]
        if any(gain < MIN_STAGE_SHARE * total for gain in larger + smaller):
            continue
        kept.append(node)
    return list(dict.fromkeys([n for n in outer if flow.exclusive[n] >= MIN_STAGE_SHARE * total and n not in kept] + kept))


def _outputs(graph: fx.Graph, flow: Dataflow, sample: fx.Node) -> tuple[fx.Node, ...]:
    """What the denoiser returns, without what does not depend on the sample."""
    results = [n for n in next(iter(graph.find_nodes(op="output"))).all_input_nodes if n.op == "call_function"]
    return tuple(sorted({n for n in results if flow.depends(n, sample)}, key=lambda n: flow.index[n]))


def _is_tuple(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("val"), torch.Tensor)


def _bytes(node: fx.Node) -> int:
    value = node.meta["val"]
    return math.prod(shape_of(node)) * int(value.element_size())


def _name(kind: str, region: Sequence[fx.Node], flow: Dataflow, weights: Mapping[str, int]) -> str:
    """A module path that a person recognises.

    A branch has the name of the outermost module that owns nearly all of its MACs and little else; a stage that of the
    module where its value is made.
    """
    if kind == "output":
        return "output"
    if kind == "stage":
        path = _module_path(region[-1])
        return f"{path}:stage" if path else "stage"
    owned = _macs_by_module(region, flow)
    macs = sum(flow.macs[node] for node in region)
    owners = sorted((p for p, m in owned.items() if m >= NAME_SHARE * macs), key=lambda path: path.count("."))
    if not owners:
        return _module_path(region[-1]) or "branch"
    name = next((path for path in owners if owned[path] >= NAME_SHARE * weights[path]), owners[-1])
    # `resnets` is only a list; its one element is what a person would name
    return next((path for path in owners if path.startswith(f"{name}.") and path[len(name) + 1 :].isdigit()), name)


def _macs_by_module(nodes: Iterable[fx.Node], flow: Dataflow) -> dict[str, int]:
    """MACs of ``nodes`` by module path, enclosing modules included."""
    weights: dict[str, int] = {}
    for node in nodes:
        path = _module_path(node) if flow.macs[node] else ""
        parts = path.split(".") if path else []
        for depth in range(1, len(parts) + 1):
            prefix = ".".join(parts[:depth])
            weights[prefix] = weights.get(prefix, 0) + flow.macs[node]
    return weights


def _module_path(node: fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""


def _unique(names: Sequence[str]) -> list[str]:
    counts: dict[str, int] = {}
    result = []
    for name in names:
        counts[name] = counts.get(name, 0) + 1
        result.append(name if counts[name] == 1 else f"{name}#{counts[name]}")
    return result
