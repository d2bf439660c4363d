"""Pass infrastructure: declared conditions, records, off switches."""

from __future__ import annotations

import pytest
import torch
from conftest import TIMESTEPS, every_other, make_calls
from torch import fx

import fxmask
from fxmask.errors import PassError
from fxmask.passes import conditions
from fxmask.passes.observer import graph_pass, observe, optional_passes, switched_off
from fxmask.tools.diagnosis import diagnose


def add_graph(in_place: bool = False) -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    target = torch.ops.aten.add_.Tensor if in_place else torch.ops.aten.add.Tensor
    graph.output((graph.call_function(target, (x, 1)),))
    return graph


def nodes(graph: fx.Graph) -> int:
    return len(graph.nodes)


def test_records_of_a_whole_run():
    from conftest import TinyTransformer

    torch.manual_seed(0)
    with observe() as records:
        program = fxmask.capture(TinyTransformer().eval(), make_calls()[0])
        accelerated = fxmask.compile(program, fxmask.rectify(program, every_other(program)), backend="eager")
        for call in make_calls():
            accelerated(**call)
    names = [r.name for r in records]
    assert names[:2] == ["remove_dead", "functionalize"], "inner passes end first"
    assert {"find_blocks", "rectify", "specialize_step"} <= set(names)
    skipping = [r for r in records if r.name == "specialize_step"][-1]
    assert skipping.nodes_after < skipping.nodes_before
    assert all(r.seconds >= 0 and not r.skipped for r in records)
    with observe() as later:
        pass
    assert later == []


def test_a_violated_requirement_names_pass_and_condition():
    @graph_pass(requires=(conditions.functional,))
    def look(graph: fx.Graph) -> int:
        return nodes(graph)

    assert look(add_graph()) == 3
    with pytest.raises(PassError, match=r"pass 'look' requires functional, but .*add_.* writes to its input"):
        look(add_graph(in_place=True))


def test_a_broken_promise_is_noticed():
    @graph_pass(ensures=(conditions.no_dead_code,))
    def leaves_litter(graph: fx.Graph) -> None:
        with graph.inserting_before(next(iter(graph.find_nodes(op="output")))):
            graph.call_function(torch.ops.aten.neg.default, (next(iter(graph.nodes)),))

    with pytest.raises(PassError, match="pass 'leaves_litter' ensures no_dead_code, but nobody uses neg"):
        leaves_litter(add_graph())


def test_conditions():
    graph = add_graph()
    assert conditions.has_shapes(graph) == "x has no shape"
    assert conditions.one_output_tuple(graph) is None
    bare = fx.Graph()
    bare.output(bare.placeholder("x"))
    assert conditions.one_output_tuple(bare) is not None


def test_only_optimisations_can_be_switched_off():
    optional = optional_passes()
    assert {"remove_dead", "rectify"} <= set(optional)
    assert "functionalize" not in optional
    with pytest.raises(PassError, match="cannot be switched off"), switched_off("functionalize"):
        pass


def plain_mask(program: fxmask.Program) -> fxmask.Mask:
    """Random rows, plain reuse."""
    names = [b.name for b in program.blocks]
    rows = torch.rand(5, len(names), generator=torch.Generator().manual_seed(3)) > 0.5
    rows[0] = True
    return fxmask.Mask(rows, TIMESTEPS, names)


def forming_mask(program: fxmask.Program) -> fxmask.Mask:
    """Plain reuse, forecasts of a block's own values, of another block's and of the sample, and blends of both kinds."""
    names = [b.name for b in program.blocks]
    first, second, third = (b.name for b in program.branches[:3])
    rows = torch.ones(5, len(names), dtype=torch.bool)
    for step, name in ((2, first), (3, second), (4, third), (4, "output")):
        rows[step, names.index(name)] = False
    terms = {
        (2, first): ((0, -1.0), (1, 2.0)),
        (3, second): (((first, 1), 0.5), (0, 0.5)),
        (3, first): ((1, 0.25), (3, 0.75)),
        (2, "output"): ((2, 0.5), (("input", 2), 0.5)),
        (4, "output"): ((("input", 4), 0.5), (3, 0.5)),
    }
    mask = fxmask.Mask(rows, TIMESTEPS, names, terms)
    plan = fxmask.rectify(program, mask)
    assert any(step.blend for step in plan.steps)
    assert any(not load.plain for step in plan.steps for load in step.load)
    return mask


AT_CAPTURE = {"choose_layouts"}  # and not again in a plan


@pytest.mark.parametrize("make_mask", [plain_mask, forming_mask])
@pytest.mark.parametrize("name", optional_passes())
def test_results_do_not_depend_on_optimisations(tiny, name, make_mask):
    calls = make_calls()
    with switched_off(name), observe() as records:
        program = fxmask.capture(tiny.model, calls[0]) if name in AT_CAPTURE else tiny
        assert diagnose(program, make_mask(program), calls) is None
    assert any(r.name == name and r.skipped for r in records)


@pytest.mark.parametrize("make_mask", [plain_mask, forming_mask])
def test_results_do_not_depend_on_all_optimisations_together(tiny, make_mask):
    with switched_off(*optional_passes()), observe() as records:
        assert diagnose(tiny, make_mask(tiny), make_calls()) is None
    assert {r.name for r in records if r.skipped} >= {"rectify", "merge_common", "remove_dead"}


def test_rectification_drops_what_is_dead(tiny):
    """Holding the output leaves nothing to compute; without rectification every branch still runs."""
    names = [b.name for b in tiny.blocks]
    rows = torch.ones(3, len(names), dtype=torch.bool)
    rows[1, names.index("output")] = False
    mask = fxmask.Mask(rows, (3, 2, 1), names)
    assert fxmask.rectify(tiny, mask).steps[1].macs == 0
    with switched_off("rectify"):
        assert fxmask.rectify(tiny, mask).steps[1].macs > 0.9 * tiny.macs
