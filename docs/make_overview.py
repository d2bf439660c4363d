"""Draw docs/images/overview.png: samples with and without acceleration, and the mask. Minutes on two cores."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / "examples"))

from common import plt, tile  # noqa: E402
from digits import load_model, load_scheduler  # noqa: E402

import fxmask  # noqa: E402

STEPS, IMAGES = 20, 16


def draw(path: Path) -> None:
    """Learn a mask for the shipped DDPM, sample fresh noise with and without it, and draw both with the mask."""
    model, scheduler = load_model("ddpm"), load_scheduler()
    accelerated = fxmask.accelerate(
        model, scheduler, num_inference_steps=STEPS, speedup=2.0, max_graphs=5, effort="quick", backend="eager"
    )
    fresh = fxmask.record(model, scheduler, num_inference_steps=STEPS, batch_size=IMAGES, seed=1000)
    samples = fresh.rollout(accelerated)
    decibels = fxmask.psnr(samples, fresh.final).mean()
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), width_ratios=(1, 1, 1.5), layout="constrained")
    titles = (f"every block at all {STEPS} steps", f"fxmask, {accelerated.plan.mac_ratio:.1f}x fewer MACs, {decibels:.0f} dB")
    for ax, images, title in zip(axes, (fresh.final, samples), titles, strict=False):
        ax.imshow(tile(images, columns=4).numpy(), cmap="gray", vmin=0, vmax=1)
        ax.set_title(title, fontsize=11)
        ax.axis("off")
    fxmask.draw_mask(accelerated.mask, axes[2])
    axes[2].set_title("the mask: dark = computed, light = not", fontsize=11)
    axes[2].set_xticks(range(STEPS))
    axes[2].tick_params(axis="x", labelsize=8)
    axes[2].set_yticks(range(len(accelerated.mask.blocks)), accelerated.mask.blocks, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    torch.manual_seed(0)
    draw(DOCS / "images" / "overview.png")
