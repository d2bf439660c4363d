"""The shipped models, with their weights, on the road: fake CUDA tensors first, then an emulated GPU beside the CPU."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from conftest import ddim, labels
from emulated_gpu import emulated_gpu
from road import forecasting, run_plan, tensors_of
from without_a_gpu import CUDA, gpu, on_gpu

import fxmask
from fxmask.frontend.infer import infer_call
from fxmask.ir.calls import Signature
from fxmask.ir.program import Program

pytest.importorskip("diffusers")
pipelines = pytest.importorskip("pipelines")

# The conditioning of a batch of 2, on the CPU
GIVEN: dict[str, dict[str, torch.Tensor]] = {
    "ddpm": {},
    "dit": {"class_labels": torch.tensor([1, 2])},
    "ldm": {"encoder_hidden_states": pipelines.randn(2, 8, 64)},
    "pixart": {"encoder_hidden_states": pipelines.randn(2, 8, 64), "encoder_attention_mask": torch.ones(2, 8)},
}
# Each capture of a U-Net or a text model takes 5 to 10 s
MODELS = [pytest.param(name, marks=[pytest.mark.slow] * (name in ("ldm", "pixart"))) for name in GIVEN]
SMALL = [pytest.param(name, marks=[pytest.mark.slow] * (name != "dit")) for name in GIVEN]


@functools.cache
def shipped(name: str) -> torch.nn.Module:
    model: torch.nn.Module = pipelines.digits().load_model(name)
    return model


@functools.cache
def on_the_road(name: str, dtype: torch.dtype, layout: str) -> Program:
    given = {key: x.to(dtype) if x.is_floating_point() else x for key, x in GIVEN[name].items()}
    with gpu(layout):
        return fxmask.capture(on_gpu(copy.deepcopy(shipped(name)).to(dtype)), given)


@pytest.mark.parametrize("name", MODELS)
def test_captured_as_on_the_cpu(name: str) -> None:
    """Arguments are inferred on the GPU, and the program is the same, in the layouts of a GPU's attention."""
    model = on_gpu(shipped(name))
    with gpu():
        call = infer_call(model, GIVEN[name], 2, Signature.of(model))
    assert call[Signature.of(model).sample].shape[0] == 2
    here, there = fxmask.capture(shipped(name), GIVEN[name]), on_the_road(name, torch.bfloat16, "flash")
    assert here.fingerprint == there.fingerprint
    assert [b.name for b in here.blocks] == [b.name for b in there.blocks]
    assert {x.device for x in tensors_of(there)} == {CUDA}


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_with_forecasts_runs(name: str) -> None:
    """Rectified, specialised, with tables and values of the conditioning made ahead; nothing of it is on the CPU."""
    program = on_the_road(name, torch.float32, "math")
    mask = forecasting(program)
    outputs = run_plan(program, mask)
    assert len(outputs) == mask.num_steps
    assert {x.device for x in outputs} == {CUDA}


def accelerated_rollout(name: str, device: str) -> torch.Tensor:
    """Final samples of a plan that reuses and forecasts, recorded, captured and run on ``device``."""
    model = shipped(name)
    if device == "cuda":
        model = pipelines.digits().load_model(name).to(device)
    inputs: Any = GIVEN[name] if name != "dit" else labels
    options = {"num_inference_steps": 5, "batch_size": 2, "example_inputs": inputs, "step_kwargs": {"eta": 1.0}}
    run = fxmask.record(model, ddim(), **options)
    program = fxmask.capture(model, run.calls[0][0])
    assert program.verified
    mask = forecasting(program)
    mask = fxmask.Mask(mask.compute, run.timesteps, mask.blocks, forecast=mask.forecast)
    return run.rollout(fxmask.compile(program, fxmask.rectify(program, mask), backend="eager"))


@pytest.mark.parametrize("name", SMALL)
def test_samples_are_those_of_the_cpu(name: str) -> None:
    """On an emulated GPU, whose values the CPU computes: recording, capture with its checks, plan and run."""
    expected = accelerated_rollout(name, "cpu")
    with emulated_gpu():
        found = accelerated_rollout(name, "cuda")
        assert found.device == CUDA
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow  # learns with backward passes, for a sampler with noise: 80 s
def test_learning_for_a_sampler_with_noise() -> None:
    with emulated_gpu():
        model = pipelines.digits().load_model("dit").to("cuda")
        options = {"num_inference_steps": 6, "example_inputs": labels, "step_kwargs": {"eta": 1.0}, "max_graphs": 5}
        accelerated = fxmask.accelerate(model, ddim(), speedup=1.5, effort="quick", backend="eager", progress=False, **options)
    assert accelerated.plan.mac_ratio > 1.4


@pytest.mark.slow  # learns for whole pipelines, which run in threads of their own: a minute each
@pytest.mark.parametrize("name", ["stable_diffusion", "pixart"])
def test_a_pipeline(name: str) -> None:
    """Recorded, learned for and run."""
    with emulated_gpu():
        pipe, options = pipelines.PIPELINES[name]()
        pipe.set_progress_bar_config(disable=True)
        pipe.to("cuda")
        options = {**options, "num_inference_steps": 4}
        run = fxmask.record_pipeline(pipe, **options, generator=pipelines.generator())
        program = fxmask.capture(run.denoiser, run.calls[0][0], roles=run.roles)
        mask = fxmask.learn(program, run, speedup=1.3, effort="quick", progress=False)
        accelerated = fxmask.compile(program, fxmask.rectify(program, mask), backend="eager")
        setattr(pipe, "unet" if hasattr(pipe, "unet") else "transformer", accelerated)
        images = pipe(**options, generator=pipelines.generator()).images
        assert images.device == CUDA
    assert accelerated.report().runs[-1].followed >= 3
