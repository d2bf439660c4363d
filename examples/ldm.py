"""Accelerate a text-conditional latent UNet: the shipped digits model, or a Stable Diffusion given with --model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import compare, parse_arguments
from diffusers import DDIMScheduler, StableDiffusionPipeline
from digits import NUM_CLASSES, captions_of, load_pipeline

DIGITS = [caption for digit in range(NUM_CLASSES) for caption in captions_of(digit)]
PROMPTS = ["a photo of a cat", "a red house by the sea", "a bowl of fruit, oil painting", "a mountain at dawn"]


def shipped() -> StableDiffusionPipeline:
    """The shipped pipeline, for the command line: `fxmask learn examples/ldm.py:shipped`."""
    return load_pipeline("ldm")


@torch.no_grad()
def encoded_prompts(pipeline: StableDiffusionPipeline, prompts: list[str]) -> Callable[[int, torch.Generator], dict[str, Any]]:
    """Random prompts, as the conditioning that only the user can know."""
    states, _ = pipeline.encode_prompt(prompts, pipeline.device, num_images_per_prompt=1, do_classifier_free_guidance=False)

    def draw(batch_size: int, generator: torch.Generator) -> dict[str, Any]:
        return {
            "encoder_hidden_states": states[torch.randint(len(prompts), (batch_size,), generator=generator).to(states.device)]
        }

    return draw


if __name__ == "__main__":
    options = parse_arguments(__doc__, "build/ldm.png")
    if options.model:
        pipeline = StableDiffusionPipeline.from_pretrained(options.model, torch_dtype=options.dtype)
    else:
        pipeline = load_pipeline("ldm")
    pipeline.to(options.device, options.dtype)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)

    @torch.no_grad()
    def decode(latents: torch.Tensor) -> torch.Tensor:
        """Latents to images in [-1, 1]."""
        return pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample

    conditioning = encoded_prompts(pipeline, PROMPTS if options.model else DIGITS)
    compare(pipeline.unet.eval(), scheduler, options, conditioning, decode, encoded_prompts(pipeline, [""]))
