"""Several calls within one step: told apart by name, of other lengths, starting or ending midway, or leaving layers out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pipelines import PIPELINES, Vae, generator, randn, wan_transformer
from test_settings import accelerated, images, small

import fxmask
from fxmask.learning.instant.parts import PartsLearner, RunPart, learner_of, parts_of
from fxmask.settings import better as better_module
from fxmask.settings.pipeline import session_of

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

STEPS = 8


def wan(**options: Any) -> tuple[Any, dict[str, Any]]:
    pipe, call = PIPELINES["wan"]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**call, "num_inference_steps": STEPS, "num_videos_per_prompt": 1, **options}


def guided_until(step: int) -> Any:
    """A callback that switches guidance off for pipelines that call the denoiser once for each prompt."""

    def stop(pipe: Any, i: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if i == step - 1:
            pipe._guidance_scale = 1.0
        return values

    return stop


def halved_after(step: int) -> Any:
    """The same for pipelines that call it once for both prompts."""

    def stop(pipe: Any, i: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if i == step - 1:
            pipe._guidance_scale = 0.0
            values["prompt_embeds"] = values["prompt_embeds"].chunk(2)[-1]
        return values

    return stop


# Names


def model_and_calls() -> tuple[torch.nn.Module, dict[str, torch.Tensor], fxmask.PipelineTrajectory]:
    pipe, call = wan()
    run = fxmask.record_pipeline(pipe, **call, generator=generator())
    given = {k: v for k, v in run.calls[0][0].items() if isinstance(v, torch.Tensor)}
    return run.denoiser, given, run


def test_names_of_lanes_are_recorded() -> None:
    _, _, run = model_and_calls()
    assert set(run.lanes) == {("cond", "uncond")}
    pipe, call = small()
    assert set(fxmask.record_pipeline(pipe, **call, num_inference_steps=3).lanes) == {(None,)}


def test_lanes_that_nothing_else_tells_apart_follow_the_plan() -> None:
    """Two lanes with the same prompt, which nobody marks: in doubt without names, and both right with them."""
    model, given, run = model_and_calls()
    program = fxmask.capture(model, run.calls[0][0], run.roles)
    output = next(block.name for block in program.blocks if block.kind == "output")
    mask = fxmask.Mask(torch.tensor([[i % 2 == 0] for i in range(STEPS)]), run.timesteps, (output,))

    def sampled(named: bool) -> tuple[list[torch.Tensor], Any]:
        accelerated = fxmask.compile(program, fxmask.rectify(program, mask), "eager")
        outputs = []
        with torch.no_grad():
            for t, (first, _) in zip(run.timesteps, run.calls, strict=True):
                for name, factor in (("cond", 1.0), ("uncond", 0.5)):  # another sample, the same prompt
                    call = {**first, "hidden_states": first["hidden_states"] * factor}
                    call["timestep"] = torch.full_like(given["timestep"], t)
                    if named:
                        with accelerated.cache_context(name, step_index=0):
                            outputs.append(accelerated(**call)[0])
                    else:
                        outputs.append(accelerated(**call)[0])
        return outputs, accelerated.report()

    outputs, report = sampled(named=True)
    assert sum(run.followed for run in report.runs) == 2 * (STEPS - 1)
    for lane in (0, 1):
        reused = [torch.equal(outputs[2 * i + lane], outputs[2 * (i + 1) + lane]) for i in range(0, STEPS - 1, 2)]
        assert all(reused), "a lane read another one's cache"
    with pytest.warns(UserWarning, match="cannot be told apart"):
        _, report = sampled(named=False)
    assert sum(run.followed for run in report.runs) < 2 * (STEPS - 1)


def test_the_originals_hooks_hear_of_the_name() -> None:
    heard = []
    model = wan_transformer()
    context = type(model).cache_context

    def listening(self: Any, name: str, **options: Any) -> Any:
        heard.append((name, options))
        return context(self, name, **options)

    type(model).cache_context = listening
    try:
        accelerated = fxmask.runtime.model.AcceleratedModel.without_plan(model)
        with accelerated.cache_context("cond", step_index=3):
            pass
    finally:
        type(model).cache_context = context
    assert heard == [("cond", {"step_index": 3})]
    pipe, _ = small()  # one whose class has no such context
    with fxmask.runtime.model.AcceleratedModel.without_plan(pipe.unet).cache_context("cond"):
        pass


# Lengths


def qwen() -> tuple[Any, dict[str, Any]]:
    """Conditional and unconditional texts of other lengths."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel

    torch.manual_seed(0)
    sizes = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24}
    config = {"patch_size": 2, "in_channels": 16, "out_channels": 4, "axes_dims_rope": (4, 4, 8)}
    vae = Vae()
    vae.config.z_dim, vae.temperal_downsample = 4, [False, True, True]
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = QwenImagePipeline(scheduler, vae, None, None, QwenImageTransformer2DModel(**sizes, **config).eval())
    pipe.set_progress_bar_config(disable=True)
    text = {"prompt_embeds": randn(1, 7, 24), "prompt_embeds_mask": torch.ones(1, 7, dtype=torch.int64)}
    text |= {"negative_prompt_embeds": randn(1, 5, 24), "negative_prompt_embeds_mask": torch.ones(1, 5, dtype=torch.int64)}
    return pipe, {**text, "true_cfg_scale": 4.0, "height": 64, "width": 64, "output_type": "latent"}


def test_lanes_of_other_lengths_are_learned_and_run() -> None:
    pipe, call = qwen()
    accelerated(pipe, speedup=1.5, example_calls=[call], num_inference_steps=4, effort="quick")
    images(pipe, call, 7, num_inference_steps=4)
    session = session_of(pipe)
    assert session.account().images == 1
    assert [run.followed for run in pipe.transformer.report().runs[-2:]] == [3, 3]


# Midway


@pytest.mark.parametrize(("build", "stop"), [(wan, guided_until), (small, halved_after)])
def test_guidance_that_stops_midway(build: Any, stop: Any) -> None:
    pipe, call = build()
    name = "transformer" if hasattr(pipe, "transformer") else "unet"
    inputs = [] if name == "transformer" else ["prompt_embeds"]
    extra = {"callback_on_step_end": stop(3), "num_inference_steps": STEPS}
    call = {**call, **extra, **({"callback_on_step_end_tensor_inputs": inputs} if inputs else {})}
    plain = [images(pipe, call, seed) for seed in (0, 1)]
    accelerated(pipe, speedup=1.5)
    assert torch.equal(images(pipe, call, 0), plain[0])
    made = images(pipe, call, 1)
    session, model = session_of(pipe), getattr(pipe, name)
    assert session.account().images == 1
    assert model.plan.mac_ratio >= 1.49
    assert model.mask.compute.all(dim=1)[3], "where the form changes nothing can be formed"
    assert (
        all(j >= 3 for load in model.plan.steps[4].load for j in [s.step for s in load.slots])
        if model.plan.steps[4].load
        else True
    )
    assert bool(made.isfinite().all())
    assert not torch.equal(made, plain[1])
    following = [run for run in model.report().runs if run.followed]
    assert sum(run.calls for run in following) >= (2 if name == "transformer" else 1) * 3


def test_parts_of_a_run() -> None:
    pipe, call = wan()
    run = fxmask.record_pipeline(pipe, **call, callback_on_step_end=guided_until(3), generator=generator())
    assert parts_of(run) == [(0, 3), (3, STEPS)]
    later = RunPart(run, 3, STEPS)
    assert later.num_steps == STEPS - 3
    assert torch.equal(later.rollout(run.denoiser), run.final)
    learner = learner_of([run])
    assert isinstance(learner, PartsLearner)
    plans = [own.plans(2)[0] for own in learner.learners]
    whole = learner.joined(plans)
    assert whole.computed == (*plans[0].computed, *(3 + i for i in plans[1].computed))
    assert learner.part_of(whole, 1).terms == plans[1].terms
    read = {j for i, (js, _) in whole.terms.items() if i >= 3 for j in js}
    assert all(j % STEPS >= 3 for j in read)
    other = fxmask.record_pipeline(pipe, **call, callback_on_step_end=guided_until(4), generator=generator())
    with pytest.raises(fxmask.InputError, match="at different steps"):
        learner_of([run, other])
    assert learner_of([run, other][:1]).bounds == learner.bounds


def test_estimates_are_of_the_longest_part() -> None:
    pipe, call = wan(callback_on_step_end=guided_until(3))
    accelerated(pipe, speedup=1.5)
    for seed in (0, 1):
        images(pipe, call, seed)
    known = next(iter(session_of(pipe).settings.values()))
    assert known.checks is not None
    assert min(known.checks.by_step) >= 3
    assert pipe.transformer.report().error > 0


# Layers left out


def test_a_call_that_leaves_layers_out_has_the_plan_too() -> None:
    from diffusers import SD3Transformer2DModel

    pipe, call = PIPELINES["sd3"]()
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    pipe.transformer = SD3Transformer2DModel.from_config({**pipe.transformer.config, "num_layers": 3}).eval()
    one = {k: v[:1] if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    skipped = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.2, "skip_layer_guidance_stop": 0.8}
    call = {**one, **skipped, "num_inference_steps": STEPS}
    plain = [images(pipe, call, seed) for seed in (0, 1)]
    accelerated(pipe, speedup=1.3)
    assert torch.equal(images(pipe, call, 0), plain[0])
    made = images(pipe, call, 1)
    runs = pipe.transformer.report().runs
    assert sum(run.original for run in runs) == 0
    assert len([run for run in runs if run.followed]) == 2  # of both kinds of call
    assert bool(made.isfinite().all())
    forms = pipe.transformer.programs
    assert {len(program.blocks) for program in forms} == {len(pipe.transformer.blocks), len(pipe.transformer.blocks) - 4}


def learned(pipe: Any, call: Any, monkeypatch: pytest.MonkeyPatch) -> fxmask.Mask:
    """The mask that further calls of the denoiser find where the form of calls changes, whether or not it is better."""
    found = []

    def spied(program: Any, mask: Any, judges: Any, real: Any = better_module.decibels_on) -> torch.Tensor:
        found.append((mask, real(program, mask, judges)))
        return found[-1][1]

    monkeypatch.setattr(better_module, "decibels_on", spied)
    accelerated(pipe, example_calls=[call], effort="quick", speedup=1.5)
    (mask, ours), (_, theirs) = found
    assert ours.isfinite().all()
    assert float(ours.mean()) < float(theirs.mean()) + 20, "it is no plan of another run"
    return mask


@pytest.mark.parametrize(("build", "stop"), [(wan, guided_until), (small, halved_after)])
def test_more_effort_learns_where_guidance_stops_midway(build: Any, stop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call = build()
    inputs = {} if hasattr(pipe, "transformer") else {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    call = {**call, "callback_on_step_end": stop(3), "num_inference_steps": STEPS, **inputs}
    mask = learned(pipe, call, monkeypatch)
    known = next(iter(session_of(pipe).settings.values()))
    assert mask.num_steps == STEPS
    assert mask.compute[3].all(), "where the form changes nothing can be formed"
    assert not mask.compute[1:3].all()
    assert not mask.compute[4:].all()
    plan = fxmask.rectify(session_of(pipe).program, mask)
    assert all(slot.step >= 3 for step in plan.steps[4:] for load in step.load for slot in load.slots)
    assert plan.mac_ratio >= 0.97 * known.variants.plan.mac_ratio
    assert images(pipe, call, 9).isfinite().all()
    assert session_of(pipe).account().images == 1
