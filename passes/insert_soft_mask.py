"""Soft mask and cache, the paper's Eq. 3 and 4 (arXiv 2603.19939).

    before:  %v = linear(%h, %w)
    after:   %v = linear(%h, %w);  %x = mul(%v, %s_b) + mul(%cache_v, 1 - %s_b);  users of %v read %x

At ``s = 1`` and ``s = 0`` the soft graph equals the hard one bit for bit (for finite values).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxmask.ir.block import Block
from fxmask.ir.graph import attribute, copy_nodes, placeholders, returned
from fxmask.ir.program import Program
from fxmask.passes.conditions import functional, has_shapes, one_output_tuple
from fxmask.passes.observer import graph_pass

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


@graph_pass(requires=(functional, has_shapes, one_output_tuple), ensures=(functional, has_shapes, one_output_tuple))
def insert_soft_mask(program: Program, blocks: Sequence[Block]) -> SoftGraph:
    """Blend every cut value of ``blocks`` with a cache, weighted by the block's score."""
    source = program.graph_module.graph
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    cut = {name: b for b, block in enumerate(blocks) for name in block.values}
    order = [(cut[node.name], node.name) for node in source.nodes if node.name in cut]
    copy_nodes(placeholders(source), graph, copies)
    scores = graph.placeholder("scores")
    scores.meta = {"val": torch.empty(len(blocks))}
    caches = {name: graph.placeholder(f"cache_{name}") for _, name in order}
    blended: dict[str, fx.Node] = {}
    for node in source.nodes:
        copy_nodes([node], graph, copies)
        if node.name in cut:
            caches[node.name].meta = {"val": node.meta["val"]}
            blended[node.name] = copies[node] = _blend(graph, scores, cut[node.name], copies[node], caches[node.name])
    results = [copies[n] for n in returned(source)]
    graph.output((*results, *(blended[name] for _, name in order)))
    weights = {
        str(node.target): attribute(program.graph_module, node).detach() for node in graph.nodes if node.op == "get_attr"
    }
    module = fx.GraphModule(weights, graph, class_name="SoftGraph")
    return SoftGraph(module, tuple(blocks), tuple(order), len(results))


def _blend(graph: fx.Graph, scores: fx.Node, b: int, value: fx.Node, cache: fx.Node) -> fx.Node:
    """``value * s_b + cache * (1 - s_b)``."""
    like = value.meta["val"]
    score = _emit(graph, scores.meta["val"][b], aten.select.int, scores, 0, b)
    score = _emit(graph, scores.meta["val"][b].to(like.dtype), aten._to_copy.default, score, dtype=like.dtype)
    rest = _emit(graph, score.meta["val"], aten.rsub.Scalar, score, 1)
    fresh = _emit(graph, like, aten.mul.Tensor, value, score)
    stale = _emit(graph, like, aten.mul.Tensor, cache, rest)
    return _emit(graph, like, aten.add.Tensor, fresh, stale)


def _emit(graph: fx.Graph, like: torch.Tensor, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    node = graph.call_function(target, args, kwargs)
    node.meta = {"val": like}
    return node
