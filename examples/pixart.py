"""Accelerate a text-conditional latent transformer: the shipped digits model, or a PixArt-alpha given with --model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import compare, parse_arguments
from diffusers import DDIMScheduler, PixArtAlphaPipeline
from digits import CAPTION_TOKENS, NUM_CLASSES, captions_of, load_pipeline

DIGITS = [caption for digit in range(NUM_CLASSES) for caption in captions_of(digit)]
PROMPTS = ["a photo of a cat", "a red house by the sea", "a bowl of fruit, oil painting", "a mountain at dawn"]
PROMPT_TOKENS = 120  # What PixArt-alpha was trained with.


def shipped() -> tuple[PixArtAlphaPipeline, dict[str, Any]]:
    """The shipped pipeline and what its calls need, for the command line: `fxmask learn examples/pixart.py:shipped`."""
    # Its bins are of sizes from 256 pixels up, and its captions up to 120 tokens long.
    return load_pipeline("pixart"), {
        "prompt": "a seven",
        "use_resolution_binning": False,
        "clean_caption": False,
        "max_sequence_length": CAPTION_TOKENS,
    }


@torch.no_grad()
def encoded_prompts(
    pipeline: PixArtAlphaPipeline, prompts: list[str], length: int
) -> Callable[[int, torch.Generator], dict[str, Any]]:
    """Random prompts of `length` tokens, as the conditioning that only the user can know."""
    states, mask, _, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=length)
    config = pipeline.transformer.config
    pixels = float(config.sample_size * pipeline.vae_scale_factor)

    def draw(batch_size: int, generator: torch.Generator) -> dict[str, Any]:
        chosen = torch.randint(len(prompts), (batch_size,), generator=generator).to(states.device)
        size: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if pipeline.transformer.use_additional_conditions:
            size = {"resolution": states.new_full((batch_size, 2), pixels), "aspect_ratio": states.new_ones(batch_size, 1)}
        return {
            "encoder_hidden_states": states[chosen],
            "encoder_attention_mask": mask[chosen],
            "added_cond_kwargs": size,
        }

    return draw


if __name__ == "__main__":
    options = parse_arguments(__doc__, "build/pixart.png")
    if options.model:
        pipeline = PixArtAlphaPipeline.from_pretrained(options.model, torch_dtype=options.dtype)
    else:
        pipeline = load_pipeline("pixart")
    pipeline.to(options.device, options.dtype)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)

    @torch.no_grad()
    def decode(latents: torch.Tensor) -> torch.Tensor:
        """Latents to images in [-1, 1]."""
        return pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample

    prompts, length = (PROMPTS, PROMPT_TOKENS) if options.model else (DIGITS, CAPTION_TOKENS)
    conditioning, empty = (encoded_prompts(pipeline, texts, length) for texts in (prompts, [""]))
    compare(pipeline.transformer.eval(), scheduler, options, conditioning, decode, empty)
