"""Accelerate an unconditional DDPM U-Net: the shipped digits model, or a pipeline given with --model."""

from __future__ import annotations

from common import compare, parse_arguments
from diffusers import DDIMScheduler, DDPMPipeline
from digits import load_model, load_scheduler

if __name__ == "__main__":
    options = parse_arguments(__doc__, "build/ddpm.png")
    if options.model:
        pipeline = DDPMPipeline.from_pretrained(options.model, torch_dtype=options.dtype)
        model, scheduler = pipeline.unet.eval(), DDIMScheduler.from_config(pipeline.scheduler.config)
    else:
        model, scheduler = load_model("ddpm"), load_scheduler()
    compare(model.to(options.device, options.dtype), scheduler, options)
