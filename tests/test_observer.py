"""Pass infrastructure: declared conditions, records, off switches, and the bisection of a wrong result."""

from __future__ import annotations

import pytest
import torch
from conftest import TIMESTEPS, every_other, make_calls
from torch import fx

import fxmask
from fxmask.diagnosis import diagnose
from fxmask.errors import PassError
from fxmask.passes import observer, specialize
from fxmask.passes.observer import OPTIONAL, graph_pass, observe, switched_off


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
    @graph_pass(requires=(observer.functional,))
    def look(graph: fx.Graph) -> int:
        return nodes(graph)

    assert look(add_graph()) == 3
    with pytest.raises(PassError, match=r"pass 'look' requires functional, but .*add_.* writes to its input"):
        look(add_graph(in_place=True))


def test_a_broken_promise_is_noticed():
    @graph_pass(ensures=(observer.no_dead_code,))
    def leaves_litter(graph: fx.Graph) -> None:
        with graph.inserting_before(next(iter(graph.find_nodes(op="output")))):
            graph.call_function(torch.ops.aten.neg.default, (next(iter(graph.nodes)),))

    with pytest.raises(PassError, match="pass 'leaves_litter' ensures no_dead_code, but nobody uses neg"):
        leaves_litter(add_graph())


def test_conditions():
    graph = add_graph()
    assert observer.has_shapes(graph) == "x has no shape"
    assert observer.one_output_tuple(graph) is None
    bare = fx.Graph()
    bare.output(bare.placeholder("x"))
    assert observer.one_output_tuple(bare) is not None


def test_only_optimisations_can_be_switched_off():
    assert {"remove_dead", "rectify"} <= set(OPTIONAL)
    with pytest.raises(PassError, match="cannot be switched off"), switched_off("functionalize"):
        pass


@pytest.mark.parametrize("name", OPTIONAL)
def test_results_do_not_depend_on_optimisations(tiny, name):
    names = [b.name for b in tiny.blocks]
    rows = torch.rand(5, len(names), generator=torch.Generator().manual_seed(3)) > 0.5
    rows[0] = True
    mask = fxmask.Mask(rows, TIMESTEPS, names)
    calls = make_calls()
    with switched_off(name), observe() as records:
        assert diagnose(tiny, mask, calls) is None
    assert any(r.name == name and r.skipped for r in records)


def test_rectification_drops_what_is_dead(tiny):
    """Holding the output leaves nothing to compute; without rectification every branch still runs."""
    names = [b.name for b in tiny.blocks]
    rows = torch.ones(3, len(names), dtype=torch.bool)
    rows[1, names.index("output")] = False
    mask = fxmask.Mask(rows, (3, 2, 1), names)
    assert fxmask.rectify(tiny, mask).steps[1].macs == 0
    with switched_off("rectify"):
        assert fxmask.rectify(tiny, mask).steps[1].macs > 0.9 * tiny.macs


def test_a_right_result_needs_no_diagnosis(tiny):
    assert diagnose(tiny, every_other(tiny), make_calls()) is None


def test_bisection_to_an_optimisation(tiny, monkeypatch, caplog):
    """A rectification that forgets one store is found, with the one load that needs it."""
    from fxmask.passes import rectify as module

    victim = tiny.branches[1].name
    original = module._shared_emits

    def forgetful(program, start, rows, reads):
        emits = original(program, start, rows, reads)
        keep = observer._off.get()
        return emits if keep else {k: tuple(x for x in v if x[0] != victim) for k, v in emits.items()}

    monkeypatch.setattr(module, "_shared_emits", forgetful)
    monkeypatch.setattr(observer, "OPTIONAL", ["rectify"])
    found = diagnose(tiny, every_other(tiny), make_calls())
    assert found is not None
    assert found.culprit == "rectify"
    assert len(found.loads) == 1
    assert found.loads[0][1] == victim
    text = str(found)
    assert "reproducer" in text
    assert f"[{found.loads[0]!r}]" in text
    assert "rectify" in caplog.text


def test_bisection_to_a_mask_entry(tiny, monkeypatch):
    """A wrong value of one block, whatever the optimisations."""
    original = specialize._Former.loaded
    victim = tiny.branches[2]

    def wrong(former, name):
        value = original(former, name)
        return former.graph.call_function(torch.ops.aten.mul.Tensor, (value, 1.5)) if name in victim.values else value

    monkeypatch.setattr(specialize._Former, "loaded", wrong)
    found = diagnose(tiny, every_other(tiny), make_calls())
    assert found is not None
    assert found.culprit is None
    assert [block for _, block in found.loads] == [victim.name]
    assert found.step == found.loads[0][0]
    assert found.difference > 0
    scope = {"model": tiny.model, "calls": make_calls()}
    exec(found.reproducer(), scope)
    assert scope["mask"] == found.mask
