"""Cut step graphs into regions, so that equal regions are compiled once.

    step 0:  [embed] [attention 0] [mlp 0] [attention 1] [mlp 1] [head]
    step 1:  [embed] [load] [mlp 0] [load] [mlp 1] [head]                 all attentions are one region, all MLPs, all loads

A region is a run of consecutive nodes, so any cut is right; cuts are made where a branch joins its stream, because
there one tensor is handed on. Many small regions lose fusion and cost calls, few large ones are seldom equal: neighbours
are then merged, most frequent pair first, as byte-pair encoding merges letters (Sennrich et al., "Neural Machine
Translation of Rare Words with Subword Units", 2016), until the distinct regions reach a budget of nodes to compile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxmask.ir.graph import MARK, attribute, copy_nodes, is_view
from fxmask.ir.program import Program
from fxmask.passes.conditions import functional
from fxmask.passes.observer import graph_pass

JOIN = f"{MARK}join"  # node.meta: a branch joins its stream here
KEPT = f"{MARK}kept"  # node.meta: a cut value that some step stores
Segment = tuple[fx.Node, ...]


@dataclass(frozen=True)
class Region:
    """A part of a step graph.

    Attributes:
        graph_module: without weights of its own; equal for regions with equal keys.
        key: its structure: operators, arguments, and shapes of its inputs.
        inputs: names of the step graph's nodes that it is given.
        outputs: names of those whose values it returns.
    """

    graph_module: fx.GraphModule
    key: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def joins(program: Program) -> frozenset[str]:
    """The nodes at which branches join their streams: the first one behind a branch that also has an input before it."""
    found = set()
    order = {node: k for k, node in enumerate(program.graph_module.graph.nodes)}
    for block in program.branches:
        ends = []
        for value in block.values:
            node = program.node(value)
            before = _ancestors(node)
            end = next((n for n in _behind(node) if any(given in before for given in n.all_input_nodes)), None)
            if end is not None:
                ends.append(end)
        if ends:
            found.add(max(ends, key=order.__getitem__).name)
    return frozenset(found)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """The computed values that a node depends on."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        for given in stack.pop().all_input_nodes:
            if given not in found and given.op == "call_function":
                found.add(given)
                stack.append(given)
    return found


def _behind(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that follow as long as there is one user."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        yield node


@graph_pass(requires=(functional,))
def segments_of(graph_module: fx.GraphModule) -> list[Segment]:
    """The computed nodes of a step graph, cut behind every join."""
    segments: list[list[fx.Node]] = [[]]
    for node in graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        segments[-1].append(node)
        if node.meta.get(JOIN):
            segments.append([])
    return [tuple(segment) for segment in segments if segment]


def build_regions(graph_module: fx.GraphModule, segments: Sequence[Segment]) -> list[Region]:
    """The regions of a step graph, in the order in which they run.

    Views are made anew in each region that reads them: what is handed on has memory of its own.
    """
    home = {node: k for k, segment in enumerate(segments) for node in segment}
    end = next(iter(graph_module.graph.find_nodes(op="output")))
    copied: list[dict[fx.Node, None]] = []  # per segment its own nodes and the views that it makes anew
    for k, segment in enumerate(segments):
        nodes: dict[fx.Node, None] = {}
        for node in segment:
            _with_views(node, k, home, nodes)
        copied.append(nodes)
    needed = set(end.all_input_nodes)
    for k, nodes in enumerate(copied):
        needed |= {given for node in nodes for given in node.all_input_nodes if given not in nodes and home.get(given, k) != k}
    regions = []
    for segment, nodes in zip(segments, copied, strict=True):
        outputs = [node for node in segment if node in needed or node.meta.get(KEPT)]
        if outputs:
            regions.append(_region(graph_module, list(nodes), outputs))
    return regions


def structure(graph_module: fx.GraphModule) -> str:
    """What decides what a graph computes and how it is called, whatever its nodes are named."""
    nodes = tuple(node for node in graph_module.graph.nodes if node.op == "call_function")
    (region,) = build_regions(graph_module, [nodes])
    end = next(iter(graph_module.graph.find_nodes(op="output")))
    places = {name: k for k, name in enumerate(region.inputs)}
    inputs = [places.get(node.name) for node in graph_module.graph.find_nodes(op="placeholder")]
    return f"{region.key}\n{inputs} {[region.outputs.index(node.name) for node in end.args[0]]}"


def _with_views(node: fx.Node, k: int, home: Mapping[fx.Node, int], nodes: dict[fx.Node, None]) -> None:
    """Append a node, after the views of earlier segments that it reads."""
    for given in node.all_input_nodes:
        if given not in nodes and given in home and home[given] != k and is_view(given):
            _with_views(given, k, home, nodes)
    nodes[node] = None


def _region(graph_module: fx.GraphModule, nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Region:
    graph = fx.Graph()
    inside = set(nodes)
    inputs = list(dict.fromkeys(given for node in nodes for given in node.all_input_nodes if given not in inside))
    copies: dict[fx.Node, fx.Node] = {}
    numbers: dict[fx.Node, int] = {}
    lines = []
    for node in inputs:
        copies[node] = graph.placeholder(f"input_{len(copies)}")
        held = attribute(graph_module, node) if node.op == "get_attr" else node.meta["val"]
        copies[node].meta = {"val": held}
        numbers[node] = len(numbers)
        lines.append(_layout(held))
    for node in nodes:
        copy_nodes([node], graph, copies)
        numbers[node] = len(numbers)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: f"%{numbers[n]}")
        lines.append(f"{node.target} {args} {sorted(kwargs.items())}")
    graph.output(tuple(copies[node] for node in outputs))
    lines.append(str([numbers[node] for node in outputs]))
    module = fx.GraphModule(torch.nn.Module(), graph, class_name="Region")
    return Region(module, "\n".join(lines), tuple(n.name for n in inputs), tuple(n.name for n in outputs))


def _layout(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    return f"{value.dtype} {value.device} {tuple(map(int, value.shape))} {tuple(map(int, value.stride()))}"
