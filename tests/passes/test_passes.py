"""Single passes: a match, a near miss, a no-op, a violated precondition."""

from __future__ import annotations

import operator
import re

import pytest
import torch
from conftest import TIMESTEPS, every_other, make_calls
from torch import fx

import fxmask
from fxmask.errors import MaskError, PassError
from fxmask.ir.macs import count_attention_macs, count_macs
from fxmask.passes.dataflow import Dataflow
from fxmask.passes.insert_soft_mask import insert_soft_mask
from fxmask.passes.remove_dead import remove_dead
from fxmask.passes.specialize import specialize

aten = torch.ops.aten


def export(function, *args) -> fx.Graph:
    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return function(*inputs)

    return torch.export.export(Module(), args, strict=False).run_decompositions({}).graph


def macs_of(function, *args) -> int:
    return sum(count_macs(node) for node in export(function, *args).nodes)


F = torch.nn.functional


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (F.linear, [(2, 3, 4), (5, 4), (5,)], 2 * 3 * 5 * 4),
        (torch.mm, [(2, 3), (3, 4)], 2 * 3 * 4),
        (torch.bmm, [(5, 2, 3), (5, 3, 4)], 5 * 2 * 3 * 4),
        (torch.matmul, [(5, 1, 2, 3), (6, 3, 4)], 5 * 6 * 2 * 3 * 4),
        (torch.addmm, [(4,), (2, 3), (3, 4)], 2 * 3 * 4),
        (torch.baddbmm, [(5, 2, 4), (5, 2, 3), (5, 3, 4)], 5 * 2 * 3 * 4),
        (lambda x, w: F.conv1d(x, w, padding=1), [(2, 3, 8), (4, 3, 3)], 2 * 8 * 4 * 3 * 3),
        (lambda x, w: F.conv2d(x, w, stride=2), [(2, 4, 8, 8), (6, 4, 2, 2)], 2 * 16 * 6 * 4 * 4),
        (lambda x, w: F.conv2d(x, w, groups=4), [(2, 4, 8, 8), (4, 1, 1, 1)], 2 * 64 * 4),
        (F.conv3d, [(1, 2, 4, 4, 4), (3, 2, 2, 2, 2)], 27 * 3 * 2 * 8),
        (lambda x, w: F.conv_transpose2d(x, w, stride=2), [(2, 4, 8, 8), (4, 6, 2, 2)], 2 * 4 * 64 * 6 * 4),
        (lambda a, b: torch.einsum("bij,bjk->bik", a, b), [(2, 3, 4), (2, 4, 5)], 2 * 3 * 4 * 5),
        (lambda a, b: torch.einsum("...ij,jk", a, b), [(2, 6, 3, 4), (4, 5)], 2 * 6 * 3 * 4 * 5),
        (lambda a: torch.einsum("nhw->nwh", a), [(2, 3, 4)], 0),
        (lambda a, b: a * b + a.exp(), [(2, 3), (2, 3)], 0),
        (F.scaled_dot_product_attention, [(2, 4, 6, 8), (2, 4, 10, 8), (2, 4, 10, 12)], 2 * 4 * 6 * 10 * (8 + 12)),
    ],
)
def test_count_macs(function, shapes, expected):
    assert macs_of(function, *(torch.randn(shape) for shape in shapes)) == expected


def test_count_attention_macs(tiny):
    # per layer: batch 2, 6 tokens, width 8, products with keys and with values
    assert sum(count_attention_macs(n) for n in tiny.graph_module.graph.nodes) == 2 * (2 * 6 * 6 * 8 * 2)
    assert tiny.attention_macs == 2 * (2 * 6 * 6 * 8 * 2)


def test_remove_dead_removes_attention():
    """fx's own dead-code elimination keeps it, and with it the branch that feeds it."""
    graph = export(lambda q: (F.scaled_dot_product_attention(q, q, q), q + 1), torch.randn(1, 2, 4, 8))
    output = next(iter(graph.find_nodes(op="output")))
    output.args = ((output.args[0][1],),)
    graph.eliminate_dead_code()
    before = [str(n.target) for n in graph.nodes]
    assert any("attention" in name for name in before)
    assert remove_dead(graph).modified
    assert not any("attention" in str(n.target) or "assert" in str(n.target) for n in graph.nodes)
    assert not remove_dead(graph).modified


def test_remove_dead_refuses_a_graph_with_effects():
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(aten.add_.Tensor, (x, 1))
    graph.output((x,))
    with pytest.raises(PassError, match="requires functional"):
        remove_dead(graph)


def test_dataflow_post_dominators():
    graph = fx.Graph()
    x = graph.placeholder("x")
    a, b = graph.call_function(operator.neg, (x,)), graph.call_function(operator.pos, (x,))
    c = graph.call_function(operator.add, (a, b))
    dead = graph.call_function(operator.neg, (c,))
    graph.output((c,))
    flow = Dataflow.of(graph)
    assert flow.parent[a] is c
    assert flow.parent[x] is c
    assert dead not in flow.parent
    assert flow.within(x, c)
    assert not flow.within(x, a)
    assert flow.depends(c, x)
    assert not flow.depends(a, b)
    assert flow.region([a, b]) == [x, a, b]


def test_soft_graph_at_zero_and_one(tiny):
    soft = insert_soft_mask(tiny, tiny.branches)
    calls = make_calls()
    mask = every_other(tiny)
    hard = fxmask.reference.run(tiny, mask, calls)
    caches = soft.empty_caches(tiny)
    for i, call in enumerate(calls):
        inputs = tiny.signature.bind((), call).tensors.values()
        results = soft.graph_module(*inputs, mask.compute[i].float(), *caches)
        assert torch.equal(results[0], hard[i])
        caches = [new if mask.compute[i, b] else old for (b, _), new, old in zip(soft.values, results[1:], caches, strict=True)]


def test_soft_graph_gradient_is_the_difference_to_the_cache(tiny):
    """d x / d s = v - cache for the last block, by finite differences in float64."""
    model = tiny.model
    call = {**make_calls()[0], "t": torch.tensor(5.0, dtype=torch.float64)}
    double = fxmask.capture(type(model)().double().eval(), {k: v.double() for k, v in call.items()})
    soft = insert_soft_mask(double, double.branches)
    inputs = tuple(double.example.tensors.values())
    caches = [torch.randn_like(c) for c in soft.empty_caches(double)]
    scores = torch.rand(len(soft.blocks), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: soft.graph_module(*inputs, s, *caches)[0], (scores,))
    assert all(not p.requires_grad for p in soft.graph_module.parameters())


def test_specialised_graphs_lack_skipped_blocks(tiny):
    mask = every_other(tiny)
    plan = fxmask.rectify(tiny, mask)
    full, skipped = specialize(tiny, plan)
    assert full.steps == (0, 2, 4)
    assert skipped.steps == (1, 3)
    targets = [str(n.target) for n in skipped.graph_module.graph.nodes]
    assert not any("mlp" in t or "qkv" in t or "attention" in t for t in targets)
    assert any("gate" in t for t in targets)
    assert sum(count_macs(n) for n in skipped.graph_module.graph.nodes) == plan.steps[1].macs
    assert len(skipped.load) == 4
    assert full.store == tuple((b.name, 0) for b in tiny.branches)


def test_forecast_is_in_the_graph_with_coefficients_as_input(tiny):
    names = [b.name for b in tiny.branches]
    rows = [[1] * 4, [1] * 4, [0] * 4, [0] * 4, [1] * 4]
    terms = {(i, n): ((0, 0.25 - i), (1, 0.75 + i)) for i in (2, 3) for n in names}
    mask = fxmask.Mask(rows, [5, 4, 3, 2, 1], names, terms)
    plan = fxmask.rectify(tiny, mask)
    assert plan.distinct_graphs == 2, "other coefficients, same graph"
    calls = make_calls(timesteps=(5, 4, 3, 2, 1))
    expected = fxmask.reference.run(tiny, mask, calls)
    accelerated = fxmask.compile(tiny, plan, backend="eager")
    for call, value in zip(calls, expected, strict=True):
        assert torch.equal(accelerated(**call), value)


def test_steps_that_form_a_value_in_other_ways_have_graphs_of_their_own(tiny):
    """The same nodes are live at the two steps that load, and at the three that compute."""
    name = tiny.branches[0].name
    terms = {(3, name): ((0, -0.5), (1, 1.5)), (4, name): ((1, 0.5), (4, 0.5))}
    plan = fxmask.rectify(tiny, fxmask.Mask([[1], [1], [0], [0], [1]], TIMESTEPS, (name,), terms))
    assert [step.graph for step in plan.steps] == [0, 0, 1, 2, 3], "computed twice, loaded, forecast, blended"


def test_forecast_from_a_block_that_is_not_listed_is_refused(tiny):
    """Such a block computes at every step, but is no cut value: the mask says nothing of what is stored of it."""
    first, second = (block.name for block in tiny.branches[:2])
    mask = fxmask.Mask([[1], [1], [0]], (3, 2, 1), (first,), {(2, first): ((1, 0.5), ((second, 0), 0.5))})
    message = f"forecast of block '{first}' at step 2 reads step 0 of '{second}', which the mask does not list"
    with pytest.raises(MaskError, match=re.escape(message)):
        fxmask.rectify(tiny, mask)
    strange = fxmask.Mask([[1], [1], [0]], (3, 2, 1), (first,), {(2, first): ((("strange", 0), 0.5),)})
    with pytest.raises(MaskError, match="reads step 0 of 'strange', which is no block of the program"):
        fxmask.rectify(tiny, strange)


def test_peak_cache_bytes(tiny):
    plan = fxmask.rectify(tiny, every_other(tiny))
    assert plan.peak_cache_bytes == 4 * (2 * 6 * 8 * 4)  # four values of [2, 6, 8] float32
    assert fxmask.rectify(tiny, fxmask.Mask.ones(tiny, [3, 2, 1])).peak_cache_bytes == 0
