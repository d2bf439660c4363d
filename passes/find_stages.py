"""Stages: values of the whole stream that are worth caching."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import fx

from fxmask.passes.dataflow import Dataflow, Values
from fxmask.passes.residual_branches import is_tensor

MIN_BRANCH_SHARE = 0.002  # of all MACs; a smaller block is not worth a cache of its own and is merged into a neighbour
MIN_STAGE_SHARE = 0.06  # stages whose savings differ by less than this are the same candidate
OUTPUT_SHARE = 0.97  # a stage that saves this much of everything is the output under another name


def find_stages(
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
        if node.op != "call_function" or node in inside or not is_tensor(node) or not flow.depends(node, sample):
            continue
        if not step <= saving < OUTPUT_SHARE * total:
            continue
        if saving - largest.get(node, -math.inf) >= step and bound - saving >= step:
            kept.append(node)
            enclosing[node] = saving
    extra = [n for n in outer if step <= flow.exclusive[n] < OUTPUT_SHARE * total and n not in inside]
    return list(dict.fromkeys([*extra, *kept]))
