"""Kinds of pipeline that make video and sound, for `pipelines.py`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
from pipelines_images import ddim, sd_call
from pipelines_parts import (
    LENGTH,
    Pixels,
    autoencoder,
    clip_text,
    embeddings,
    kind,
    made,
    noise,
    ones,
    quiet,
    t5_text,
    tokenizer,
    unet,
)

Built = tuple[Any, dict[str, Any]]
SECOND_EMBEDDINGS = {"prompt_embeds": embeddings(24, seed=2)}
VIDEOS = {"num_videos_per_prompt": 2}


def _wan(seed: int = 0) -> Any:
    return made(
        diffusers.WanTransformer3DModel,
        seed=seed,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=16,
        ffn_dim=64,
        num_layers=3,
        rope_max_seq_len=32,
    )


def _wan_pipeline(**parts: Any) -> Any:
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    vae = Pixels(scale_factor_temporal=4, scale_factor_spatial=8, z_dim=4)
    return quiet(diffusers.WanPipeline(None, None, vae=vae, scheduler=scheduler, transformer=_wan(), **parts))


def _wan_call() -> dict[str, Any]:
    text = {"prompt_embeds": embeddings(24), "negative_prompt_embeds": embeddings(24, seed=1)}
    return {**text, "height": 64, "width": 64, "num_frames": 5, "guidance_scale": 4.0, "output_type": "latent"}


WAN = {"second": SECOND_EMBEDDINGS, "batch": VIDEOS, "larger": {"height": 96}}


@kind(**WAN)
def wan() -> Built:
    """Two calls a step, with names."""
    return _wan_pipeline(), _wan_call()


@kind(**WAN)
def wan_2_2() -> Built:
    """Two denoisers, by noise level."""
    return _wan_pipeline(transformer_2=_wan(1), boundary_ratio=0.9), _wan_call()


@kind(batch=VIDEOS, larger={"height": 64})
def ltx() -> Built:
    model = made(
        diffusers.LTXVideoTransformer3DModel,
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=3,
        caption_channels=24,
    )
    vae = Pixels(latent_channels=8, timestep_conditioning=False)
    vae.spatial_compression_ratio, vae.temporal_compression_ratio = 4, 4
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    parts = {"text_encoder": t5_text(), "tokenizer": tokenizer()}
    pipe = diffusers.LTXPipeline(transformer=model, vae=vae, scheduler=scheduler, **parts)
    return quiet(pipe), sd_call(num_frames=9, guidance_scale=3.0, max_sequence_length=LENGTH)


def _cogvideox(scheduler: Any) -> Any:
    model = made(
        diffusers.CogVideoXTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=24,
        num_layers=3,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=LENGTH,
    )
    vae = Pixels(block_out_channels=(1, 1, 1, 1), temporal_compression_ratio=4, scaling_factor=1.0)
    parts = {"tokenizer": tokenizer(), "text_encoder": t5_text()}
    return quiet(diffusers.CogVideoXPipeline(**parts, vae=vae, transformer=model, scheduler=scheduler))


def _cogvideox_call(**changes: Any) -> dict[str, Any]:
    return sd_call(height=64, width=64, num_frames=9, max_sequence_length=LENGTH, **changes)


@kind(batch=VIDEOS, larger=None)
def cogvideox() -> Built:
    return _cogvideox(diffusers.CogVideoXDDIMScheduler()), _cogvideox_call()


@kind(batch=VIDEOS, larger=None)
def cogvideox_dynamic_guidance() -> Built:
    return _cogvideox(diffusers.CogVideoXDPMScheduler()), _cogvideox_call(use_dynamic_cfg=True)


@kind(second=SECOND_EMBEDDINGS, unguided={"guidance_scale": 1.5}, batch=VIDEOS, larger={"height": 64})
def hunyuan_video() -> Built:
    model = made(
        diffusers.HunyuanVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=24,
        pooled_projection_dim=12,
        rope_axes_dim=(4, 6, 6),
    )
    vae = Pixels()
    vae.temporal_compression_ratio, vae.spatial_compression_ratio = 4, 4
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = diffusers.HunyuanVideoPipeline(None, None, model, vae, scheduler, None, None)
    text = {"prompt_embeds": embeddings(24), "prompt_attention_mask": ones(), "pooled_prompt_embeds": noise(1, 12)}
    return quiet(pipe), {**text, "height": 32, "width": 32, "num_frames": 5, "output_type": "latent"}


TWO_TEXTS = {"prompt_embeds": embeddings(24).repeat(2, 1, 1), "prompt_attention_mask": ones().bool().repeat(2, 1)}
TWO_TEXTS |= {"negative_prompt_embeds": embeddings(24, seed=1).repeat(2, 1, 1)}
TWO_TEXTS |= {"negative_prompt_attention_mask": ones().bool().repeat(2, 1)}


@kind(second=SECOND_EMBEDDINGS, batch=TWO_TEXTS, larger={"height": 64})
def mochi() -> Built:
    model = made(
        diffusers.MochiTransformer3DModel,
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=24,
        time_embed_dim=4,
        max_sequence_length=7,
    )
    vae = Pixels()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.MochiPipeline(scheduler, vae, None, None, model)
    text = {"prompt_embeds": embeddings(24), "prompt_attention_mask": ones().bool()}
    other = {"negative_prompt_embeds": embeddings(24, seed=1), "negative_prompt_attention_mask": ones().bool()}
    return quiet(pipe), {**text, **other, "height": 32, "width": 32, "num_frames": 7, "output_type": "latent"}


@kind(batch=VIDEOS)
def animatediff() -> Built:
    adapter = made(
        diffusers.MotionAdapter,
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=4,
    )
    parts = {"vae": autoencoder(), "text_encoder": clip_text(), "tokenizer": tokenizer(), "unet": unet()}
    pipe = diffusers.AnimateDiffPipeline(**parts, motion_adapter=adapter, scheduler=ddim())
    pipe.unet.eval()
    return quiet(pipe), sd_call(num_frames=4)


@kind(
    second={"prompt_embeds": noise(1, 7, 16, seed=2)},
    batch={"num_waveforms_per_prompt": 2},
    larger={"audio_end_in_s": 6.0},
)
def stable_audio() -> Built:
    from diffusers.pipelines.stable_audio import StableAudioProjectionModel

    model = made(
        diffusers.StableAudioDiTModel,
        sample_size=48,
        in_channels=8,
        out_channels=8,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=32,
        cross_attention_input_dim=16,
    )
    projection = made(StableAudioProjectionModel, text_encoder_dim=16, conditioning_dim=16, min_value=0, max_value=32)
    vae = Pixels(sampling_rate=16, audio_channels=1)
    vae.hop_length, vae.sampling_rate = 4, 16
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(solver_order=2, prediction_type="v_prediction", sigma_data=1.0)
    pipe = diffusers.StableAudioPipeline(vae, None, projection, None, model, scheduler)
    text = {"prompt_embeds": noise(1, 7, 16), "attention_mask": ones()}
    other = {"negative_prompt_embeds": noise(1, 7, 16, seed=1), "negative_attention_mask": ones()}
    return quiet(pipe), {**text, **other, "audio_end_in_s": 8.0, "guidance_scale": 3.0, "output_type": "latent"}


class Named(Pixels):
    """Stands for a text encoder that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="t5")


class Vocoder(Pixels):
    """Stands for what makes sound of a spectrogram."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(upsample_rates=[4, 4], sampling_rate=1000, model_in_dim=8)


@kind(
    second={"prompt_embeds": noise(1, 7, 16, seed=2)},
    unguided={"guidance_scale": 1.0},
    batch={"num_waveforms_per_prompt": 2},
    larger={"audio_length_in_s": 1.024},
)
def audioldm2() -> Built:
    model = made(
        diffusers.AudioLDM2UNet2DConditionModel,
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=(None, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    parts: dict[str, Any] = {
        "text_encoder": Named(),
        "text_encoder_2": Named(),
        "projection_model": None,
        "language_model": Named(),
    }
    parts |= {"tokenizer": None, "tokenizer_2": None, "feature_extractor": None}
    pipe = diffusers.AudioLDM2Pipeline(Pixels(), **parts, unet=model, scheduler=ddim(), vocoder=Vocoder())
    text = {"prompt_embeds": noise(1, 7, 16), "generated_prompt_embeds": noise(1, 5, 16), "attention_mask": ones()}
    other = {"negative_prompt_embeds": noise(1, 7, 16, seed=1), "negative_generated_prompt_embeds": noise(1, 5, 16, seed=1)}
    length = {"audio_length_in_s": 0.512, "output_type": "latent"}
    return quiet(pipe), {**text, **other, "negative_attention_mask": ones(), **length}
