"""Samples side by side: a row for each way they were made, a column for each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fxmask.errors import InputError
from fxmask.pictures.canvas import figure

MOST = 8  # images of each row
SIDE = 1.5  # inches of an image


def save_samples(
    samples: Mapping[str, torch.Tensor],
    path: str | Path,
    *,
    notes: Mapping[str, Sequence[str]] | None = None,
    title: str | None = None,
) -> Path:
    """Draw images, a row for each name.

    Args:
        samples: by name, images ``[N, C, H, W]`` in [0, 1] with one channel or three; the first eight are drawn.
        path: PNG or SVG.
        notes: by name, a line under each image, e.g. its PSNR.
        title: above all of them.

    Returns:
        The file.

    Raises:
        InputError: there are no images, they have another form, or the file cannot be written.
    """
    for name, images in samples.items():
        if not isinstance(images, torch.Tensor) or images.dim() != 4 or images.shape[1] not in (1, 3):
            form = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
            raise InputError(f"samples of {name!r} must be a tensor [N, C, H, W] with one channel or three, got {form}")
    columns = min(MOST, max((len(images) for images in samples.values()), default=0))
    if not columns:
        raise InputError("samples must hold one image at least")
    notes = notes or {}
    height = sum(SIDE + 0.25 * bool(notes.get(name)) for name in samples) + (0.35 if title else 0)
    with figure(path, SIDE * columns + 1.2, height + 0.15) as made:
        axes = made.subplots(len(samples), columns, squeeze=False)
        for row, (name, images) in enumerate(samples.items()):
            for column in range(columns):
                image = images[column] if column < len(images) else None
                _draw_image(axes[row][column], image, (notes.get(name) or [])[column : column + 1])
            axes[row][0].set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center", wrap=True)
        if title:
            made.suptitle(title, fontsize=10)
    return Path(path)


def _draw_image(axes: Any, image: torch.Tensor | None, note: Sequence[str]) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if image is None:
        return
    shown = image.detach().cpu().float().clamp(0, 1).permute(1, 2, 0)
    axes.imshow(shown[..., 0].numpy() if shown.shape[-1] == 1 else shown.numpy(), cmap="gray", vmin=0, vmax=1)
    if note:
        axes.set_xlabel(note[0], fontsize=7, labelpad=2)
