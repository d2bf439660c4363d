"""The shipped models as pipelines, for the small runs of the paper's tables.

fxmask evaluate examples/paper/table1-cifar10.toml --small --folder build/paper/table1-cifar10
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where digits.py is

import diffusers
from digits import (
    CAPTION_TOKENS,
    IMAGE_SIZE,
    NULL_CLASS,
    NUM_CLASSES,
    captions_of,
    load_classifier,
    load_digits,
    load_model,
    load_pipeline,
    load_scheduler,
)

Named = tuple[Any, list[dict[str, Any]]]


class PixelPipeline:
    """Sampling of a denoiser of pixels, with batched guidance where there are classes.

    Args:
        denoiser: a U-Net without conditioning, or a DiT.
        scheduler: its sampler.
    """

    def __init__(self, denoiser: torch.nn.Module, scheduler: Any) -> None:
        self.denoiser, self.scheduler = denoiser, scheduler

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int] | None = None,
        batch_size: int = 1,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.5,
        generator: torch.Generator | None = None,
        output_type: str = "pt",
    ) -> Any:
        """Images [B, 1, 16, 16] in [0, 1]."""
        count = len(class_labels) if class_labels else batch_size
        x = torch.randn(count, 1, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        options: dict[str, Any] = {"generator": generator}
        if "eta" in inspect.signature(self.scheduler.step).parameters:
            options["eta"] = 0.0
        for timestep in self.scheduler.timesteps:
            if class_labels is None:
                noise = self.denoiser(x, timestep).sample
            else:
                labels = torch.tensor([*class_labels, *[NULL_CLASS] * count])
                both = self.denoiser(torch.cat([x, x]), timestep.expand(2 * count), class_labels=labels).sample
                given, free = both[:, : x.shape[1]].chunk(2)
                noise = free + guidance_scale * (given - free)
            x = self.scheduler.step(noise, timestep, x, **options).prev_sample
        return SimpleNamespace(images=(x.clamp(-1, 1) + 1) / 2)


def ddpm() -> Named:
    """The U-Net of pixels, without conditioning."""
    return PixelPipeline(load_model("ddpm"), load_scheduler()), [{}]


def pruned() -> Named:
    """The U-Net of pixels with unevenly narrow layers, as `examples/training/prune.py` leaves it."""
    return PixelPipeline(load_model("pruned"), load_scheduler()), [{}]


def consistency() -> Named:
    """The U-Net of pixels distilled for few steps, with fresh noise between them; see `examples/training/consistency.py`."""
    return PixelPipeline(load_model("consistency"), load_scheduler("LCMScheduler", folder="consistency_scheduler")), [{}]


def dit() -> Named:
    """The class-conditional DiT, guided."""
    return PixelPipeline(load_model("dit"), load_scheduler()), [{"class_labels": k % NUM_CLASSES} for k in range(NUM_CLASSES)]


def ldm() -> Named:
    """The text-conditional latent U-Net, guided."""
    pipe = load_pipeline("ldm")
    pipe.set_progress_bar_config(disable=True)
    return pipe, _captions({"guidance_scale": 2.5})


def pixart() -> Named:
    """The text-conditional latent transformer, guided, on DPM-Solver."""
    pipe = load_pipeline("pixart")
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    options = {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": CAPTION_TOKENS}
    return pipe, _captions({"guidance_scale": 2.5, **options})


def _captions(options: dict[str, Any]) -> list[dict[str, Any]]:
    captions = [captions_of(digit) for digit in range(NUM_CLASSES)]
    return [{"prompt": several[k], **options} for k in range(len(captions[0])) for several in captions]


class ClassifierFeatures(torch.nn.Module):
    """The shipped classifier's features and logits; what lies before its last pooling is the spatial part."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = load_classifier()

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of images [N, 1, 16, 16] in [-1, 1]."""
        maps = self.classifier.stages(images)
        features = torch.nn.functional.silu(self.classifier.embed(maps.flatten(1)))
        return {"pool": features, "spatial": maps[:, :7].flatten(1), "logits": self.classifier.head(features)}


def classifier() -> ClassifierFeatures:
    """In place of Inception."""
    return ClassifierFeatures()


def digits() -> list[torch.Tensor]:
    """The real images, [-1, 1]."""
    return list(load_digits()[0].split(256))
