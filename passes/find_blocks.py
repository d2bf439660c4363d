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
from collections.abc import Mapping, Sequence

from torch import fx

from fxmask.ir.block import Block
from fxmask.ir.graph import copy_nodes, returned
from fxmask.ir.macs import shape_of
from fxmask.passes.conditions import functional, has_shapes, one_output_tuple
from fxmask.passes.dataflow import Dataflow, Values
from fxmask.passes.find_stages import MIN_BRANCH_SHARE, find_stages
from fxmask.passes.find_streams import find_streams
from fxmask.passes.join_branches import choose_nesting, join_branches, merge_small_branches
from fxmask.passes.name_blocks import block_name, macs_by_module, place_of, unique_names
from fxmask.passes.observer import graph_pass
from fxmask.passes.residual_branches import residual_branches

ADDITIVE = ("branch", "stream")  # kinds of blocks whose MACs add up


@graph_pass(requires=(functional, has_shapes, one_output_tuple))
def find_blocks(graph: fx.Graph, sample: fx.Node | Sequence[fx.Node], batch_size: int) -> tuple[Block, ...]:
    """The blocks of a functional graph, in graph order.

    Args:
        graph: functional graph with shapes in ``meta["val"]``.
        sample: the placeholder of the noisy sample, or the placeholders of a list of them.
        batch_size: of the captured call, for bytes per sample.
    """
    graph, sample = _one_sample(graph, [sample] if isinstance(sample, fx.Node) else sample)
    flow = Dataflow.of(graph, sample)
    total = sum(flow.macs.values())
    branches, outer = choose_nesting(flow, residual_branches(flow, sample))
    blocks = merge_small_branches(flow, join_branches(flow, branches), MIN_BRANCH_SHARE * total)
    owned = _owned(flow, blocks)
    stages = find_stages(flow, sample, total, owned, outer)
    picks: list[tuple[str, Values]] = [("branch", values) for values in blocks]
    picks += [("stage", (node,)) for node in stages]
    outputs = _outputs(graph, flow, sample)
    if outputs:
        picks.append(("output", outputs))
    picks.sort(key=lambda pick: (flow.index[pick[1][-1]], pick[0] == "output"))
    weights = macs_by_module(flow.nodes, flow)
    names = unique_names([block_name(kind, values, flow, weights, owned.get(values, ())) for kind, values in picks])
    macs = [_macs(kind, values, flow, owned) for kind, values in picks]
    found = zip(names, picks, macs, strict=True)
    return tuple(_block(name, kind, values, cost, flow, stages, batch_size) for name, (kind, values), cost in found)


def _one_sample(graph: fx.Graph, samples: Sequence[fx.Node]) -> tuple[fx.Graph, fx.Node]:
    """The graph and its sample; of several samples a copy of the graph, with the same names, that takes them from one list.

    %x_0 = placeholder; %x_1 = placeholder   becomes   %all = placeholder; %x_0 = getitem(%all, 0); %x_1 = getitem(%all, 1)
    """
    if len(samples) == 1:
        return graph, samples[0]
    joined = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    everything = joined.create_node("placeholder", "all_samples", name="all_samples_of_the_list")
    everything.meta["val"] = tuple(node.meta["val"] for node in samples)
    for k, node in enumerate(samples):
        copies[node] = joined.create_node("call_function", operator.getitem, (everything, k), name=node.name)
        copies[node].meta = dict(node.meta)
    copy_nodes(graph.nodes, joined, copies)
    joined.output(tuple(copies[node] for node in returned(graph)))
    assert all(node.name == copy.name for node, copy in copies.items())
    return joined, everything


def _block(
    name: str, kind: str, values: Values, macs: int, flow: Dataflow, stages: Sequence[fx.Node], batch_size: int
) -> Block:
    return Block(
        name=name,
        kind=kind,
        values=tuple(node.name for node in values),
        macs=macs,
        bytes=_bytes(values, batch_size),
        operator=str(getattr(values[-1].target, "overloadpacket", values[-1].target)),
        place=place_of(values[-1]) if kind == "stage" else "",
        depth=sum(flow.within(values[-1], other) for other in stages) if kind == "stage" else 0,
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
    owned = {}
    for kind in ADDITIVE:
        owned.update(_owned(flow, [cuts[b.name] for b in blocks if b.kind == kind]))
    stages = [cuts[b.name][-1] for b in blocks if b.kind == "stage"]
    return tuple(
        _block(b.name, b.kind, cuts[b.name], _macs(b.kind, cuts[b.name], flow, owned), flow, stages, batch_size) for b in blocks
    )


def describe_streams(graph: fx.Graph, blocks: Sequence[Block], batch_size: int) -> tuple[Block, ...]:
    """The stream blocks of a graph whose branch blocks are known; see ``find_streams``."""
    found = dict(find_streams(graph, [block for block in blocks if block.kind == "branch"]))
    streams = [Block(name, "stream", values, 0, 0) for name, values in found.items()]
    return describe_blocks(graph, streams, found, batch_size)


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
    return sum(flow.macs[node] for node in owned[values]) if kind in ADDITIVE else flow.saving(values)


def _outputs(graph: fx.Graph, flow: Dataflow, sample: fx.Node) -> Values:
    """What the denoiser returns, without what does not depend on the sample."""
    results = [n for n in next(iter(graph.find_nodes(op="output"))).all_input_nodes if n.op == "call_function"]
    return tuple(sorted({n for n in results if flow.depends(n, sample)}, key=lambda n: flow.index[n]))


def _bytes(values: Values, batch_size: int) -> int:
    sizes = [math.prod(shape_of(node)) * int(node.meta["val"].element_size()) for node in values]
    return sum(sizes) // max(1, batch_size)
