"""Kinds of pipeline that make images, for `pipelines.py`."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from pipelines_parts import (
    FIRST,
    LENGTH,
    NEGATIVE,
    Pixels,
    autoencoder,
    clip_text,
    embeddings,
    image,
    kind,
    made,
    noise,
    ones,
    quiet,
    t5_text,
    tokenizer,
    unet,
)

NOISES = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NO_SIZE = None  # images that are given have one
Built = tuple[Any, dict[str, Any]]


def ddim() -> Any:
    return diffusers.DDIMScheduler(**NOISES, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def stable_diffusion(scheduler: Any = None, pipeline: Any = diffusers.StableDiffusionPipeline, **changes: Any) -> Any:
    parts = {"vae": autoencoder(), "text_encoder": clip_text(), "tokenizer": tokenizer(), "unet": unet(**changes)}
    rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return quiet(pipeline(**parts, scheduler=scheduler or ddim(), **rest))


def sd_call(**changes: Any) -> dict[str, Any]:
    size = {"height": 32, "width": 32}
    return {"prompt": FIRST, "negative_prompt": NEGATIVE, **size, "guidance_scale": 5.0, "output_type": "latent", **changes}


def without_size(call: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**{k: v for k, v in call.items() if k not in ("height", "width")}, **changes}


def inpainted() -> dict[str, torch.Tensor]:
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 16:] = 1.0
    return {"image": image(), "mask_image": mask}


@kind(second={}, unguided=None, larger=None, batch={"batch_size": 2})
def ddpm() -> Built:
    """No prompt; draws noise at every step."""
    model = made(
        diffusers.UNet2DModel,
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return quiet(diffusers.DDPMPipeline(unet=model, scheduler=diffusers.DDPMScheduler())), {"output_type": "np"}


@kind(second={"class_labels": [5]}, larger=None, batch={"class_labels": [3, 4]})
def dit() -> Built:
    model = made(
        diffusers.DiTTransformer2DModel,
        sample_size=16,
        num_layers=3,
        patch_size=4,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    pipe = diffusers.DiTPipeline(transformer=model, vae=Pixels(), scheduler=diffusers.DDIMScheduler())
    return quiet(pipe), {"class_labels": [3], "output_type": "np"}


@kind()
def sd() -> Built:
    return stable_diffusion(), sd_call()


@kind()
def sd_euler_ancestral() -> Built:
    """Draws noise at every step."""
    return stable_diffusion(diffusers.EulerAncestralDiscreteScheduler(**NOISES)), sd_call()


@kind()
def sd_heun() -> Built:
    """Two calls of the denoiser a step."""
    return stable_diffusion(diffusers.HeunDiscreteScheduler(**NOISES)), sd_call()


@kind()
def sd_dpm_sde() -> Built:
    scheduler = diffusers.DPMSolverMultistepScheduler(**NOISES, algorithm_type="sde-dpmsolver++", use_karras_sigmas=True)
    return stable_diffusion(scheduler), sd_call()


@kind()
def sd_pndm() -> Built:
    return stable_diffusion(diffusers.PNDMScheduler(**NOISES, skip_prk_steps=True, steps_offset=1)), sd_call()


@kind(larger=NO_SIZE, unguided={"guidance_scale": 1.0})
def sd_image_to_image() -> Built:
    """Starts in the middle."""
    pipe = stable_diffusion(pipeline=diffusers.StableDiffusionImg2ImgPipeline)
    return pipe, without_size(sd_call(), image=image(), strength=0.7)


@kind(larger=NO_SIZE)
def sd_inpaint() -> Built:
    return stable_diffusion(pipeline=diffusers.StableDiffusionInpaintPipeline), sd_call(**inpainted())


@kind(larger=NO_SIZE)
def sd_inpaint_9_channels() -> Built:
    pipe = stable_diffusion(pipeline=diffusers.StableDiffusionInpaintPipeline, in_channels=9)
    return pipe, sd_call(**inpainted())


def _with_control() -> Any:
    plain = stable_diffusion()
    torch.manual_seed(0)
    channels = {"conditioning_channels": 3, "conditioning_embedding_out_channels": (8, 8)}
    control = diffusers.ControlNetModel.from_unet(plain.unet, load_weights_from_unet=False, **channels).eval()
    for parameter in control.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    parts = {**plain.components, "controlnet": control, "requires_safety_checker": False}
    return quiet(diffusers.StableDiffusionControlNetPipeline(**parts))


@kind(larger=NO_SIZE)
def sd_controlnet() -> Built:
    return _with_control(), sd_call(image=image())


@kind(larger=NO_SIZE)
def sd_controlnet_ends_early() -> Built:
    return _with_control(), sd_call(image=image(), control_guidance_end=0.5)


@kind(unguided={"guidance_scale": 1.0, "pag_scale": 0.0})
def sd_perturbed_attention() -> Built:
    """Three rows for each image."""
    return stable_diffusion(pipeline=diffusers.StableDiffusionPAGPipeline), sd_call(pag_scale=3.0)


def _stop_guidance(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
    """As diffusers' documentation does it: from the middle on, no unconditional row."""
    if step == 3:
        pipe._guidance_scale = 0.0
        values["prompt_embeds"] = values["prompt_embeds"].chunk(2)[-1]
    return values


@kind(unguided=None)
def sd_guidance_stops_midway() -> Built:
    call = sd_call(callback_on_step_end=_stop_guidance, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    return stable_diffusion(), call


def sdxl(pipeline: Any = diffusers.StableDiffusionXLPipeline) -> Any:
    model = unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 12,
        cross_attention_dim=32,
    )
    text = {"text_encoder": clip_text(), "text_encoder_2": clip_text(projected=True)}
    scheduler = diffusers.EulerDiscreteScheduler(**NOISES, steps_offset=1, timestep_spacing="leading")
    tokens = {"tokenizer": tokenizer(), "tokenizer_2": tokenizer()}
    return quiet(pipeline(vae=autoencoder(), **text, **tokens, unet=model, scheduler=scheduler))


@kind()
def sdxl_text_to_image() -> Built:
    return sdxl(), sd_call()


@kind(larger=NO_SIZE)
def sdxl_image_to_image() -> Built:
    return sdxl(diffusers.StableDiffusionXLImg2ImgPipeline), without_size(sd_call(), image=image(), strength=0.7)


@kind(larger=NO_SIZE)
def sdxl_inpaint() -> Built:
    return sdxl(diffusers.StableDiffusionXLInpaintPipeline), sd_call(**inpainted(), strength=0.9)


def _sd3() -> Any:
    model = made(
        diffusers.SD3Transformer2DModel,
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=24,
        pos_embed_max_size=32,
    )
    text = {f"text_encoder{n}": clip_text(projected=True) for n in ("", "_2")} | {"text_encoder_3": t5_text(32)}
    tokens = {f"tokenizer{n}": tokenizer() for n in ("", "_2", "_3")}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return quiet(
        diffusers.StableDiffusion3Pipeline(transformer=model, scheduler=scheduler, vae=autoencoder(), **text, **tokens)
    )


@kind()
def sd3() -> Built:
    return _sd3(), sd_call(max_sequence_length=LENGTH)


@kind(unguided=None)
def sd3_skipped_layers() -> Built:
    """Some steps make a further call, which leaves a layer out."""
    skipped = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.2, "skip_layer_guidance_stop": 0.6}
    return _sd3(), sd_call(max_sequence_length=LENGTH, **skipped)


def _flux() -> Any:
    model = made(
        diffusers.FluxTransformer2DModel,
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    text = {"text_encoder": clip_text(), "text_encoder_2": t5_text()}
    tokens = {"tokenizer": tokenizer(), "tokenizer_2": tokenizer()}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return quiet(diffusers.FluxPipeline(scheduler=scheduler, vae=autoencoder(), **text, **tokens, transformer=model))


FLUX_CALL = {"prompt": FIRST, "height": 32, "width": 32, "guidance_scale": 3.5, "max_sequence_length": LENGTH}


@kind(unguided={"guidance_scale": 1.5})
def flux() -> Built:
    """Timesteps depend on the size; guidance is an input."""
    return _flux(), {**FLUX_CALL, "output_type": "latent"}


@kind(unguided={"true_cfg_scale": 1.0})
def flux_true_guidance() -> Built:
    """Two calls a step, with names."""
    return _flux(), {**FLUX_CALL, "negative_prompt": NEGATIVE, "true_cfg_scale": 3.0, "output_type": "latent"}


@kind(unguided={"guidance_scale": 0.0})
def chroma() -> Built:
    model = made(
        diffusers.ChromaTransformer2DModel,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    parts = {"vae": autoencoder(), "text_encoder": t5_text(), "tokenizer": tokenizer()}
    return quiet(diffusers.ChromaPipeline(scheduler=scheduler, **parts, transformer=model)), sd_call(max_sequence_length=LENGTH)


@kind()
def pixart_sigma() -> Built:
    model = made(
        diffusers.PixArtTransformer2DModel,
        sample_size=16,
        num_layers=3,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=24,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    parts = {"tokenizer": tokenizer(), "text_encoder": t5_text(), "vae": autoencoder(), "transformer": model}
    pipe = diffusers.PixArtSigmaPipeline(**parts, scheduler=diffusers.DPMSolverMultistepScheduler())
    return quiet(pipe), sd_call(use_resolution_binning=False, clean_caption=False, max_sequence_length=LENGTH)


def _sana(**changes: Any) -> Any:
    return made(
        diffusers.SanaTransformer2DModel,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=24,
        sample_size=16,
        **changes,
    )


PROMPT = {"prompt_embeds": embeddings(24), "prompt_attention_mask": ones()}
UNWANTED = {"negative_prompt_embeds": embeddings(24, seed=1), "negative_prompt_attention_mask": ones()}
SECOND_EMBEDDINGS = {"prompt_embeds": embeddings(24, seed=2)}


@kind(second=SECOND_EMBEDDINGS, larger={"height": 64})
def sana() -> Built:
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = diffusers.SanaPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=_sana(), scheduler=scheduler)
    pipe.vae_scale_factor = 2
    rest = {"negative_prompt": None, "height": 32, "width": 32, "guidance_scale": 4.5, "use_resolution_binning": False}
    return quiet(pipe), {**PROMPT, **UNWANTED, **rest, "output_type": "latent"}


@kind(second=SECOND_EMBEDDINGS, unguided={"guidance_scale": 1.5}, larger={"height": 64}, steps=4)
def sana_sprint() -> Built:
    """Few steps of a consistency model, which draws noise between them."""
    model = _sana(guidance_embeds=True, qk_norm="rms_norm_across_heads")
    parts = {"tokenizer": None, "text_encoder": None, "vae": None}
    pipe = diffusers.SanaSprintPipeline(**parts, transformer=model, scheduler=diffusers.SCMScheduler())
    pipe.vae_scale_factor = 2
    rest = {"height": 32, "width": 32, "guidance_scale": 4.5, "use_resolution_binning": False, "intermediate_timesteps": None}
    return quiet(pipe), {**PROMPT, **rest, "output_type": "latent"}


@kind(second=SECOND_EMBEDDINGS, unguided={"true_cfg_scale": 1.0}, larger={"height": 96})
def qwen_image() -> Built:
    """Two calls a step, whose texts differ in length."""
    model = made(
        diffusers.QwenImageTransformer2DModel,
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 4, 8),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    vae = Pixels(z_dim=4, temperal_downsample=[False, True, True])
    vae.temperal_downsample = [False, True, True]
    pipe = diffusers.QwenImagePipeline(scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, transformer=model)
    text = {"prompt_embeds": embeddings(24), "prompt_embeds_mask": ones()}
    other = {"negative_prompt_embeds": embeddings(24, 5, seed=1), "negative_prompt_embeds_mask": ones(5)}
    return quiet(pipe), {**text, **other, "true_cfg_scale": 4.0, "height": 64, "width": 64, "output_type": "latent"}


# Texts of two, since with several samples of one text these masks are repeated along the wrong dimension.
TWO = {name: x.repeat(2, *[1] * (x.dim() - 1)) for name, x in {**PROMPT, **UNWANTED}.items()}


def _lumina() -> Any:
    model = made(
        diffusers.Lumina2Transformer2DModel,
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(64, 64, 64),
        cap_feat_dim=24,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    parts = {"vae": autoencoder(), "text_encoder": None, "tokenizer": None}
    return quiet(diffusers.Lumina2Pipeline(transformer=model, scheduler=scheduler, **parts))


@kind(second=SECOND_EMBEDDINGS, batch=TWO)
def lumina2() -> Built:
    size = {"height": 32, "width": 32, "guidance_scale": 4.0, "output_type": "latent"}
    return _lumina(), {**PROMPT, **UNWANTED, **size}


@kind(second=SECOND_EMBEDDINGS, batch=TWO)
def lumina2_guidance_truncated() -> Built:
    """No second call in the later steps."""
    size = {"height": 32, "width": 32, "guidance_scale": 4.0, "output_type": "latent"}
    return _lumina(), {**PROMPT, **UNWANTED, **size, "cfg_trunc_ratio": 0.5}


@kind(second={"prompt_embeds": [embeddings(24, seed=2)[0]]}, unguided={"guidance_scale": 0.0})
def z_image() -> Built:
    """Samples and texts are lists of tensors."""
    model = made(
        diffusers.ZImageTransformer2DModel,
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 32, 32],
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = diffusers.ZImagePipeline(scheduler, autoencoder(), None, None, model)
    text = {"prompt_embeds": [embeddings(24)[0]], "negative_prompt_embeds": [embeddings(24, 5, seed=1)[0]]}
    return quiet(pipe), {**text, "height": 32, "width": 32, "guidance_scale": 4.0, "output_type": "latent"}


@kind(second=SECOND_EMBEDDINGS)
def auraflow() -> Built:
    model = made(
        diffusers.AuraFlowTransformer2DModel,
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=1024,
    )
    parts = {"tokenizer": None, "text_encoder": None, "vae": autoencoder()}
    pipe = diffusers.AuraFlowPipeline(**parts, transformer=model, scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    size = {"height": 32, "width": 32, "guidance_scale": 4.0, "output_type": "latent"}
    return quiet(pipe), {**PROMPT, **UNWANTED, **size}


@kind(second=SECOND_EMBEDDINGS, larger={"height": 64})
def cogview4() -> Built:
    model = made(
        diffusers.CogView4Transformer2DModel,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=24,
        time_embed_dim=16,
        condition_dim=8,
        rope_axes_dim=(16, 16),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = diffusers.CogView4Pipeline(None, None, autoencoder(), model, scheduler)
    text = {"prompt_embeds": embeddings(24), "negative_prompt_embeds": embeddings(24, seed=1)}
    size = {"height": 32, "width": 32, "original_size": (32, 32), "guidance_scale": 4.0, "output_type": "latent"}
    return quiet(pipe), {**text, **size}


class Quantizer(Pixels):
    """Stands for the autoencoder of Kandinsky."""

    def __init__(self) -> None:
        super().__init__(block_out_channels=(1, 1, 1, 1))


def _kandinsky_unet() -> Any:
    return unet(
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        encoder_hid_dim=24,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=16,
        resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    )


@kind(second={"image_embeds": noise(1, 24, seed=2)}, larger={"height": 192})
def kandinsky_decoder() -> Built:
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False)
    pipe = diffusers.KandinskyV22Pipeline(unet=_kandinsky_unet(), scheduler=scheduler, movq=Quantizer())
    embedded = {"image_embeds": noise(1, 24), "negative_image_embeds": noise(1, 24, seed=1)}
    return quiet(pipe), {**embedded, "height": 128, "width": 128, "guidance_scale": 4.0, "output_type": "latent"}


def _cascade(**config: Any) -> Any:
    usual = {"block_out_channels": (16, 16), "num_attention_heads": (2, 2), "down_num_layers_per_block": (1, 1)}
    usual |= {"up_num_layers_per_block": (1, 1), "timestep_ratio_embedding_dim": 8, "conditioning_dim": 16}
    usual |= {"clip_text_pooled_in_channels": 12, "dropout": (0.0, 0.0)}
    from diffusers.models.unets.unet_stable_cascade import StableCascadeUNet

    return made(StableCascadeUNet, **{**usual, **config})


CASCADE_STEPS = ("num_inference_steps", "prior_num_inference_steps")


@kind(
    unguided={"decoder_guidance_scale": 1.0},
    larger={"height": 256},
    step_names=CASCADE_STEPS,
    batch={"num_images_per_prompt": 2},
)
def stable_cascade() -> Built:
    """Two denoisers, one after the other, each with a sampling loop of its own."""
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    prior = _cascade(in_channels=4, out_channels=4, clip_text_in_channels=16, clip_image_in_channels=12)
    decoder = _cascade(in_channels=4, out_channels=4, patch_size=2, effnet_in_channels=4, clip_text_pooled_in_channels=12)
    text = clip_text(projected=True)
    quantizer = made(PaellaVQModel, levels=2, bottleneck_blocks=1, embed_dim=8, latent_channels=4, num_vq_embeddings=16)
    pipe = diffusers.StableCascadeCombinedPipeline(
        tokenizer=tokenizer(),
        text_encoder=text,
        decoder=decoder,
        scheduler=diffusers.DDPMWuerstchenScheduler(),
        vqgan=quantizer,
        prior_prior=prior,
        prior_text_encoder=text,
        prior_tokenizer=tokenizer(),
        prior_scheduler=diffusers.DDPMWuerstchenScheduler(),
    )
    guided = {"prior_guidance_scale": 4.0, "decoder_guidance_scale": 1.1}
    size = {"height": 128, "width": 128, "output_type": "latent"}
    return quiet(pipe), {"prompt": FIRST, "negative_prompt": NEGATIVE, **guided, **size}
