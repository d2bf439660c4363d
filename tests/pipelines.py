"""Small real pipelines of many kinds, with the calls that tests make of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ddim, tiny_dit, tiny_unet

import fxmask

PIPELINES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {}


def pipeline(build: Callable[[], tuple[Any, dict[str, Any]]]) -> Callable[[], tuple[Any, dict[str, Any]]]:
    PIPELINES[build.__name__] = build
    return build


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Vae(torch.nn.Module):
    """Latents are pixels."""

    def __init__(self) -> None:
        super().__init__()
        channels = (1, 1)
        self.config = SimpleNamespace(scaling_factor=1.0, block_out_channels=channels, latent_channels=4, force_upcast=False)
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def decode(self, latents: torch.Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(sample=latents)


def digits() -> Any:
    pytest.importorskip("transformers")
    pytest.importorskip("sklearn")
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    try:
        import digits as module
    finally:
        sys.path.pop(0)
    return module


# Image


@pipeline
def ddpm() -> tuple[Any, dict[str, Any]]:
    from diffusers import DDPMPipeline, DDPMScheduler

    return DDPMPipeline(unet=tiny_unet(), scheduler=DDPMScheduler()), {"batch_size": 2, "output_type": "np"}


@pipeline
def dit() -> tuple[Any, dict[str, Any]]:
    """Guidance doubles the batch."""
    from diffusers import DiTPipeline

    return DiTPipeline(transformer=tiny_dit(), vae=Vae(), scheduler=ddim()), {"class_labels": [3, 7], "output_type": "np"}


@pipeline
def stable_diffusion() -> tuple[Any, dict[str, Any]]:
    pipe = digits().load_pipeline("ldm")
    return pipe, {"prompt": ["a one", "the digit two"], "guidance_scale": 2.5, "output_type": "latent"}


def small_stable_diffusion() -> tuple[Any, dict[str, Any]]:
    """The same with a smaller denoiser, of random weights."""
    pipe, call = stable_diffusion()
    config = {**pipe.unet.config, "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 4}
    torch.manual_seed(0)
    pipe.unet = type(pipe.unet).from_config({**config, "layers_per_block": 1}).eval()
    return pipe, call


def animatediff() -> tuple[Any, dict[str, Any]]:
    """Video whose text has a row for every frame; the sample has one for every video."""
    from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter

    pipe, _ = small_stable_diffusion()
    torch.manual_seed(0)
    adapter = MotionAdapter(
        block_out_channels=tuple(pipe.unet.config.block_out_channels),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
    )
    parts = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "unet")}
    made = AnimateDiffPipeline(**parts, motion_adapter=adapter, scheduler=DDIMScheduler.from_config(pipe.scheduler.config))
    made.unet.eval()
    return made, {"prompt": "a one", "guidance_scale": 2.5, "num_frames": 3, "output_type": "latent"}


@pipeline
def euler_ancestral() -> tuple[Any, dict[str, Any]]:
    from diffusers import EulerAncestralDiscreteScheduler

    pipe, call = small_stable_diffusion()
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe, call


@pipeline
def heun() -> tuple[Any, dict[str, Any]]:
    """Two denoiser calls for every step but the last one; scales the model's input."""
    from diffusers import HeunDiscreteScheduler

    pipe, call = small_stable_diffusion()
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe, call


@pipeline
def image_to_image() -> tuple[Any, dict[str, Any]]:
    """Starts in the middle, from an encoded image."""
    pipe, call = small_stable_diffusion()
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionImg2ImgPipeline

    pipe = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    image = randn(2, pipe.vae.config.in_channels, size, size).tanh()
    return pipe, {**call, "image": image, "strength": 0.67, "num_inference_steps": 6}


@pipeline
def edited_image() -> tuple[Any, dict[str, Any]]:
    """Guidance of a text and of an image: three rows for each sample, with the image, or zeros, in channels of its own."""
    from diffusers import StableDiffusionInstructPix2PixPipeline

    pipe, call = small_stable_diffusion()
    wider = {**pipe.unet.config, "in_channels": 2 * pipe.unet.config.in_channels}
    torch.manual_seed(0)
    parts = {**pipe.components, "unet": type(pipe.unet).from_config(wider).eval()}
    pipe = StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    image = randn(2, pipe.vae.config.in_channels, size, size).tanh()
    return pipe, {**call, "image": image, "image_guidance_scale": 1.5}


@pipeline
def pixart() -> tuple[Any, dict[str, Any]]:
    options = {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 8, "guidance_scale": 2.5}
    return digits().load_pipeline("pixart"), {"prompt": ["a one", "the digit two"], "output_type": "latent", **options}


@pipeline
def control_net() -> tuple[Any, dict[str, Any]]:
    pipe, call = small_stable_diffusion()
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    torch.manual_seed(0)
    channels = {"conditioning_channels": 1, "conditioning_embedding_out_channels": (8, 8)}
    control = ControlNetModel.from_unet(pipe.unet, load_weights_from_unet=False, **channels).eval()
    for parameter in control.parameters():  # the convolutions that feed the denoiser start at zero
        torch.nn.init.normal_(parameter, std=0.02)
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    parts = {**pipe.components, "controlnet": control, "requires_safety_checker": False}
    return StableDiffusionControlNetPipeline(**parts), {**call, "image": randn(2, 1, size, size).sigmoid()}


@pipeline
def sd3() -> tuple[Any, dict[str, Any]]:
    """Flow matching."""
    pytest.importorskip("transformers")
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        pos_embed_max_size=8,
    ).eval()
    pipe = StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), Vae(), *[None] * 6)
    text = {"prompt_embeds": randn(2, 5, 16), "negative_prompt_embeds": randn(2, 5, 16, seed=1)}
    pooled = {"pooled_prompt_embeds": randn(2, 12), "negative_pooled_prompt_embeds": randn(2, 12, seed=1)}
    return pipe, {**text, **pooled, "height": 8, "width": 8, "output_type": "latent"}


@pipeline
def flux() -> tuple[Any, dict[str, Any]]:
    """Timesteps are divided by 1,000 before the denoiser sees them; latents are packed."""
    pytest.importorskip("transformers")
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    ).eval()
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), Vae(), None, None, None, None, transformer)
    text = {"prompt_embeds": randn(1, 5, 16), "pooled_prompt_embeds": randn(1, 12)}
    return pipe, {**text, "num_images_per_prompt": 2, "height": 8, "width": 8, "output_type": "latent"}


# Video and audio


def wan_transformer(seed: int = 0) -> torch.nn.Module:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=16,
        ffn_dim=64,
        num_layers=3,
        rope_max_seq_len=32,
    ).eval()


class VideoVae(Vae):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(scale_factor_temporal=4, scale_factor_spatial=8, z_dim=4)


@pipeline
def wan() -> tuple[Any, dict[str, Any]]:
    """Video; conditional and unconditional calls are separate lanes."""
    pytest.importorskip("transformers")
    from diffusers import UniPCMultistepScheduler, WanPipeline

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(None, None, vae=VideoVae(), scheduler=scheduler, transformer=wan_transformer())
    text = {"prompt_embeds": randn(1, 7, 24), "negative_prompt_embeds": randn(1, 7, 24, seed=1), "num_videos_per_prompt": 2}
    return pipe, {**text, "height": 64, "width": 64, "num_frames": 5, "guidance_scale": 4.0, "output_type": "latent"}


@pipeline
def stable_audio() -> tuple[Any, dict[str, Any]]:
    pytest.importorskip("transformers")
    from diffusers import EDMDPMSolverMultistepScheduler, StableAudioDiTModel, StableAudioPipeline
    from diffusers.pipelines.stable_audio import StableAudioProjectionModel

    torch.manual_seed(0)
    transformer = StableAudioDiTModel(
        sample_size=48,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=32,
        cross_attention_input_dim=16,
    ).eval()
    projection = StableAudioProjectionModel(text_encoder_dim=16, conditioning_dim=16, min_value=0, max_value=32).eval()
    vae = Vae()
    vae.hop_length, vae.sampling_rate = 4, 16
    vae.config.sampling_rate = 16
    vae.config.audio_channels = 1
    scheduler = EDMDPMSolverMultistepScheduler(solver_order=2, prediction_type="v_prediction", sigma_data=1.0)
    pipe = StableAudioPipeline(vae, None, projection, None, transformer, scheduler)
    mask = torch.ones(2, 7, dtype=torch.int64)
    text = {"prompt_embeds": randn(2, 7, 16), "attention_mask": mask, "audio_end_in_s": 8.0, "guidance_scale": 3.0}
    return pipe, {**text, "output_type": "latent"}


STOCHASTIC = ("ddpm", "euler_ancestral")


def record(name: str, **options: Any) -> tuple[Any, Callable[[], Any], fxmask.PipelineTrajectory]:
    pipe, call = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 4, **call, **options}
    before = {key: value for key, value in vars(pipe).items() if not key.startswith("_")}
    trajectory = fxmask.record_pipeline(pipe, **call, generator=generator())
    assert all(vars(pipe)[key] is value for key, value in before.items())
    return pipe, lambda: pipe(**call, generator=generator()), trajectory
