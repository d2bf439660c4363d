"""One symbolic capture serves many shapes; what it does not cover is captured again."""

from __future__ import annotations

import pytest
import torch
from conftest import TIMESTEPS, TinyTransformer, ddim, every_other, labels, make_calls, tiny_dit, tiny_unet

import fxmask


@pytest.fixture
def exports(monkeypatch) -> list[bool]:
    """Every call of torch.export: whether it had symbolic sizes."""
    made: list[bool] = []
    original = torch.export.export

    def export(*args, **kwargs):
        made.append("dynamic_shapes" in kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.export, "export", export)
    return made


def accelerate(program: fxmask.Program, timesteps=TIMESTEPS) -> fxmask.AcceleratedModel:
    return fxmask.compile(program, fxmask.rectify(program, every_other(program, timesteps)), backend="eager")


def test_one_export_for_many_batch_sizes(exports):
    torch.manual_seed(0)
    model = TinyTransformer().eval()
    accelerated = accelerate(fxmask.capture(model, make_calls()[0]))
    assert exports == [False]
    for batch in (3, 5, 8, 5):
        calls = make_calls(batch=batch)
        got = [accelerated(**call) for call in calls]
        assert torch.equal(got[0], model(**calls[0]))
        assert not torch.equal(got[1], model(**calls[1]))
    assert exports == [False, True]
    (program,) = [p for p in accelerated.programs if p.batch_size == 8]
    assert program.rung == "torch.export (symbolic sizes)"
    assert "sym_size" not in str(program.graph_module.graph)
    assert [b.name for b in program.blocks] == [b.name for b in accelerated.blocks]
    assert program.attention_macs == 4 * accelerated.program.attention_macs


def test_a_batch_of_one_is_captured_by_itself(exports):
    torch.manual_seed(0)
    model = TinyTransformer().eval()
    accelerated = accelerate(fxmask.capture(model, make_calls()[0]))
    calls = make_calls(batch=1)
    assert torch.equal(accelerated(**calls[0]), model(**calls[0]))
    program = fxmask.capture(model, calls[0])
    expected = fxmask.reference.run(program, every_other(program), calls)
    with accelerated.generation():
        assert all(torch.equal(accelerated(**c), e) for c, e in zip(calls, expected, strict=True))


def test_unet_batches_and_resolutions(exports):
    """diffusers' U-Net exports a range of batch sizes only; what is outside it works all the same."""
    model = tiny_unet()
    trajectory = fxmask.record(model, ddim(), num_inference_steps=4, batch_size=2)
    accelerated = accelerate(fxmask.capture(model, trajectory.calls[0][0]), trajectory.timesteps)
    for shape in [(3, 1, 8, 8), (1, 1, 8, 8), (64, 1, 8, 8), (2, 1, 16, 8), (5, 1, 8, 8)]:
        calls = [{**call, "sample": torch.randn(shape)} for (call,) in trajectory.calls]
        program = fxmask.capture(model, calls[0])
        mask = fxmask.policies.interval(2)(program, trajectory.timesteps)
        expected = fxmask.reference.run(program, mask, calls)
        for call, value in zip(calls, expected, strict=True):
            assert torch.equal(accelerated(**call).sample, value.sample), shape


def test_blocks_are_carried_over_where_symbolic_sizes_change_the_graph():
    """A DiT exports other operators with symbolic sizes; its mask must fit all the same."""
    model = tiny_dit()
    generator = torch.Generator().manual_seed(0)
    trajectory = fxmask.record(model, ddim(), num_inference_steps=4, batch_size=2, example_inputs=labels(2, generator))
    accelerated = accelerate(fxmask.capture(model, trajectory.calls[0][0]), trajectory.timesteps)
    for batch in (4, 5):
        calls = [
            {**call, "hidden_states": torch.randn(batch, 1, 8, 8), **labels(batch, generator)} for (call,) in trajectory.calls
        ]
        calls = [
            {**call, "class_labels": calls[0]["class_labels"], "timestep": call["timestep"][:1].expand(batch)} for call in calls
        ]
        program = fxmask.capture(model, calls[0])
        mask = fxmask.policies.interval(2)(program, trajectory.timesteps)
        expected = fxmask.reference.run(program, mask, calls)
        for call, value in zip(calls, expected, strict=True):
            assert torch.equal(accelerated(**call).sample, value.sample)


def test_a_wrong_symbolic_capture_is_refused(monkeypatch):
    """A graph whose relations between sizes do not hold for a call must not be believed."""

    class Odd(TinyTransformer):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            y = super().forward(x, t)
            return y + (0.25 if torch.compiler.is_exporting() and not isinstance(x.shape[0], int) else 0.0)

    torch.manual_seed(0)
    model = Odd().eval()
    accelerated = accelerate(fxmask.capture(model, make_calls()[0]))
    call = make_calls(batch=4)[0]
    assert torch.equal(accelerated(**call), model(**call))
    assert all(p.rung == "torch.export (non-strict)" for p in accelerated.programs)


class Frames(torch.nn.Module):
    """A row of the text for each of four frames of a sample; the ratio of both batch sizes is no single symbol."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.text = torch.nn.Linear(8, 8), torch.nn.Linear(6, 8)

    def forward(self, sample, timestep, text):
        rows = sample.flatten(0, 1)
        rows = rows + self.inner(rows) * (1 + timestep[:1, None] / 1000)
        rows = rows + self.text(text)
        return rows.unflatten(0, (sample.shape[0], -1))


def test_a_symbolic_capture_that_fails_leaves_nothing_behind(exports):
    """AnimateDiff without guidance: half as many samples, half as many texts, each with a batch size of its own."""
    torch.manual_seed(0)
    model = Frames().eval()

    def calls(batch):
        text = torch.randn(4 * batch, 6)
        times = [torch.full((batch,), t) for t in TIMESTEPS]
        return [{"sample": torch.randn(batch, 4, 8), "timestep": t, "text": text} for t in times]

    first, second = calls(2), calls(1)
    accelerated = accelerate(fxmask.capture(model, first[0], roles={"text": "conditioning"}))
    with accelerated.generation():
        got = [accelerated(**call) for call in second]
    assert exports == [False, True, False]
    assert torch.equal(got[0], model(**second[0]))
    assert not torch.equal(got[1], model(**second[1])), "the plan must have been followed"
