"""Specialise a program to the steps of a plan: one graph per distinct (compute, load, store).

    program:  %f = linear(%h, %w); %g = mul(%gate, %f); %y = add(%x, %g); return (%y,)
    skipped:  %f = placeholder[cache]; %g = mul(%gate, %f); %y = add(%x, %g); return (%y,)      %h, %w are gone
    stored:   %f = linear(%h, %w); ...; return (%y, %f)

Step graphs are functional: caches are extra inputs and outputs, mutation lives in the runtime alone. Nothing that leaves
a step graph shares memory with a cache, so that a caller may write to what it was given, and no cached view keeps a larger
tensor alive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from fxmask.ir.forecast import Load
from fxmask.ir.graph import copy_nodes, placeholders, returned
from fxmask.ir.plan import Plan
from fxmask.ir.program import Program
from fxmask.passes.choose_layouts import LAYOUT
from fxmask.passes.conditions import functional, has_shapes, one_output_tuple
from fxmask.passes.form_values import ValueFormer
from fxmask.passes.merge_common import merge_common
from fxmask.passes.observer import graph_pass
from fxmask.passes.remove_dead import remove_dead
from fxmask.passes.step_graph import StepGraph
from fxmask.passes.unalias import clone_of, owns_memory, unalias_outputs


def specialize(program: Program, plan: Plan, precomputed: Mapping[str, str] | None = None) -> tuple[StepGraph, ...]:
    """The distinct step graphs of a plan; ``plan.steps[i].graph`` is an index into them."""
    users: dict[int, list[int]] = {}
    for i, step in enumerate(plan.steps):
        if step.graph >= 0:
            users.setdefault(step.graph, []).append(i)
    return tuple(specialize_step(program, plan, steps, precomputed) for _, steps in sorted(users.items()))


@graph_pass(requires=(functional, has_shapes, one_output_tuple), ensures=(functional, has_shapes, one_output_tuple))
def specialize_step(
    program: Program,
    plan: Plan,
    steps: list[int],
    precomputed: Mapping[str, str] | None = None,
    marks: Mapping[str, Sequence[str]] | None = None,
) -> StepGraph:
    """The graph that ``steps``, which share one, run.

    Args:
        program: the captured denoiser.
        plan: of this program.
        steps: have one graph in the plan.
        precomputed: nodes whose values the graph is given -> the precomputed value that is equal to each.
        marks: keys for the ``meta`` of nodes.
    """
    first = plan.steps[steps[0]]
    return build_step_graph(program, first.load, first.live_out, tuple(steps), first.blend, precomputed, marks)


def build_step_graph(
    program: Program,
    load: tuple[Load, ...],
    store: tuple[tuple[str, int], ...],
    steps: tuple[int, ...],
    blend: tuple[Load, ...] = (),
    precomputed: Mapping[str, str] | None = None,
    marks: Mapping[str, Sequence[str]] | None = None,
) -> StepGraph:
    """A graph with the live nodes of a step, with cached values as inputs and stored ones as outputs."""
    source = program.graph_module
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    copy_nodes(placeholders(source.graph), graph, values)
    sources = precomputed or {}
    given = {name: graph.placeholder(f"precomputed_{name}") for name in dict.fromkeys(sources.values())}
    for name, placeholder in given.items():
        placeholder.meta = {key: value for key, value in program.node(name).meta.items() if key != LAYOUT}
    former = ValueFormer(program, graph, load, blend, values)

    def instead(node: fx.Node) -> fx.Node | None:
        if node.name in former.loads:
            return former.loaded(node.name)
        return given[sources[node.name]] if node.name in sources else None

    for node in source.graph.nodes:
        copy_nodes([node], graph, values, instead)
        if node.op == "call_function" and node.name not in former.loads:
            if values[node].op == "call_function":
                values[node].meta.update(dict.fromkeys((marks or {}).get(node.name, ()), True))
            if node.name in former.blends:
                values[node] = former.blended(node.name, values[node])
    results = [values[n] for n in returned(source.graph)]
    end = graph.output((*results, *(values[program.node(program.block(block).values[i])] for block, i in store)))
    merge_common(graph)  # before memory is told apart: a merged output and store are one tensor
    merged = list(end.args[0])
    results, stored = merged[: len(results)], merged[len(results) :]
    with graph.inserting_before(end):
        results = unalias_outputs(graph, results, set(stored) | set(former.cached) | set(given.values()))
        stored = [value if owns_memory(value) else clone_of(graph, value) for value in stored]
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
        precomputed=needed,
        coefficients=tuple(k for k, x in enumerate(load + blend) if not x.plain),
        load=tuple((x.block, x.value, len(x.slots)) for x in load + blend),
        store=store,
        num_outputs=len(results),
        steps=steps,
    )
