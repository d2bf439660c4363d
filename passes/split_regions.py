"""Cut step graphs into regions, so that equal regions are compiled once.

    step 0:  [embed] [attention 0] [mlp 0] [attention 1] [mlp 1] [head]
    step 1:  [embed] [load] [mlp 0] [load] [mlp 1] [head]                 all attentions are one region, all MLPs, all loads

A region is a run of consecutive nodes, so any cut is right; cuts are made where a branch joins its stream, because
there one tensor is handed on. Many small regions lose fusion and cost calls, few large ones are seldom equal: neighbours
are then merged, most frequent pair first, as byte-pair encoding merges letters (Sennrich et al., "Neural Machine
Translation of Rare Words with Subword Units", 2016), until the distinct regions reach a budget of nodes to compile.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import fx

from fxmask.passes.observer import functional, graph_pass
from fxmask.program import Program

JOIN = "fxmask_join"  # node.meta: a branch joins its stream here
KEPT = "fxmask_kept"  # node.meta: a cut value that some step stores

# Compiling a region costs as much as this many nodes, whatever is in it.
COMPILATION_NODES = 30

Segment = tuple[fx.Node, ...]
T = TypeVar("T")
Token = int  # stands for the structure of a segment, or for a pair of tokens


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


def is_view(node: fx.Node) -> bool:
    """Whether a node's value always shares memory with its input."""
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and is_view(source)
    schema = getattr(node.target, "_schema", None)
    returns = schema.returns if schema is not None else ()
    if not any(r.alias_info is not None for r in returns):
        return False
    value, source = node.meta.get("val"), node.all_input_nodes[0].meta.get("val")
    if isinstance(value, torch.Tensor) and isinstance(source, torch.Tensor):
        return value.dtype == source.dtype  # ``to`` returns its input, or converts it
    return True


def _region(graph_module: fx.GraphModule, nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Region:
    graph = fx.Graph()
    inside = set(nodes)
    inputs = list(dict.fromkeys(given for node in nodes for given in node.all_input_nodes if given not in inside))
    copies: dict[fx.Node, fx.Node] = {}
    numbers: dict[fx.Node, int] = {}
    lines = []
    for node in inputs:
        copies[node] = graph.placeholder(f"input_{len(copies)}")
        held = operator.attrgetter(str(node.target))(graph_module) if node.op == "get_attr" else node.meta["val"]
        copies[node].meta = {"val": held}
        numbers[node] = len(numbers)
        lines.append(_layout(held))
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
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


class Vocabulary:
    """Which neighbouring segments are merged; learned from the step graphs of one plan, applied to any.

    Args:
        overhead: what compiling a region costs besides its nodes, in nodes.
    """

    def __init__(self, overhead: int = COMPILATION_NODES) -> None:
        self._overhead = overhead
        self._merges: list[tuple[Token, Token, Token]] = []  # two neighbours, and what stands for both
        self._known: dict[Any, Token] = {}
        self._whole = False  # the graphs are so few that they need not be cut

    def _token(self, structure: Any) -> Token:
        return self._known.setdefault(structure, len(self._known))

    def uncut(self, graph_modules: Sequence[fx.GraphModule]) -> int:
        """What compiling whole step graphs costs, in nodes."""
        return sum(self._cost(sum(segments_of(module), ())) for module in graph_modules)

    def learn(self, graph_modules: Sequence[fx.GraphModule], budget: int) -> int:
        """Choose merges such that the distinct regions have at most ``budget`` nodes to compile.

        Args:
            graph_modules: the distinct step graphs.
            budget: in nodes; each region counts ``overhead`` on top of its own.

        Returns:
            What compiling the distinct regions costs; more than the budget if they do without any merge.
        """
        whole = self.uncut(graph_modules)
        self._whole = whole <= budget
        if self._whole:
            return whole
        texts = []
        size: dict[Token, int] = {}
        for module in graph_modules:
            segments = segments_of(module)
            text = self._tokens(module, segments)
            for token, segment in zip(text, segments, strict=True):
                size[token] = self._cost(segment)
            texts.append(text)
        spent = sum(size.values())
        while True:
            pair = self._best(texts, size, budget - spent)
            if pair is None:
                return spent
            made = self._token(pair)
            self._merges.append((*pair, made))
            texts = [_merge(text, text, pair, lambda a, b, made=made: made) for text in texts]  # type: ignore[misc]
            size[made] = size[pair[0]] + size[pair[1]] - self._overhead
            spent = sum(size[token] for token in {token for text in texts for token in text})

    def _cost(self, segment: Segment) -> int:
        return self._overhead + sum(not is_view(node) for node in segment)

    def split(self, graph_module: fx.GraphModule) -> list[Region]:
        """The regions of a step graph."""
        segments = segments_of(graph_module)
        if self._whole:
            return build_regions(graph_module, [sum(segments, ())])
        text = self._tokens(graph_module, segments)
        for first, second, made in self._merges:
            segments = _merge(text, segments, (first, second), operator.add)
            text = _merge(text, text, (first, second), lambda a, b, made=made: made)  # type: ignore[misc]
        return build_regions(graph_module, segments)

    def _tokens(self, graph_module: fx.GraphModule, segments: Sequence[Segment]) -> list[Token]:
        regions = build_regions(graph_module, segments)
        keys = {region.outputs: region.key for region in regions}
        named = {name: region.outputs for region in regions for name in region.outputs}
        return [self._token(next((keys[named[n.name]] for n in segment if n.name in named), "")) for segment in segments]

    def _best(self, texts: Sequence[Sequence[Token]], size: Mapping[Token, int], left: int) -> tuple[Token, Token] | None:
        """The pair that saves most calls for what it adds to compile, or ``None``."""
        single = Counter(token for text in texts for token in text)
        pairs = Counter(pair for text in texts for pair in itertools.pairwise(text))
        best, most = None, 0.0
        for (a, b), count in pairs.items():
            if a == b:
                count = sum(len(text) - len(_merge(text, text, (a, b), operator.add)) for text in texts)
            used = {a: 2 * count} if a == b else {a: count, b: count}
            gone = sum(size[token] for token, n in used.items() if single[token] == n)
            added = size[a] + size[b] - self._overhead - gone
            gain = count / max(1, added)
            if added <= left and gain > most:
                best, most = (a, b), gain
        return best


def _merge(text: Sequence[Token], items: Sequence[T], pair: tuple[Token, Token], join: Callable[[T, T], T]) -> list[T]:
    """``items``, which belong to the tokens of ``text``, with those of every occurrence of ``pair`` joined."""
    merged: list[T] = []
    k = 0
    while k < len(text):
        if tuple(text[k : k + 2]) == pair:
            merged.append(join(items[k], items[k + 1]))
            k += 1
        else:
            merged.append(items[k])
        k += 1
    return merged
