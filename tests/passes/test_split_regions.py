"""Step graphs in parts: any cut computes the same, equal parts are compiled once, however many steps and layers there are."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import TinyTransformer, make_calls
from torch import fx

import fxmask
from fxmask.backends import inductor
from fxmask.backends.inductor import Regions
from fxmask.backends.straight_line import chain_regions
from fxmask.passes.merge_regions import Vocabulary
from fxmask.passes.split_regions import build_regions, joins, segments_of, structure
from fxmask.runtime.executor import Executor
from fxmask.runtime.graph_store import GraphStore


def plan_of(depth: int, steps: int, seed: int = 0):
    """Every row of the mask is drawn, so nearly every step has a graph of its own."""
    torch.manual_seed(0)
    model = TinyTransformer(depth=depth).eval()
    timesteps = tuple(float(t) for t in torch.linspace(990, 10, steps).round())
    calls = make_calls(timesteps=timesteps)
    program = fxmask.capture(model, calls[0])
    rows = torch.rand(steps, 2 * depth, generator=torch.Generator().manual_seed(seed)) < 0.5
    rows[0] = True
    mask = fxmask.Mask(rows, timesteps, [b.name for b in program.branches])
    return program, fxmask.rectify(program, mask), calls


def graphs_of(program, plan):
    executor = Executor(plan, GraphStore(program, "eager"))
    steps = {step.graph: i for i, step in enumerate(plan.steps)}
    return [executor.graphs.get(plan, i)[0].graph_module for i in steps.values()]


def regions_of(program, plan, budget: int):
    vocabulary = Vocabulary()
    graphs = graphs_of(program, plan)
    vocabulary.choose_merges(graphs, budget)
    return [vocabulary.split(graph) for graph in graphs]


def run_in_parts(graph_module, segments, inputs):
    """What the regions compute one after the other, in eager mode."""
    regions = build_regions(graph_module, segments)
    runs = [region.graph_module for region in regions]
    return chain_regions(graph_module, regions, runs)(*inputs)


def test_joins_are_the_residual_sums():
    program, _, _ = plan_of(3, 2)
    found = joins(program)
    assert len(found) == 6
    assert all("add" in name for name in found)


def test_any_cut_computes_the_same():
    """Cuts anywhere, not only at joins: every node is computed once, views are made anew where they are read."""
    program, plan, _ = plan_of(2, 4)
    draw = random.Random(0)
    for step, graph in enumerate(graphs_of(program, plan)):
        inputs = [torch.randn(n.meta["val"].shape) for n in graph.graph.find_nodes(op="placeholder")]
        inputs = [x.to(n.meta["val"].dtype) for x, n in zip(inputs, graph.graph.find_nodes(op="placeholder"), strict=True)]
        nodes = [n for n in graph.graph.nodes if n.op == "call_function"]
        expected = graph(*inputs)
        for _ in range(5):
            ends = sorted(draw.sample(range(1, len(nodes)), 4))
            segments = [tuple(nodes[a:b]) for a, b in zip([0, *ends], [*ends, len(nodes)], strict=True)]
            got = run_in_parts(graph, segments, inputs)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), step


def test_compilations_grow_neither_with_steps_nor_with_layers():
    def distinct(depth: int, steps: int) -> int:
        program, plan, _ = plan_of(depth, steps)
        assert plan.distinct_graphs >= min(steps, 2 ** (2 * depth)) // 2
        return len({region.key for regions in regions_of(program, plan, 0) for region in regions})

    few = distinct(4, 20)
    assert distinct(4, 60) <= few + 1
    assert distinct(8, 20) <= few + 1
    assert few <= 8


def structure_of(value: torch.Tensor) -> str:
    """Of a graph with one operator, on a tensor like this one."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.ops.aten.gelu.default, (x,))
    x.meta = y.meta = {"val": value}
    graph.output((y,))
    return structure(fx.GraphModule({}, graph))


@pytest.mark.parametrize(
    "other",
    [torch.empty(3, 4), torch.empty(4, 2).T, torch.empty(2, 4, dtype=torch.float64), torch.empty(2, 4, device="meta")],
    ids=["shape", "strides", "type", "device"],
)
def test_equal_operators_on_other_tensors_are_other_regions(other):
    """What is compiled for one memory layout is wrong for another."""
    assert structure_of(torch.zeros(2, 4)) == structure_of(torch.ones(2, 4))
    assert structure_of(torch.zeros(2, 4)) != structure_of(other)


@pytest.mark.parametrize("kind", ["branch", "stage"])
def test_a_blend_is_one_region_whether_or_not_it_is_stored(kind):
    """Steps 1 and 2 blend alike. Step 2 reads what step 1 stores, nobody what step 2 would; and it loads the last branch."""
    program, _, _ = plan_of(2, 3)
    first = next(block.name for block in program.blocks if block.kind == kind)
    blends = {(step, first): ((step - 1, 0.5), (step, 0.5)) for step in (1, 2)}
    mask = fxmask.Mask([[1, 1], [1, 1], [1, 0]], (900, 700, 500), (first, program.branches[-1].name), blends)
    _, stores, loads = regions_of(program, fxmask.rectify(program, mask), 0)
    new = {region.key for region in loads} - {region.key for region in stores}
    assert len(new) == 1, "the region that loads is the only one that differs"


def test_budget_buys_larger_regions():
    program, plan, _ = plan_of(4, 12)
    small, large = (regions_of(program, plan, budget) for budget in (0, 1000))
    assert sum(map(len, large)) < sum(map(len, small))
    whole = regions_of(program, plan, 10**6)
    assert all(len(regions) == 1 for regions in whole)


def test_a_lone_graph_is_not_cut():
    program, plan, _ = plan_of(3, 4)
    ones = fxmask.rectify(program, fxmask.Mask.ones(program, plan.mask.timesteps))
    regions = Regions()
    graphs = graphs_of(program, ones)
    regions.prepare(graphs)
    assert [len(regions._vocabulary.split(graph)) for graph in graphs] == [1]


def test_segments_end_behind_joins():
    program, plan, _ = plan_of(2, 3)
    full = graphs_of(program, plan)[0]
    segments = segments_of(full)
    assert len(segments) == 5, "four branches and the head"
    assert sum(map(len, segments)) == sum(n.op == "call_function" for n in full.graph.nodes)


@pytest.mark.skipif(inductor.cpu_compiler_problem() is not None, reason="no C++ compiler")
def test_compilations_of_a_plan_are_counted():
    """Twice the steps, all of them new graphs, and not one compilation more; nothing runs eagerly."""
    before = inductor.compilations
    program, plan, calls = plan_of(3, 24)
    accelerated = fxmask.compile(program, plan, backend="inductor")
    with accelerated.generation():
        got = [accelerated(**call) for call in calls[:12]]
        half = inductor.compilations - before
        got += [accelerated(**call) for call in calls[12:]]
    assert inductor.compilations - before <= half + 1
    assert half <= 12
    for value, expected in zip(got, fxmask.reference.run(program, plan.source, calls), strict=True):
        assert torch.allclose(value, expected, atol=1e-5)
