"""Which branches are one block: of nested ones one level, of those that share their work all, of small ones neighbours."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from fxmask.ir.graph import module_path
from fxmask.passes.dataflow import Dataflow, Values
from fxmask.passes.residual_branches import Branch

JOINT_RATIO = 0.5  # branches are joined if cutting them together saves this much more than the sum of their own
MAX_JOINT = 8  # at most this many branches are joined into one block
NESTED_SHARE = 0.75  # inner branches replace an outer one if they own at least this share of it


def choose_nesting(flow: Dataflow, found: Sequence[Branch]) -> tuple[list[Branch], list[fx.Node]]:
    """Of nested branches keep the inner ones if they own most of the outer one, else the outer one.

    Returns the disjoint branches in graph order, and the outer values that are left over (candidates for stages).
    """
    partners = _partners(flow, found)
    chosen: list[Branch] = []  # the ones inside a branch are the last ones here when its turn comes
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


def _partners(flow: Dataflow, found: Sequence[Branch]) -> dict[fx.Node, list[fx.Node]]:
    """For each branch the ones that it would be joined with if all were chosen."""
    partners: dict[fx.Node, list[fx.Node]] = {}
    for frontier, shared in _shared_macs(flow, found).items():
        values = [found[k].value for k in frontier]
        if shared >= JOINT_RATIO * sum(flow.exclusive[value] for value in values):
            for value in values:
                partners.setdefault(value, []).extend(values)
    return partners


def join_branches(flow: Dataflow, branches: Sequence[Branch]) -> list[Values]:
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


def _shared_macs(flow: Dataflow, branches: Sequence[Branch]) -> dict[frozenset[int], int]:
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


def merge_small_branches(flow: Dataflow, blocks: Sequence[Values], least: float) -> list[Values]:
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
    pairs = zip(module_path(a[-1]).split("."), module_path(b[-1]).split("."), strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), 0)
