"""Soft mask and cache, the paper's Eq. 3 and 4 (arXiv 2603.19939).

    before:  %v = linear(%h, %w)
    after:   %v = linear(%h, %w);  %x = mul(%v, %s_b) + mul(%cache_v, 1 - %s_b);  users of %v read %x

At ``s = 1`` and ``s = 0`` the soft graph equals the hard one bit for bit (for finite values).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fxmask.passes.observer import functional, graph_pass, has_shapes, one_output_tuple
from fxmask.program import Block, Program

aten = torch.ops.aten


@dataclass(frozen=True)
class SoftGraph:
    """A program whose blocks are blended with their caches.

    Attributes:
        graph_module: called as ``graph_module(*inputs, scores, *caches)`` with ``scores`` float ``[B]`` and one cached
            tensor per cut value; returns (outputs..., blended values...). Its weights require no gradient.
        blocks: the B blocks, in the order of ``scores``.
        values: (block position, node name) of each cut value, in the order of ``caches``.
        num_outputs: how many outputs come before the blended values.
    """

    graph_module: fx.GraphModule
    blocks: tuple[Block, ...]
    values: tuple[tuple[int, str], ...]
    num_outputs: int

    def empty_caches(self, program: Program) -> list[torch.Tensor]:
        """Zeros in the shape of every cut value, for a first step at which every score is 1."""
        return [torch.zeros_like(_materialise(program.node(name))) for _, name in self.values]


def _materialise(node: fx.Node) -> torch.Tensor:
    value = node.meta["val"]
    return torch.empty(tuple(int(s) for s in value.shape), dtype=value.dtype, device=value.device)


@graph_pass(requires=(functional, has_shapes, one_output_tuple), ensures=(functional, one_output_tuple))
def insert_soft_mask(program: Program, blocks: Sequence[Block]) -> SoftGraph:
    """Blend every cut value of ``blocks`` with a cache, weighted by the block's score."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    cut = {name: (b, name) for b, block in enumerate(blocks) for name in block.values}
    order = [cut[node.name] for node in program.graph_module.graph.nodes if node.name in cut]
    for node in program.graph_module.graph.find_nodes(op="placeholder"):
        copies[node] = graph.node_copy(node)
    scores = graph.placeholder("scores")
    caches = {name: graph.placeholder(f"cache_{name}") for _, name in order}
    blended: dict[str, fx.Node] = {}
    for node in program.graph_module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        if node.name in cut:
            dtype = node.meta["val"].dtype
            score = graph.call_function(aten.select.int, (scores, 0, cut[node.name][0]))
            score = graph.call_function(aten._to_copy.default, (score,), {"dtype": dtype})
            rest = graph.call_function(aten.rsub.Scalar, (score, 1))
            fresh = graph.call_function(aten.mul.Tensor, (copies[node], score))
            stale = graph.call_function(aten.mul.Tensor, (caches[node.name], rest))
            blended[node.name] = copies[node] = graph.call_function(aten.add.Tensor, (fresh, stale))
    output = next(iter(program.graph_module.graph.find_nodes(op="output")))
    results = [copies[n] for n in output.args[0]]
    graph.output((*results, *(blended[name] for _, name in order)))
    weights = {
        str(node.target): operator.attrgetter(str(node.target))(program.graph_module).detach()
        for node in graph.nodes
        if node.op == "get_attr"
    }
    module = fx.GraphModule(weights, graph, class_name="SoftGraph")
    return SoftGraph(module, tuple(blocks), tuple(order), len(results))
