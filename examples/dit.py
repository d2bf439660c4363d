"""Accelerate a class-conditional DiT: the shipped digits model, or a pipeline given with --model."""

from __future__ import annotations

import torch
from common import compare, parse_arguments
from diffusers import DDIMScheduler, DiTPipeline
from digits import NULL_CLASS, load_model, load_scheduler

NUM_CLASSES = {True: 1000, False: 10}  # of ImageNet models on the hub, of the digits


def class_labels(count: int) -> object:
    """Random classes, as the conditioning that only the user can know."""
    return lambda batch_size, generator: {"class_labels": torch.randint(count, (batch_size,), generator=generator)}


def no_class(batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The class that stands for none."""
    return {"class_labels": torch.full((batch_size,), NULL_CLASS)}


if __name__ == "__main__":
    options = parse_arguments(__doc__, "build/dit.png")
    decode = torch.Tensor.detach  # the digits model works on pixels
    if options.model:
        pipeline = DiTPipeline.from_pretrained(options.model, torch_dtype=options.dtype)
        model, scheduler = pipeline.transformer.eval(), DDIMScheduler.from_config(pipeline.scheduler.config)

        @torch.no_grad()
        def decode(latents: torch.Tensor) -> torch.Tensor:
            vae = pipeline.vae.to(options.device)
            return vae.decode(latents / vae.config.scaling_factor).sample

    else:
        model, scheduler = load_model("dit"), load_scheduler()
    model = model.to(options.device, options.dtype)
    compare(model, scheduler, options, class_labels(NUM_CLASSES[bool(options.model)]), decode, no_class)
