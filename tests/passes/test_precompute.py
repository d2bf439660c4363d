"""What is computed outside the steps: binding times, tables, hoisted conditioning."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from conftest import TIMESTEPS, TinyTransformer, make_calls

import fxmask
from fxmask.passes import precompute as stage_values
from fxmask.passes.binding_times import BindingTime, binding_times
from fxmask.passes.merge_common import merge_common
from fxmask.passes.observer import switched_off
from fxmask.passes.precompute import make_prologues
from fxmask.runtime.executor import Executor
from fxmask.runtime.graph_store import GraphStore
from fxmask.runtime.prologues import PrologueRunner


class Conditioned(torch.nn.Module):
    """Cross-attention to projected text, with a gate from timestep and text."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(6, 8)
        self.key, self.value, self.query = (torch.nn.Linear(8, 8) for _ in range(3))
        self.time = torch.nn.Linear(1, 8)
        self.gate = torch.nn.Linear(8, 16)
        self.scale = torch.nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, hint: torch.Tensor | None = None) -> torch.Tensor:
        text = torch.nn.functional.gelu(self.project(text))
        keys, values = self.key(text), self.value(text)
        time = torch.nn.functional.silu(self.time(t.reshape(-1, 1).float() / 1000))
        gate, shift = self.gate(time + text.mean(1)).unsqueeze(1).chunk(2, dim=-1)
        y = torch.nn.functional.scaled_dot_product_attention(self.query(x), keys, values)
        if hint is not None:
            y = y + self.project(hint)
        return x + shift + gate * y * torch.nn.functional.softplus(self.scale)


def conditioned():
    torch.manual_seed(0)
    model = Conditioned().eval()
    text = torch.randn(2, 5, 6)
    calls = [{"x": torch.randn(2, 4, 8), "t": torch.full((2,), t), "text": text} for t in (900, 700, 500, 300)]
    return model, calls


def targets(prologue):
    return [str(node.target) for node in prologue.graph_module.graph.nodes if node.op == "call_function"]


def test_binding_times():
    model, calls = conditioned()
    program = fxmask.capture(model, calls[0])
    times = binding_times(program)
    linears = [times[n] for n in program.graph_module.graph.nodes if n.target is torch.ops.aten.linear.default]
    both = BindingTime.TIMESTEP | BindingTime.CONDITIONING
    assert sorted(linears) == sorted([BindingTime.CONDITIONING] * 3 + [BindingTime.TIMESTEP, both] + [max(linears)]), (
        "caption, key and value; time; gate; query"
    )
    assert max(linears) & BindingTime.SAMPLE


def test_what_is_staged():
    model, calls = conditioned()
    program = fxmask.capture(model, calls[0])
    prologues = make_prologues(program, 4)
    assert sum("linear" in t for t in targets(prologues.once)) == 3
    assert sum("softplus" in t for t in targets(prologues.once)) == 1, "weights alone"
    assert sum("linear" in t for t in targets(prologues.table)) == 2
    graph = GraphStore(program, "eager")
    executor = Executor(fxmask.rectify(program, fxmask.Mask.ones(program, (900, 700, 500, 300))), graph)
    step, _ = executor.graphs.get(executor.plan, 0)
    left = [n for n in step.graph_module.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert len(left) == 1, "the query alone"


def test_argument_that_changes_at_every_step_is_not_hoisted():
    model, calls = conditioned()
    hinted = [{**call, "hint": torch.randn(2, 4, 6)} for call in calls]
    program = fxmask.capture(model, hinted[0], roles={"hint": "step"})
    assert sum("linear" in t for t in targets(make_prologues(program, 4).once)) == 3
    accelerated = fxmask.compile(
        program, fxmask.rectify(program, fxmask.Mask.ones(program, (900, 700, 500, 300))), backend="eager"
    )
    with accelerated.generation():
        for call in hinted:
            assert torch.equal(accelerated(**call), model(**call))


@pytest.mark.parametrize("off", [(), ("fold_timestep",), ("hoist_conditioning",), ("fold_timestep", "hoist_conditioning")])
def test_passes_can_be_switched_off(off):
    model, calls = conditioned()
    program = fxmask.capture(model, calls[0])
    with switched_off(*off):
        prologues = make_prologues(program, 4)
        accelerated = fxmask.compile(
            program, fxmask.rectify(program, fxmask.Mask.ones(program, (900, 700, 500, 300))), backend="eager"
        )
        with accelerated.generation():
            got = [accelerated(**call) for call in calls]
    assert (prologues.table is None) == ("fold_timestep" in off)
    assert (prologues.once is None) == ("hoist_conditioning" in off)
    assert all(torch.equal(a, model(**call)) for a, call in zip(got, calls, strict=True))


def begin(program, timesteps, tensors):
    """Rows as a compiling backend has them: all steps at once."""
    return PrologueRunner(program, timesteps, batched=True).begin(tensors)


def test_table_of_all_steps_is_each_step_up_to_rounding():
    model, calls = conditioned()
    program = fxmask.capture(model, calls[0])
    rows = begin(program, (900.0, 700.0, 500.0, 300.0), list(program.signature.bind((), calls[0]).tensors.values()))
    for row, call in zip(rows, calls, strict=True):
        expected = make_prologues(program, 4).at(list(program.signature.bind((), call).tensors.values()))
        assert row.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.allclose(row[name], value, atol=1e-5)
            assert row[name].stride() == value.stride()
            assert row[name].dtype == value.dtype


def test_tables_grow_with_steps_and_are_bounded(monkeypatch):
    """Rows that depend on the conditioning stay in the steps where they would take too much memory."""
    model, calls = conditioned()
    program = fxmask.capture(model, calls[0])
    monkeypatch.setattr(stage_values, "MOST_TABLE_BYTES", 300)
    assert sum("linear" in t for t in targets(make_prologues(program, 4).table)) == 1, "the timestep's own"
    monkeypatch.setattr(stage_values, "MOST_TABLE_BYTES", 10)
    assert make_prologues(program, 4).table is None


@pytest.mark.parametrize("marked", [True, False])
def test_new_weights_and_new_conditioning_are_seen_in_the_next_run(marked):
    """Runs that nobody marks go on in the lane of the run before, which has the same conditioning; its rows are of then."""
    model, calls = conditioned()
    program = fxmask.capture(model, calls[0])
    accelerated = fxmask.compile(
        program, fxmask.rectify(program, fxmask.Mask.ones(program, (900, 700, 500, 300))), backend="eager"
    )
    for change in (
        lambda: None,
        lambda: model.key.weight.data.add_(0.5),
        lambda: model.time.weight.data.mul_(2),
        lambda: calls[0]["text"].mul_(-1),
    ):
        change()
        with accelerated.generation() if marked else contextlib.nullcontext():
            for call in calls:
                assert torch.equal(accelerated(**call), model(**call))


def test_lanes_have_their_own_conditioning():
    model, calls = conditioned()
    program = fxmask.capture(model, calls[0])
    accelerated = fxmask.compile(
        program, fxmask.rectify(program, fxmask.Mask.ones(program, (900, 700, 500, 300))), backend="eager"
    )
    other = torch.randn(2, 5, 6)
    with accelerated.generation():
        for call in calls:
            for text in (call["text"], other):
                assert torch.equal(accelerated(**{**call, "text": text}), model(**{**call, "text": text}))


def test_block_from_another_step_is_no_table():
    """A mask may load a value that depends on the timestep alone; what follows from it must be computed in the step."""
    torch.manual_seed(0)
    model = TinyTransformer().eval()
    calls = make_calls()
    program = fxmask.capture(model, calls[0])
    time = next(n for n in program.graph_module.graph.nodes if n.target is torch.ops.aten.linear.default)
    assert binding_times(program)[time] == BindingTime.TIMESTEP
    program = replace(program, blocks=(*program.blocks, fxmask.Block("time", "branch", (time.name,), 0, 0)))
    rows = torch.ones(5, 1, dtype=torch.bool)
    rows[1:] = False
    mask = fxmask.Mask(rows, TIMESTEPS, ("time",))
    accelerated = fxmask.compile(program, fxmask.rectify(program, mask), backend="eager")
    with accelerated.generation():
        got = [accelerated(**call) for call in calls]
    expected = fxmask.reference.run(program, mask, calls)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert not torch.equal(got[1], model(**calls[1]))


def test_common_subexpressions():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    aten = torch.ops.aten
    a, b = graph.call_function(aten.sin.default, (x,)), graph.call_function(aten.sin.default, (x,))
    one, whole = graph.call_function(aten.add.Tensor, (a, 1)), graph.call_function(aten.add.Tensor, (b, 1.0))
    noise = [graph.call_function(aten.rand_like.default, (x,)) for _ in range(2)]
    graph.output((one, whole, *noise))
    assert merge_common(graph).count == 1
    assert one.args[0] is whole.args[0] is a
    assert len({id(n) for n in graph.find_nodes(op="call_function", target=aten.rand_like.default)}) == 2


def test_merged_output_and_store_do_not_share_memory():
    """Two equal values, one returned and one cached: a caller that writes to the first must not change the second."""

    class Twice(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.exp(x), torch.exp(x)

    calls = [{"x": torch.randn(2, 3), "t": torch.tensor(t)} for t in (900, 500)]
    program = fxmask.capture(Twice().eval(), calls[0])
    names = [n.name for n in program.graph_module.graph.nodes if n.target is torch.ops.aten.exp.default]
    program = replace(program, blocks=(fxmask.Block("second", "branch", (names[1],), 0, 0),))
    mask = fxmask.Mask([[True], [False]], (900, 500), ("second",))
    accelerated = fxmask.compile(program, fxmask.rectify(program, mask), backend="eager")
    expected = fxmask.reference.run(program, mask, calls)
    with accelerated.generation():
        for call, want in zip(calls, expected, strict=True):
            got = accelerated(**call)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            got[0].fill_(float("nan"))
