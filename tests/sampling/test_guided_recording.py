"""Guidance in runs that are recorded from a scheduler alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import ddim, tiny_dit

import fxmask
from fxmask.sampling.split_lanes import split_lanes

SCALE = 3.0


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_dit()


def labels(batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"class_labels": torch.randint(4, (batch_size,), generator=generator)}


def none(batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"class_labels": torch.full((batch_size,), 4)}


def recorded(model: torch.nn.Module, eta: float = 0.0, **options: Any) -> fxmask.Trajectory:
    return fxmask.record(
        model,
        ddim(),
        num_inference_steps=5,
        batch_size=2,
        **{"example_inputs": labels, "guidance_scale": SCALE, "unconditional": none, "step_kwargs": {"eta": eta}, **options},
    )


def by_hand(model: torch.nn.Module, run: fxmask.Trajectory) -> torch.Tensor:
    """The textbook's loop, lane by lane."""
    scheduler = ddim()
    scheduler.set_timesteps(5)
    x, given = run.initial_noise, run.calls[0][0]["class_labels"].chunk(2)
    with torch.no_grad():
        for t in scheduler.timesteps:
            parts = [model(x, timestep=t.expand(2), class_labels=y, return_dict=False)[0] for y in given]
            prediction = parts[0] + SCALE * (parts[1] - parts[0])
            x = scheduler.step(prediction[:, : x.shape[1]], t, x).prev_sample
    return x


def test_samples_are_guided(model: torch.nn.Module) -> None:
    run = recorded(model)
    assert [len(call[0]["hidden_states"]) for call in run.calls] == [4] * 5
    assert run.batch_size == 2
    assert torch.allclose(run.final, by_hand(model, run), atol=1e-4)
    assert not torch.allclose(run.final, recorded(model, guidance_scale=1.0).final, atol=1e-2)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_replays(model: torch.nn.Module, eta: float) -> None:
    run = recorded(model, eta)
    assert torch.equal(run.rollout(model), run.final)
    again = run.renoised(model, 7)
    assert again.guidance_scale == SCALE
    assert not torch.equal(again.final, run.final)
    assert torch.equal(again.rollout(model), again.final)
    fewer = run.with_steps(model, 3)
    assert len(fewer.calls) == 3
    assert torch.equal(fewer.rollout(model), fewer.final)
    assert run.rows(0, 1) is None


def test_it_comes_apart_into_lanes(model: torch.nn.Module) -> None:
    run = recorded(model)
    view = split_lanes(run, model)
    assert view is not None
    assert torch.allclose(view.rollout(model), run.final, atol=1e-4)


def test_accelerate_with_guidance(model: torch.nn.Module) -> None:
    accelerated = fxmask.accelerate(
        model,
        ddim(),
        num_inference_steps=5,
        example_inputs=labels,
        guidance_scale=SCALE,
        unconditional=none,
        speedup=1.5,
        backend="eager",
        progress=False,
    )
    run = fxmask.record(
        model, ddim(), num_inference_steps=5, batch_size=8, example_inputs=labels, guidance_scale=SCALE, unconditional=none
    )
    assert accelerated.plan.mac_ratio == pytest.approx(1.5, rel=0.2)
    assert run.rollout(accelerated).shape == run.final.shape
    assert accelerated.report().runs[-1].followed == 4


def test_runs_of_two_scales_are_not_learned_together(model: torch.nn.Module) -> None:
    run = recorded(model)
    program = fxmask.capture(model, run.calls[0][0])
    with pytest.raises(fxmask.InputError, match="guidance_scale"):
        fxmask.learn(program, [run, recorded(model, guidance_scale=1.5)], speedup=1.5, effort="quick", progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance_scale": None}, "unconditional= is for guidance"),
        ({"unconditional": {"prompt": torch.zeros(2)}}, "names \\['prompt'\\]"),
        ({"unconditional": {"class_labels": torch.zeros(3, dtype=torch.long)}}, "equal shapes"),
        ({"unconditional": {"class_labels": [torch.zeros(2, dtype=torch.long)]}}, "equal structures"),
    ],
)
def test_what_does_not_go_together(model: torch.nn.Module, change: dict[str, Any], message: str) -> None:
    with pytest.raises(fxmask.InputError, match=message):
        recorded(model, **change)
