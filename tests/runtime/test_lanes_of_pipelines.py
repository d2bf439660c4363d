"""Plans with lanes on pipelines: in half precision, and with adapters that change between images, against the same by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pipelines import PIPELINES, animatediff, generator, small_stable_diffusion

import fxmask
from fxmask.learning.lane_moments import shares
from fxmask.learning.own_rows import turns_of
from fxmask.sampling.split_lanes import split_lanes

pytest.importorskip("diffusers")
STEPS = 6


def recorded(
    build: Callable[[], Any], dtype: torch.dtype | None = None, prepare: Callable[[Any], None] | None = None
) -> fxmask.PipelineTrajectory:
    """One run of a small pipeline."""
    pipe, call = build()
    pipe.set_progress_bar_config(disable=True)
    if dtype is not None:
        pipe.to(dtype)
    if prepare is not None:
        prepare(pipe)
    return fxmask.record_pipeline(pipe, **{**call, "num_inference_steps": STEPS}, generator=generator())


def half_as_often(run: fxmask.PipelineTrajectory) -> fxmask.Accelerated:
    """The run's denoiser with a plan that computes the first lane at every second step; there it is held."""
    program = fxmask.capture(run.denoiser, run.calls[0][0], run.roles)
    output = next(block.name for block in program.blocks if block.kind == "output")
    batched = len(run.calls[0]) == 1
    count = split_lanes(run, run.denoiser).count if batched else len(run.calls[0])
    compute = torch.ones(run.num_steps, count, 1, dtype=torch.bool)
    compute[1::2, 0] = False
    names = tuple(str(lane) for lane in range(count)) if batched else run.lanes[0]
    mask = fxmask.Mask(compute, run.timesteps, (output,), None, program.fingerprint, lanes=names, batched=batched)
    return fxmask.compile(program, fxmask.rectify(program, mask), backend="eager")


def by_hand(view: Any) -> torch.Tensor:
    """Final samples of the same, with the model itself; of a run that calls lanes one by one."""
    count = len(view.calls[0])
    calls, held = 0, None

    @torch.no_grad()
    def denoiser(**call: Any) -> Any:
        nonlocal calls, held
        step, lane = divmod(calls, count)
        calls += 1
        if lane == 0 and step % 2:
            return held
        output = view.denoiser(**call)[0]
        held = output if lane == 0 else held
        return output

    return view.rollout(denoiser)


def apart(run: fxmask.PipelineTrajectory) -> Any:
    """The run with a call for every lane."""
    return split_lanes(run, run.denoiser) if len(run.calls[0]) == 1 else run


@pytest.mark.parametrize("build", [small_stable_diffusion, PIPELINES["wan"]], ids=["one batch", "call by call"])
def test_half_precision(build: Callable[[], Any]) -> None:
    run = recorded(build, torch.bfloat16)
    accelerated = half_as_often(run)
    got = run.rollout(accelerated)
    assert all(run.followed for run in accelerated.report().runs)
    assert run.outputs[0][0].dtype == torch.bfloat16
    torch.testing.assert_close(got, by_hand(apart(run)), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_conditional_part_comes_first(dtype: torch.dtype) -> None:
    """In diffusers' batch it is the last one; in half precision small steps would be lost."""
    view = apart(recorded(small_stable_diffusion, dtype))
    assert turns_of(view) == (1, 0)
    first, last = shares(view)
    assert first < -1
    assert last == pytest.approx(1 - first, rel=0.1)


@pytest.mark.filterwarnings("ignore:.*torch_dtype:UserWarning", "ignore::FutureWarning")
def test_a_text_with_a_row_for_every_frame_comes_apart_with_its_video() -> None:
    run = recorded(animatediff)
    (call,) = run.calls[0]
    assert (len(call["sample"]), len(call["encoder_hidden_states"])) == (2, 6)
    view = apart(run)
    assert view is not None
    assert [len(c["encoder_hidden_states"]) for c in view.calls[0]] == [3, 3]
    accelerated = half_as_often(run)
    got = run.rollout(accelerated)
    assert all(run.followed for run in accelerated.report().runs)
    torch.testing.assert_close(got, by_hand(view), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, run.final, atol=1e-3)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_adapters_that_change_between_images() -> None:
    """One, another, and the first again: every image is as with the adapter that it was made with."""
    peft = pytest.importorskip("peft")

    def adapted(pipe: Any) -> None:
        torch.manual_seed(0)
        for name, targets in (("one", ["to_q", "to_v"]), ("two", ["to_k"])):
            pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False), name)
        pipe.unet.set_adapter("one")

    run = recorded(small_stable_diffusion, prepare=adapted)
    unet, accelerated, view = run.denoiser, half_as_often(run), apart(run)
    changes = {
        "one": lambda: None,
        "two": lambda: unet.set_adapter("two"),
        "one again": lambda: unet.set_adapter("one"),
    }
    finals = {}
    for name, change in changes.items():
        change()
        finals[name] = run.rollout(accelerated)
        torch.testing.assert_close(finals[name], by_hand(view), rtol=1e-3, atol=1e-3)
    assert torch.equal(finals["one"], finals["one again"])
    assert not torch.allclose(finals["one"], finals["two"], atol=1e-2)
