"""Specialise a program to the steps of a plan: one graph per distinct (compute, load, store).

    program:  %f = linear(%h, %w); %g = mul(%gate, %f); %y = add(%x, %g); return (%y,)
    skipped:  %f = placeholder[cache]; %g = mul(%gate, %f); %y = add(%x, %g); return (%y,)      %h, %w are gone
    stored:   %f = linear(%h, %w); ...; return (%y, %f)

Step graphs are functional: caches are extra inputs and outputs, mutation lives in the runtime alone. Nothing that leaves
a step graph shares memory with a cache, so that a caller may write to what it was given, and no cached view keeps a larger
tensor alive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxmask.mask import Load, Plan, Slot
from fxmask.passes.count_macs import count_macs
from fxmask.passes.forecast import coefficient_dtype, combine
from fxmask.passes.merge_common import merge_common
from fxmask.passes.observer import functional, graph_pass, has_shapes, one_output_tuple
from fxmask.passes.remove_dead import remove_dead
from fxmask.program import Program

aten = torch.ops.aten

# Operators that always return memory of their own. Anything else is cloned before it is cached: views, operators that
# may return their input (contiguous, dropout, to), and composite ones that are not known here.
FRESH = frozenset(
    getattr(aten, name)
    for name in (
        "linear mm bmm addmm baddbmm conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution "
        "scaled_dot_product_attention add sub mul div neg addcmul addcdiv silu gelu relu leaky_relu elu mish tanh sigmoid "
        "softmax _softmax layer_norm group_norm rms_norm native_layer_norm native_group_norm cat stack clone exp sin cos "
        "rsqrt pow _to_copy upsample_nearest2d upsample_bilinear2d avg_pool2d max_pool2d embedding sum mean"
    ).split()
)


@dataclass(frozen=True)
class StepGraph:
    """One specialised graph and how to call it.

    Attributes:
        graph_module: called as ``graph_module(*inputs, *staged, *coefficients, *cached)``; returns (outputs..., stores...).
        inputs: positions, in ``Program.inputs``, of the arguments that the graph needs.
        staged: names of the staged values that the graph needs.
        coefficients: positions, in the step's ``formed`` values, of the forecasts; a coefficient tensor follows for each.
        load: (block, value index, number of cached values) in the order of the cached arguments.
        store: (block, value index) of the extra outputs.
        num_outputs: how many outputs come before them.
        steps: the steps that run this graph.
    """

    graph_module: fx.GraphModule
    inputs: tuple[int, ...]
    staged: tuple[str, ...]
    coefficients: tuple[int, ...]
    load: tuple[tuple[str, int, int], ...]
    store: tuple[tuple[str, int], ...]
    num_outputs: int
    steps: tuple[int, ...]

    @property
    def name(self) -> str:
        """For messages: the steps that run it."""
        return "step graph of steps " + ", ".join(map(str, self.steps))


def specialize(program: Program, plan: Plan, staged: Mapping[str, str] | None = None) -> tuple[StepGraph, ...]:
    """The distinct step graphs of a plan; ``plan.steps[i].graph`` is an index into them."""
    users: dict[int, list[int]] = {}
    for i, step in enumerate(plan.steps):
        if step.graph >= 0:
            users.setdefault(step.graph, []).append(i)
    return tuple(specialize_step(program, plan, steps, staged) for _, steps in sorted(users.items()))


@graph_pass(requires=(functional, has_shapes, one_output_tuple), ensures=(functional, one_output_tuple))
def specialize_step(
    program: Program,
    plan: Plan,
    steps: list[int],
    staged: Mapping[str, str] | None = None,
    marks: Mapping[str, Sequence[str]] | None = None,
) -> StepGraph:
    """The graph that ``steps``, which share one, run.

    Args:
        program: the captured denoiser.
        plan: of this program.
        steps: have one graph in the plan.
        staged: nodes whose values the graph is given -> the staged value that is equal to each.
        marks: keys for the ``meta`` of nodes.
    """
    first = plan.steps[steps[0]]
    return _build(program, first.load, first.emit, tuple(steps), first.blend, staged, marks)


@dataclass(frozen=True)
class CutGraph:
    """A program some of whose blocks are given from outside, already formed.

    Attributes:
        step_graph: the specialised graph.
        load: (block, value index) of the values that it is given, in order.
        macs: multiply-accumulates of one call.
    """

    step_graph: StepGraph
    load: tuple[tuple[str, int], ...]
    macs: int

    @property
    def store(self) -> tuple[tuple[str, int], ...]:
        """(block, value index) of the extra outputs."""
        return self.step_graph.store

    @property
    def num_outputs(self) -> int:
        """How many outputs come before them."""
        return self.step_graph.num_outputs

    def __call__(self, tensors: Sequence[torch.Tensor], formed: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Outputs, then stores, for all of the program's inputs and the given values."""
        results: tuple[torch.Tensor, ...] = self.step_graph.graph_module(*(tensors[k] for k in self.step_graph.inputs), *formed)
        return results


def live_under(
    program: Program, loads: frozenset[str], prices: Mapping[str, float] | None = None
) -> tuple[frozenset[str], float]:
    """The blocks that a step still computes when it is given the blocks ``loads``, and what it costs.

    Args:
        program: the captured denoiser.
        loads: names of blocks.
        prices: of the nodes, by name; multiply-accumulates if not given.
    """
    live, _, cost = _live_without(program, loads)
    blocks = frozenset(b.name for b in program.blocks if b.name not in loads and live.issuperset(b.values))
    return blocks, cost if prices is None else sum(prices[name] for name in live)


def cut_graph(program: Program, loads: frozenset[str], emit: Sequence[str]) -> CutGraph:
    """The graph that is given the blocks ``loads`` and also returns the values of the blocks ``emit``."""
    _, reached, macs = _live_without(program, loads)
    load = tuple(Load(name, i, 1, ((Slot(name, i, 0), 1.0),)) for name, i in reached)
    store = tuple((name, i) for name in emit for i in range(len(program.block(name).values)))
    return CutGraph(_build(program, load, store, ()), tuple((x.block, x.value) for x in load), macs)


def _live_without(program: Program, loads: frozenset[str]) -> tuple[set[str], list[tuple[str, int]], int]:
    """Names of the live nodes, the (block, value index) of ``loads`` that they read, in graph order, and the MACs."""
    given = {value: (name, i) for name in loads for i, value in enumerate(program.block(name).values)}
    reached: list[tuple[str, int]] = []
    live: set[str] = set()
    macs = 0
    for node in reversed(program.graph_module.graph.nodes):
        if node.op != "output" and not any(user.name in live for user in node.users):
            continue
        if node.name in given:
            reached.append(given[node.name])
            continue
        live.add(node.name)
        macs += count_macs(node)
    return live, reached[::-1], macs


def _build(
    program: Program,
    load: tuple[Load, ...],
    store: tuple[tuple[str, int], ...],
    steps: tuple[int, ...],
    blend: tuple[Load, ...] = (),
    staged: Mapping[str, str] | None = None,
    marks: Mapping[str, Sequence[str]] | None = None,
) -> StepGraph:
    source = program.graph_module
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in source.graph.find_nodes(op="placeholder"):
        values[node] = graph.node_copy(node)
    sources = staged or {}
    given = {name: graph.placeholder(f"staged_{name}") for name in dict.fromkeys(sources.values())}
    for name, placeholder in given.items():
        placeholder.meta = dict(program.node(name).meta)
    former = _Former(program, graph, load, blend, values)
    for node in source.graph.nodes:
        if node.name in former.loads:
            values[node] = former.loaded(node.name)
        elif node.op not in ("placeholder", "output"):
            values[node] = given[sources[node.name]] if node.name in sources else graph.node_copy(node, lambda n: values[n])
            if values[node].op == "call_function":
                values[node].meta.update(dict.fromkeys((marks or {}).get(node.name, ()), True))
            if node.name in former.blends:
                values[node] = former.blended(node.name, values[node])
    results = [values[n] for n in next(iter(source.graph.find_nodes(op="output"))).args[0]]
    end = graph.output((*results, *(values[program.node(program.block(block).values[i])] for block, i in store)))
    merge_common(graph)  # before memory is told apart: a merged output and store are one tensor
    merged = list(end.args[0])
    results, stored = merged[: len(results)], merged[len(results) :]
    with graph.inserting_before(end):
        results = _unalias_outputs(graph, results, set(stored) | set(former.cached) | set(given.values()))
        stored = [value if _is_fresh(value) else _clone(graph, value) for value in stored]
    end.args = ((*results, *stored),)
    remove_dead(graph)
    used = []
    for position, node in enumerate(list(graph.find_nodes(op="placeholder"))[: len(program.inputs)]):
        if node.users:
            used.append(position)
        else:
            graph.erase_node(node)
    needed = tuple(name for name, node in given.items() if node.users)
    for node in given.values():
        if not node.users:
            graph.erase_node(node)
    module = fx.GraphModule(source, graph, class_name="StepGraph")
    return StepGraph(
        graph_module=module,
        inputs=tuple(used),
        staged=needed,
        coefficients=tuple(k for k, x in enumerate(load + blend) if not x.plain),
        load=tuple((x.block, x.value, len(x.slots)) for x in load + blend),
        store=store,
        num_outputs=len(results),
        steps=steps,
    )


class _Former:
    """Emits cache placeholders, and the values that are formed from them.

    Args:
        program: the program.
        graph: the step graph, with the program's placeholders in it and nothing else.
        load: cut values that are not computed.
        blend: cut values that are computed first.
        inputs: the program's placeholders -> the step graph's.
    """

    def __init__(
        self,
        program: Program,
        graph: fx.Graph,
        load: tuple[Load, ...],
        blend: tuple[Load, ...],
        inputs: Mapping[fx.Node, fx.Node],
    ) -> None:
        names = {x: program.block(x.block).values[x.value] for x in load + blend}
        self.graph = graph
        self.loads = {names[x]: x for x in load}
        self.blends = {names[x]: x for x in blend}
        self._present = inputs[program.node(program.input_block.values[0])]
        self._like = {x: program.node(names[x]) for x in load + blend}
        self._coefficients = {x: self._coefficient_input(x) for x in load + blend if not x.plain}
        self._stored: dict[Load, list[fx.Node]] = {}
        for x in load + blend:
            self._stored[x] = [graph.placeholder(f"cache_{names[x]}_{k}") for k in range(len(x.slots))]
            for node in self._stored[x]:
                node.meta = dict(self._like[x].meta)

    def _coefficient_input(self, x: Load) -> fx.Node:
        node = self.graph.placeholder(f"coefficients_{self._like[x].name}")
        node.meta = {"val": forecast_coefficients(x, self._like[x].meta["val"])}
        return node

    @property
    def cached(self) -> list[fx.Node]:
        """Every cache placeholder."""
        return [node for nodes in self._stored.values() for node in nodes]

    def loaded(self, name: str) -> fx.Node:
        """The value of a loaded node."""
        x = self.loads[name]
        return self._stored[x][0] if x.plain else self._combine(x, None)

    def blended(self, name: str, computed: fx.Node) -> fx.Node:
        """What takes the place of a node that has just been computed."""
        return self._combine(self.blends[name], computed)

    def _combine(self, x: Load, computed: fx.Node | None) -> fx.Node:
        ahead = iter(self._stored[x])
        sources = []
        for slot, _ in x.terms:
            present = computed if slot.block == x.block else self._present
            sources.append(next(ahead) if slot.step < x.step else present)
        result = combine(self._call, sources, self._coefficients[x], self._like[x].meta["val"].dtype)
        assert isinstance(result, fx.Node)
        result.meta = dict(self._like[x].meta)
        return result

    def _call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)


def forecast_coefficients(load: Load, like: torch.Tensor) -> torch.Tensor:
    """The coefficients of a forecast, 1-D, in the precision and on the device for values like ``like``."""
    return torch.tensor([c for _, c in load.terms], dtype=coefficient_dtype(like.dtype), device=like.device)


def _is_fresh(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "overloadpacket", None) in FRESH


def _root(node: fx.Node) -> fx.Node:
    """The node whose memory ``node`` may share, following everything that is not known to be fresh."""
    while node.op == "call_function" and not _is_fresh(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _unalias_outputs(graph: fx.Graph, results: list[fx.Node], cached: set[fx.Node]) -> list[fx.Node]:
    """Clone outputs that may share memory with a cached value, read or written."""
    roots = {_root(node) for node in cached} | cached
    return [_clone(graph, node) if _root(node) in roots or node in roots else node for node in results]


def _clone(graph: fx.Graph, node: fx.Node) -> fx.Node:
    copy = graph.call_function(aten.clone.default, (node,))
    copy.meta = dict(node.meta)
    return copy
