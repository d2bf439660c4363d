"""Specialise a program to the steps of a plan: one graph per distinct (compute, load, store).

    program:  %f = linear(%h, %w); %g = mul(%gate, %f); %y = add(%x, %g); return (%y,)
    skipped:  %f = placeholder[cache]; %g = mul(%gate, %f); %y = add(%x, %g); return (%y,)      %h, %w are gone
    stored:   %f = linear(%h, %w); ...; return (%y, %f)

Step graphs are functional: caches are extra inputs and outputs, mutation lives in the runtime alone. Nothing that leaves
a step graph shares memory with a cache, so that a caller may write to what it was given, and no cached view keeps a larger
tensor alive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxmask.mask import Load, Plan
from fxmask.passes.forecast import coefficient_dtype, combine
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
        graph_module: called as ``graph_module(*inputs, *coefficients, *cached)``; returns (outputs..., stores...).
        inputs: positions, in ``Program.inputs``, of the arguments that the graph needs.
        coefficients: whether a coefficient tensor follows, one entry per term of every forecast, in load order.
        load: (block, value index, number of stored values) in the order of the cached arguments.
        store: (block, value index) of the extra outputs.
        num_outputs: how many outputs come before them.
        steps: the steps that run this graph.
    """

    graph_module: fx.GraphModule
    inputs: tuple[int, ...]
    coefficients: bool
    load: tuple[tuple[str, int, int], ...]
    store: tuple[tuple[str, int], ...]
    num_outputs: int
    steps: tuple[int, ...]

    @property
    def name(self) -> str:
        """For messages: the steps that run it."""
        return "step graph of steps " + ", ".join(map(str, self.steps))


def specialize(program: Program, plan: Plan) -> tuple[StepGraph, ...]:
    """The distinct step graphs of a plan; ``plan.steps[i].graph`` is an index into them."""
    users: dict[int, list[int]] = {}
    for i, step in enumerate(plan.steps):
        if step.graph >= 0:
            users.setdefault(step.graph, []).append(i)
    return tuple(specialize_step(program, plan, steps) for _, steps in sorted(users.items()))


@graph_pass(requires=(functional, has_shapes, one_output_tuple), ensures=(functional, one_output_tuple))
def specialize_step(program: Program, plan: Plan, steps: list[int]) -> StepGraph:
    """The graph that ``steps``, which share one, run."""
    first = plan.steps[steps[0]]
    return _build(program, first.load, first.emit, tuple(steps))


def _build(program: Program, load: tuple[Load, ...], store: tuple[tuple[str, int], ...], steps: tuple[int, ...]) -> StepGraph:
    source = program.graph_module
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in source.graph.find_nodes(op="placeholder"):
        values[node] = graph.node_copy(node)
    loaded, cached, coefficients = _insert_loads(program, graph, load)
    for node in source.graph.nodes:
        if node.name in loaded:
            values[node] = loaded[node.name]
        elif node.op not in ("placeholder", "output"):
            values[node] = graph.node_copy(node, lambda n: values[n])
    stored = [values[program.node(program.block(block).values[i])] for block, i in store]
    results = [values[n] for n in next(iter(source.graph.find_nodes(op="output"))).args[0]]
    outputs = _unalias_outputs(graph, results, set(stored) | set(cached))
    stored = [value if _is_fresh(value) else _clone(graph, value) for value in stored]
    graph.output((*outputs, *stored))
    remove_dead(graph)
    used = []
    for position, node in enumerate(list(graph.find_nodes(op="placeholder"))[: len(program.inputs)]):
        if node.users:
            used.append(position)
        else:
            graph.erase_node(node)
    module = fx.GraphModule(source, graph, class_name="StepGraph")
    return StepGraph(
        graph_module=module,
        inputs=tuple(used),
        coefficients=coefficients,
        load=tuple((x.block, x.value, len(x.terms)) for x in load),
        store=store,
        num_outputs=len(results),
        steps=steps,
    )


def _insert_loads(program: Program, graph: fx.Graph, load: tuple[Load, ...]) -> tuple[dict[str, fx.Node], list[fx.Node], bool]:
    """Cache placeholders and forecasts; {cut value: node}, the placeholders, and whether there are coefficients."""
    forecasts = [x for x in load if not x.plain]
    table = graph.placeholder("coefficients") if forecasts else None
    names = [program.block(x.block).values[x.value] for x in load]
    cached: list[list[fx.Node]] = []
    for x, name in zip(load, names, strict=True):
        cached.append([graph.placeholder(f"cache_{name}_{k}") for k in range(len(x.terms))])
        for node in cached[-1]:
            node.meta = dict(program.node(name).meta)
    loaded: dict[str, fx.Node] = {}
    offset = 0

    def call(target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return graph.call_function(target, args, kwargs)

    for x, name, stored in zip(load, names, cached, strict=True):
        if x.plain:
            loaded[name] = stored[0]
        else:
            dtype = program.node(name).meta["val"].dtype
            loaded[name] = combine(call, stored, table, offset, dtype, _table_dtype(program, forecasts))
            offset += len(x.terms)
    return loaded, [node for nodes in cached for node in nodes], bool(forecasts)


def forecast_coefficients(program: Program, load: tuple[Load, ...]) -> torch.Tensor | None:
    """The coefficient tensor of one step, 1-D in load order, or ``None`` if nothing is forecast."""
    forecasts = [x for x in load if not x.plain]
    if not forecasts:
        return None
    value = program.node(program.block(forecasts[0].block).values[forecasts[0].value]).meta["val"]
    flat = [c for x in forecasts for _, c in x.terms]
    return torch.tensor(flat, dtype=_table_dtype(program, forecasts), device=value.device)


def _table_dtype(program: Program, forecasts: Sequence[Load]) -> torch.dtype:
    """The finest type that the coefficients of any of these values need."""
    types = {coefficient_dtype(program.node(program.block(x.block).values[x.value]).meta["val"].dtype) for x in forecasts}
    return torch.float64 if torch.float64 in types else torch.float32


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
