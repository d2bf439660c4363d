"""Find what is worth skipping, from the dataflow alone.

    %f = ...(%x);  %g = mul(%gate, %f);  %y = add(%x, %g)      x is an ancestor of f: a residual branch.
                                                               Cut at %f: the cheap gate stays fresh.
    %s = conv1x1(%x);  %f = conv(...(%x));  %y = add(%s, %f)   no ancestor, but one side owns far more MACs:
                                                               a branch with a convolution shortcut.
    %o = proj(...);  %a = %o[:, :n];  %b = %o[:, n:];          two branches that are views of one value:
    %y = add(%x, %a);  %z = add(%t, %b)                        cut at %o.
    %m = attend(%q, ...);  %f = p(%m[:, :n]);  %g = q(%m[:, n:])   joint attention: cutting %f or %g alone saves a
    %y = add(%x, %f);  %z = add(%t, %g)                        projection, cutting both saves the attention. One block
                                                               with the values %f and %g.

The cost of a cut is the MACs of the nodes that die with it, i.e. its subtree under post-dominance. Which branches to join
follows from the *frontier* of each node, the branches through which all its paths to the output go: what has the frontier
{f, g} dies only with both. Besides branches, values of the whole stream (outputs of U-Net levels or transformer stages)
and the denoiser's output are candidates. No class or module name decides anything; module paths only give the blocks names
that a person recognises.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fxmask.passes.count_macs import shape_of
from fxmask.passes.dataflow import Dataflow
from fxmask.passes.observer import functional, graph_pass, has_shapes, one_output_tuple
from fxmask.program import Block

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

MIN_BRANCH_SHARE = 0.002  # of all MACs; a smaller block is not worth a cache of its own and is merged into a neighbour
MIN_STAGE_SHARE = 0.06  # stages whose savings differ by less than this are the same candidate
SHORTCUT_RATIO = 0.35  # a shortcut owns at most this fraction of its branch's MACs
JOINT_RATIO = 0.5  # branches are joined if cutting them together saves this much more than the sum of their own
MAX_JOINT = 8  # at most this many branches are joined into one block
NESTED_SHARE = 0.75  # inner branches replace an outer one if they own at least this share of it
OUTPUT_SHARE = 0.97  # a stage that saves this much of everything is the output under another name
MAX_NAMES = 3  # modules that a block's name lists
NAME_SHARE = 0.9  # a block is named after a module that owns this share of its MACs

Values = tuple[fx.Node, ...]


@dataclass(frozen=True)
class _Branch:
    """A residual branch: the value to cut, and the sum that it is a term of (``(x + f) + g`` is one sum)."""

    value: fx.Node
    sum: int


@graph_pass(requires=(functional, has_shapes, one_output_tuple))
def find_blocks(graph: fx.Graph, sample: fx.Node, batch_size: int) -> tuple[Block, ...]:
    """The blocks of a functional graph, in graph order.

    Args:
        graph: functional graph with shapes in ``meta["val"]``.
        sample: the placeholder of the noisy sample.
        batch_size: of the captured call, for bytes per sample.
    """
    flow = Dataflow.of(graph, sample)
    total = sum(flow.macs.values())
    branches, outer = _choose_level(flow, _residual_branches(flow, sample))
    blocks = _merge_small(flow, _join(flow, branches), MIN_BRANCH_SHARE * total)
    owned = _owned(flow, blocks)
    stages = _stages(flow, sample, total, owned, outer)
    picks: list[tuple[str, Values]] = [("branch", values) for values in blocks]
    picks += [("stage", (node,)) for node in stages]
    outputs = _outputs(graph, flow, sample)
    if outputs:
        picks.append(("output", outputs))
    picks.sort(key=lambda pick: (flow.index[pick[1][-1]], pick[0] == "output"))
    weights = _macs_by_module(flow.nodes, flow)
    names = _unique([_name(kind, values, flow, weights, owned.get(values, ())) for kind, values in picks])
    macs = [_macs(kind, values, flow, owned) for kind, values in picks]
    return tuple(
        Block(name, kind, tuple(node.name for node in values), cost, _bytes(values, batch_size))
        for name, (kind, values), cost in zip(names, picks, macs, strict=True)
    )


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
    cuts = {b.name: tuple(nodes[v] for v in values[b.name]) for b in blocks}
    owned = _owned(flow, [cuts[b.name] for b in blocks if b.kind == "branch"])
    return tuple(
        Block(
            name=b.name,
            kind=b.kind,
            values=values[b.name],
            macs=_macs(b.kind, cuts[b.name], flow, owned),
            bytes=_bytes(cuts[b.name], batch_size),
        )
        for b in blocks
    )


def _owned(flow: Dataflow, branches: Sequence[Values]) -> dict[Values, list[fx.Node]]:
    """For each branch block the nodes that die with it alone and with no other branch before it; disjoint.

    A node is owned by a block if it is one of its values, or if every user of it is owned by that block.
    """
    owner: dict[fx.Node, Values | None] = {value: values for values in branches for value in values}
    regions: dict[Values, list[fx.Node]] = {values: [] for values in branches}
    for node in reversed(flow.nodes):
        if node not in owner:
            owners = {owner[user] for user in node.users if user in flow.parent} if node in flow.parent else set()
            owner[node] = next(iter(owners)) if len(owners) == 1 and node.op != "output" else None
        found = owner[node]
        if found is not None:
            regions[found].append(node)
    return {values: region[::-1] for values, region in regions.items()}


def _macs(kind: str, values: Values, flow: Dataflow, owned: Mapping[Values, Sequence[fx.Node]]) -> int:
    return sum(flow.macs[node] for node in owned[values]) if kind == "branch" else flow.saving(values)


def _residual_branches(flow: Dataflow, sample: fx.Node) -> list[_Branch]:
    """One candidate per residual addition whose branch saves anything, nested ones included."""
    found: dict[fx.Node, _Branch] = {}
    sums: dict[fx.Node, int] = {}
    for node in flow.nodes:
        term = _branch_operand(node, flow, sample, sums)
        if term is None:
            continue
        branch, stream = term
        sums[node] = sums[stream] if stream in sums and not flow.depends(branch, stream) else len(sums)
        value = _climb(_strip_gates(branch, flow, sample), flow)
        if flow.exclusive[value]:  # else a rotation or an embedding, not a branch
            found[value] = _Branch(value, sums[node])
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
    if not (_is_tensor(left) and _is_tensor(right)):
        return None
    return left, right


def _as_node(argument: object) -> fx.Node | None:
    return argument if isinstance(argument, fx.Node) else None


def _terms(node: fx.Node) -> list[fx.Node]:
    """The terms of a sum of any length; the node itself if it is none."""
    terms, stack = [], [node]
    while stack:
        term = stack.pop()
        parts = [a for a in term.args[:2] if isinstance(a, fx.Node) and _is_tensor(a) and shape_of(a) == shape_of(term)]
        if getattr(term.target, "overloadpacket", None) is aten.add and len(parts) == 2 and len(term.users) == 1:
            stack += parts
        else:
            terms.append(term)
    return terms


def _strip_gates(value: fx.Node, flow: Dataflow, sample: fx.Node) -> fx.Node:
    """Go up through multiplications by what does not depend on the sample, so that gates stay fresh."""
    inner = value
    while True:
        if _overload(inner) in VIEWS and inner.all_input_nodes and _is_tensor(inner.all_input_nodes[0]):
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
    if len(moving) != 1 or not _is_tensor(moving[0]) or shape_of(moving[0]) != shape_of(value):
        return None
    return None if _overload(value) is aten.div and value.args[0] is not moving[0] else moving[0]


def _climb(value: fx.Node, flow: Dataflow) -> fx.Node:
    """Where a branch is one of several views of a value that owns more, the value."""
    best = node = value
    while (_overload(node) in VIEWS or node.target is operator.getitem) and node.all_input_nodes:
        node = node.all_input_nodes[0]
        if node.op != "call_function" or node not in flow.parent:
            break
        if _is_tensor(node) and flow.exclusive[node] > flow.exclusive[best]:
            best = node
    return best


def _overload(node: fx.Node) -> object:
    return getattr(node.target, "overloadpacket", None)


def _choose_level(flow: Dataflow, found: Sequence[_Branch]) -> tuple[list[_Branch], list[fx.Node]]:
    """Of nested branches keep the inner ones if they own most of the outer one, else the outer one.

    Returns the disjoint branches in graph order, and the outer values that are left over (candidates for stages).
    """
    partners = _partners(flow, found)
    chosen: list[_Branch] = []  # the ones inside a branch are the last ones here when its turn comes
    outer: list[fx.Node] = []
    for branch in sorted(found, key=lambda b: flow.below[b.value], reverse=True):
        inside = []
        while chosen and flow.within(chosen[-1].value, branch.value):
            inside.append(chosen.pop())
        saving = flow.exclusive[branch.value]
        if inside and flow.saving([b.value for b in inside]) >= max(1, NESTED_SHARE * saving):
            outer.append(branch.value)
            chosen += reversed(inside)
            continue
        # one that shares work with a branch outside of this one is no part of it: text that only a later attention reads
        chosen += [b for b in reversed(inside) if any(not flow.within(p, branch.value) for p in partners.get(b.value, ()))]
        chosen.append(branch)
    return sorted(chosen, key=lambda b: flow.index[b.value]), sorted(outer, key=flow.index.__getitem__)


def _partners(flow: Dataflow, found: Sequence[_Branch]) -> dict[fx.Node, list[fx.Node]]:
    """For each branch the ones that it would be joined with if all were chosen."""
    partners: dict[fx.Node, list[fx.Node]] = {}
    for frontier, shared in _shared_macs(flow, found).items():
        values = [found[k].value for k in frontier]
        if shared >= JOINT_RATIO * sum(flow.exclusive[value] for value in values):
            for value in values:
                partners.setdefault(value, []).extend(values)
    return partners


def _join(flow: Dataflow, branches: Sequence[_Branch]) -> list[Values]:
    """Disjoint sets of cut values: branches that save far more together than apart are one block.

    Terms of one sum that share a matrix product (the router of a mixture of experts, a projection for attention and MLP
    side by side) are one block too.
    """
    group = list(range(len(branches)))
    members = {k: [k] for k in group}
    for frontier, shared in sorted(_shared_macs(flow, branches).items(), key=lambda item: -item[1]):
        own = sum(flow.exclusive[branches[k].value] for k in frontier)
        one_sum = len({branches[k].sum for k in frontier}) == 1
        joined = {group[k] for k in frontier}
        if len(joined) == 1 or not (one_sum or shared >= JOINT_RATIO * own):
            continue
        if sum(len(members[g]) for g in joined) > MAX_JOINT:
            continue
        first, *others = sorted(joined)
        for other in others:
            members[first] += members.pop(other)
        for k in members[first]:
            group[k] = first
    sets = [tuple(branches[k].value for k in sorted(ks)) for ks in members.values()]
    return sorted(sets, key=lambda values: flow.index[values[-1]])


def _shared_macs(flow: Dataflow, branches: Sequence[_Branch]) -> dict[frozenset[int], int]:
    """MACs by frontier, for every frontier of two branches or more.

    The frontier of a node is the set of branches through which its paths to the output go; ``None`` if one goes past them
    all (the node is never spared) or through too many.
    """
    cut = {branch.value: frozenset((k,)) for k, branch in enumerate(branches)}
    frontiers: dict[fx.Node, frozenset[int] | None] = {}
    shared: dict[frozenset[int], int] = {}
    for node in reversed(flow.nodes):
        if node.op == "output" or node not in flow.parent:
            continue
        frontier: frozenset[int] | None = frozenset()
        for user in node.users:
            if user not in flow.parent:
                continue
            beyond = cut.get(user, frontiers.get(user))
            frontier = frontier | beyond if frontier is not None and beyond is not None else None
        if frontier is not None and len(frontier) > MAX_JOINT:
            frontier = None
        frontiers[node] = frontier
        if frontier is not None and len(frontier) > 1 and node not in cut and flow.macs[node]:
            shared[frontier] = shared.get(frontier, 0) + flow.macs[node]
    return shared


def _merge_small(flow: Dataflow, blocks: Sequence[Values], least: float) -> list[Values]:
    """Blocks that save less than ``least`` go into the neighbour with which they share the longer module path.

    Blocks that save nothing are no blocks; one that stays too small because it has no neighbour is none either.
    """
    left: list[Values] = []
    right = [values for values in reversed(blocks) if flow.saving(values)]
    while right:
        values = right.pop()
        if flow.saving(values) >= max(1, least):
            left.append(values)
            continue
        before = _common_path(left[-1], values) if left else -1
        after = _common_path(values, right[-1]) if right else -1
        if before < 0 and after < 0:
            break
        if after > before:
            right.append(_union(flow, values, right.pop()))
        else:
            left.append(_union(flow, left.pop(), values))
    return left


def _union(flow: Dataflow, a: Values, b: Values) -> Values:
    return tuple(sorted({*a, *b}, key=flow.index.__getitem__))


def _common_path(a: Values, b: Values) -> int:
    pairs = zip(_module_path(a[-1]).split("."), _module_path(b[-1]).split("."), strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), 0)


def _stages(
    flow: Dataflow,
    sample: fx.Node,
    total: int,
    owned: Mapping[Values, Sequence[fx.Node]],
    outer: Sequence[fx.Node],
) -> list[fx.Node]:
    """Values of the whole stream with clearly different savings, the one nearest to the output of each kind."""
    inside: set[fx.Node] = set()
    largest: dict[fx.Node, int] = {}  # saving of the largest block that dies with a node
    for values, region in owned.items():
        inside.update(region)
        top = flow.meet(values)
        largest[top] = max(largest.get(top, 0), sum(flow.macs[node] for node in region))
    for node in flow.nodes:
        if node in largest and flow.parent[node] is not node:
            above = flow.parent[node]
            largest[above] = max(largest.get(above, 0), largest[node])
    step = MIN_STAGE_SHARE * total
    kept: list[fx.Node] = []
    enclosing: dict[fx.Node, float] = {}  # saving of the smallest kept stage that a node dies with
    for node in reversed(flow.nodes):
        if node not in flow.parent:
            continue
        enclosing[node] = bound = enclosing.get(flow.parent[node], math.inf)
        saving = flow.exclusive[node]
        if node.op != "call_function" or node in inside or not _is_tensor(node) or not flow.depends(node, sample):
            continue
        if not step <= saving < OUTPUT_SHARE * total:
            continue
        if saving - largest.get(node, -math.inf) >= step and bound - saving >= step:
            kept.append(node)
            enclosing[node] = saving
    extra = [n for n in outer if step <= flow.exclusive[n] < OUTPUT_SHARE * total and n not in inside]
    return list(dict.fromkeys([*extra, *kept]))


def _outputs(graph: fx.Graph, flow: Dataflow, sample: fx.Node) -> Values:
    """What the denoiser returns, without what does not depend on the sample."""
    results = [n for n in next(iter(graph.find_nodes(op="output"))).all_input_nodes if n.op == "call_function"]
    return tuple(sorted({n for n in results if flow.depends(n, sample)}, key=lambda n: flow.index[n]))


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _bytes(values: Values, batch_size: int) -> int:
    sizes = [math.prod(shape_of(node)) * int(node.meta["val"].element_size()) for node in values]
    return sum(sizes) // max(1, batch_size)


def _name(kind: str, values: Values, flow: Dataflow, weights: Mapping[str, int], region: Sequence[fx.Node]) -> str:
    """A module path that a person recognises.

    A branch has the name of the outermost module that owns nearly all of its MACs and little else; a stage that of the
    module where its value is made.
    """
    if kind == "output":
        return "output"
    if kind == "stage":
        path = _module_path(values[-1])
        return f"{path}:stage" if path else "stage"
    owned = _macs_by_module(region, flow)
    macs = sum(flow.macs[node] for node in region)
    owners = sorted((p for p, m in owned.items() if m >= NAME_SHARE * macs), key=lambda path: path.count("."))
    name = next((path for path in owners if owned[path] >= NAME_SHARE * weights[path]), None)
    if name is None:
        return _joint_name(owned, weights, macs) or (owners[-1] if owners else _module_path(region[-1]) or "branch")
    # `resnets` is only a list; its one element is what a person would name
    return next((path for path in owners if path.startswith(f"{name}.") and path[len(name) + 1 :].isdigit()), name)


def _joint_name(owned: Mapping[str, int], weights: Mapping[str, int], macs: int) -> str | None:
    """The outermost modules that are wholly in a region and make up nearly all of it: ``blocks.1.attn+blocks.2.attn``."""
    whole = [path for path, m in owned.items() if m >= NAME_SHARE * weights[path]]
    outermost = [p for p in whole if not any(p.startswith(f"{other}.") for other in whole)]
    chosen: list[str] = []
    for path in sorted(outermost, key=lambda p: -owned[p]):
        chosen.append(path)
        if sum(owned[p] for p in chosen) >= NAME_SHARE * macs or len(chosen) == MAX_NAMES:
            break
    enough = sum(owned[p] for p in chosen) >= 0.5 * macs
    return "+".join(sorted(chosen, key=list(owned).index)) if enough else None


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
