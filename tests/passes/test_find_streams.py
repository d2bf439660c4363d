"""Stream blocks: found where branches join, cut with the shortcut, exact in every form of the program."""

from __future__ import annotations

import pytest
import torch
from conftest import ddim, labels, tiny_dit, tiny_unet

import fxmask
from fxmask import reference
from fxmask.passes.observer import switched_off

aten = torch.ops.aten


def captured(model: torch.nn.Module, **options):
    calls = fxmask.record(model.eval(), ddim(), num_inference_steps=5, batch_size=2, **options)
    return calls, fxmask.capture(model, calls.calls[0][0])


class Net(torch.nn.Module):
    """x + f(x), in a form that ``join`` chooses."""

    def __init__(self, join) -> None:
        super().__init__()
        self.first, self.second, self.third = (torch.nn.Linear(4, 4) for _ in range(3))
        self.join = join

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.join(self, x, t.reshape(-1, 1).to(x.dtype) / 1000).cos()


def streams_of(join):
    torch.manual_seed(0)
    program = fxmask.capture(Net(join).eval(), {"x": torch.randn(2, 4), "t": torch.tensor(500)})
    return program, program.streams


def test_the_value_after_the_addition():
    program, streams = streams_of(lambda net, x, t: x + net.first(x).tanh())
    assert [program.node(s.values[0]).target for s in streams] == [aten.add.Tensor]
    assert streams[0].kind == "stream"
    assert streams[0].name == f"{program.branches[0].name}:stream"
    assert streams[0].macs == program.branches[0].macs == 2 * 16


def test_a_gate_lies_between_branch_and_stream():
    program, (stream,) = streams_of(lambda net, x, t: x + t * net.first(x).tanh())
    assert program.node(stream.values[0]).target is aten.add.Tensor
    assert program.node(program.branches[0].values[0]).target is not aten.mul.Tensor


def test_a_scale_after_the_addition_belongs_to_the_stream():
    program, (stream,) = streams_of(lambda net, x, t: (x + net.first(x).tanh()) / 1.4)
    assert program.node(stream.values[0]).target is aten.div.Tensor


def test_a_scale_that_is_not_the_only_reader_does_not():
    def join(net, x, t):
        y = x + net.first(x).tanh()
        return y / 1.4 + net.second(y).tanh()

    program, streams = streams_of(join)
    assert program.node(streams[0].values[0]).target is aten.add.Tensor
    assert len(streams) == 2


def test_parallel_branches_are_one_stream():
    program, streams = streams_of(lambda net, x, t: (x + net.first(x).tanh()) + net.second(x).sin())
    assert len(program.branches) == 2
    assert len(streams) == 1
    assert streams[0].name == "+".join(b.name for b in program.branches) + ":stream"
    assert streams[0].macs == sum(b.macs for b in program.branches)


@pytest.mark.parametrize("scale", [1.0, 1.7])
def test_resnets_of_a_unet_that_divide_by_a_scale(scale):
    _, program = captured(tiny_unet(mid_block_scale_factor=scale))
    mid = [s for s in program.streams if s.name.startswith("mid_block.resnets")]
    assert {program.node(s.values[0]).target for s in mid} == {aten.div.Tensor}
    assert len(program.streams) == len(program.branches)
    assert sum(s.macs for s in program.streams) <= program.macs


FAMILIES = {
    "unet": (lambda: tiny_unet(), {}),
    "dit": (lambda: tiny_dit(), {"example_inputs": labels}),
    "dit, stochastic": (lambda: tiny_dit(), {"example_inputs": labels, "step_kwargs": {"eta": 1.0}}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    make, options = FAMILIES[request.param]
    return captured(make(), **options)


@pytest.mark.parametrize("seed", range(6))
def test_rectification_saves_and_changes_no_bit(family, seed):
    """Rectified, unrectified and interpreted masks over streams give the same samples, bit for bit."""
    calls, program = family
    names = tuple(s.name for s in program.streams)
    rows = torch.rand(5, len(names), generator=torch.Generator().manual_seed(seed)) < 0.5
    rows[0] = True
    mask = fxmask.Mask(rows, calls.timesteps, names)
    plan = fxmask.rectify(program, mask)
    with switched_off("rectify"):
        whole = fxmask.rectify(program, mask)
    samples = [calls.rollout(fxmask.compile(program, p, backend="eager")) for p in (plan, whole)]
    meaning = reference.rollout(program, mask, calls)
    assert torch.equal(samples[0], samples[1])
    assert torch.equal(samples[0], meaning)
    assert plan.mac_ratio > whole.mac_ratio
    assert fxmask.rectify(program, plan.mask).mask == plan.mask


def test_equation_12_fires_on_a_transformer(family):
    """A block is dropped where the next one loads in this step and it computes again in the next."""
    calls, program = family
    names = tuple(s.name for s in program.streams)
    rows = torch.ones(5, len(names), dtype=torch.bool)
    rows[2, -1] = False
    kept = fxmask.rectify(program, fxmask.Mask(rows, calls.timesteps, names)).mask.compute
    dropped = rows & ~kept
    assert dropped[2].any()
    assert not dropped[[0, 1, 3, 4]].any()


def test_streams_and_the_branches_in_them_are_told_apart(family):
    calls, program = family
    stage = next((s for s in program.stages if any(s.values == stream.values for stream in program.streams)), None)
    if stage is None:
        pytest.skip("no stage of this model is a stream")
    twin = next(stream for stream in program.streams if stream.values == stage.values)
    mask = fxmask.Mask(torch.ones(5, 2, dtype=torch.bool), calls.timesteps, (stage.name, twin.name))
    with pytest.raises(fxmask.MaskError, match="both cut"):
        fxmask.rectify(program, mask)


def test_interval_on_streams_spares_what_lies_before_them(family):
    calls, program = family
    plans = {
        blocks: fxmask.rectify(program, fxmask.policies.interval(2, blocks=blocks)(program, calls.timesteps))
        for blocks in ("branch", "stream")
    }
    assert plans["stream"].mac_ratio >= plans["branch"].mac_ratio
    with pytest.raises(fxmask.MaskError, match="'level' is unknown"):
        fxmask.policies.interval(2, blocks="level")


def test_a_mask_over_streams_is_used_at_another_batch_and_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_unet()
    calls, program = captured(model)
    mask = fxmask.policies.interval(2, blocks="stream")(program, calls.timesteps)
    accelerated = fxmask.compile(program, fxmask.rectify(program, mask), backend="eager")
    other = fxmask.record(model, ddim(), num_inference_steps=5, batch_size=3, seed=4)
    expected = reference.rollout(fxmask.capture(model, other.calls[0][0]), mask, other)
    assert torch.equal(other.rollout(accelerated), expected)
    fxmask.save(accelerated, tmp_path / "plan")
    again = fxmask.load(tmp_path / "plan", tiny_unet(), backend="eager")
    assert again.plan.mac_ratio == accelerated.plan.mac_ratio
    assert torch.equal(other.rollout(again), expected)
