"""What users of diffusers do with a pipeline, done with an accelerated one."""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import pytest
import torch
from pipelines import PIPELINES, generator, randn, small_stable_diffusion
from test_settings import accelerated, images, small

import fxmask
from fxmask.settings.pipeline import session_of

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


def planned() -> tuple[Any, dict[str, Any]]:
    """An accelerated pipeline with a plan."""
    pipe, call = small()
    accelerated(pipe)
    for seed in (0, 1):
        images(pipe, call, seed)
    return pipe, call


def test_other_pipelines_of_its_parts() -> None:
    from diffusers import AutoPipelineForImage2Image, StableDiffusionImg2ImgPipeline

    pipe, call = planned()
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    given = {**call, "image": randn(2, pipe.vae.config.in_channels, size, size).tanh(), "strength": 0.6}
    parts = {**pipe.components, "unet": pipe.unet.original, "requires_safety_checker": False}
    own = StableDiffusionImg2ImgPipeline(**parts)
    own.set_progress_bar_config(disable=True)
    plain = [images(own, given, seed) for seed in (3, 4)]
    for factory in (StableDiffusionImg2ImgPipeline, AutoPipelineForImage2Image):
        other = factory.from_pipe(pipe)
        other.set_progress_bar_config(disable=True)
        assert type(other) is StableDiffusionImg2ImgPipeline
        assert other.unet is pipe.unet
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.testing.assert_close(images(other, given, 3), plain[0], rtol=1e-3, atol=1e-3)
    accelerated(other)
    assert torch.equal(images(other, given, 3), plain[0])
    images(other, given, 4)
    assert session_of(other).account().images == 1
    assert session_of(pipe) is not session_of(other)


def test_saved_pretrained_is_the_originals(tmp_path: Any) -> None:
    pipe, _ = planned()
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    assert config["_class_name"] == "UNet2DConditionModel"


def test_compiled_before() -> None:
    pipe, call = small()
    plain = images(pipe, call, 0)
    compiled = torch.compile(pipe.unet, backend="eager")
    pipe.unet = compiled
    accelerated(pipe)
    assert torch.equal(images(pipe, call, 0), plain)
    images(pipe, call, 1)
    assert session_of(pipe).account().images == 1
    assert fxmask.restore(pipe).unet is compiled


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_after(in_place: bool) -> None:
    pipe, call = planned()
    made = images(pipe, call, 1)
    if in_place:
        pipe.unet.compile(backend="eager")
    else:
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    before = session_of(pipe).account().images
    assert torch.equal(images(pipe, call, 1), made)
    assert session_of(pipe).account().images == before + 1


def test_accelerated_again_begins_anew() -> None:
    pipe, call = planned()
    original, cls = pipe.unet.original, type(pipe)
    accelerated(pipe, speedup=1.3)
    assert pipe.unet.original is original
    assert not session_of(pipe).settings
    assert type(pipe) is cls
    fxmask.restore(pipe)
    assert pipe.unet is original
    plain = images(pipe, call, 1)
    assert torch.equal(images(copy.copy(pipe), call, 1), plain)


def test_diffusers_own_cache_comes_first() -> None:
    from diffusers import FirstBlockCacheConfig

    pipe, call = PIPELINES["flux"]()
    pipe.set_progress_bar_config(disable=True)
    accelerated(pipe, speedup=1.5)
    for seed in (0, 1):
        images(pipe, call, seed)
    made, session = images(pipe, call, 1), session_of(pipe)
    before = session.account().images
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    assert pipe.transformer.is_cache_enabled
    with pytest.warns(UserWarning, match=r"enable_cache\(\) was called on the transformer"):
        cached = images(pipe, call, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(images(pipe, call, 1), cached)  # said once
    assert session.account().images == before
    assert not torch.equal(cached, made)
    pipe.transformer.disable_cache()
    assert torch.equal(images(pipe, call, 1), made)
    assert session.account().images == before + 1


def test_what_a_pipeline_puts_in_for_a_call_is_taken_out_after_replays() -> None:
    from diffusers import StableDiffusionPAGPipeline

    plain, call = small_stable_diffusion()
    parts = {**plain.components, "requires_safety_checker": False}
    pipe = StableDiffusionPAGPipeline(**parts, pag_applied_layers="mid")
    pipe.set_progress_bar_config(disable=True)
    before = [type(x).__name__ for x in pipe.unet.attn_processors.values()]
    accelerated(pipe, speedup=1.5)
    for seed in (0, 1):
        images(pipe, {**call, "pag_scale": 3.0}, seed)
    assert session_of(pipe).account().images == 1
    assert [type(x).__name__ for x in pipe.unet.attn_processors.values()] == before
    images(pipe, {**call, "pag_scale": 0.0})
    run = fxmask.record_pipeline(pipe, **call, pag_scale=3.0, num_inference_steps=3, generator=generator())
    loop = run.loop()
    next(loop)
    loop.close()  # ended in the middle
    assert [type(x).__name__ for x in pipe.unet.attn_processors.values()] == before


def test_plans_with_infinite_bounds_are_saved(tmp_path: Any) -> None:
    from diffusers import DPMSolverMultistepScheduler

    pipe, call = small()
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, lambda_min_clipped=-float("inf"))
    accelerated(pipe)
    images(pipe, call, 0)
    made = images(pipe, call, 1)
    fxmask.save(pipe, tmp_path / "plans")
    other, _ = small()
    other.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, lambda_min_clipped=-float("inf"))
    fxmask.load(tmp_path / "plans", other, backend="eager")
    assert torch.equal(images(other, call, 1), made)
