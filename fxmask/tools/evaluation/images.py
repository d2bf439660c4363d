"""Images of a configuration, batch by batch: from the same noise in all of them, resumable, shared among ranks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from fxmask.errors import InputError
from fxmask.learning.ranks import Group
from fxmask.metrics.features import as_tensor
from fxmask.tools.evaluation.run_file import Run
from fxmask.tools.subjects import Subject, seeded

NOISE = 50_000  # seeds of evaluation begin here; none of them is learned from


def call_of(subject: Subject, run: Run, batch: int, size: int, steps: int) -> dict[str, Any]:
    """The arguments of one batch: the subject's calls in turn, each image its own where they are single ones."""
    calls = [subject.calls[(batch * run.batch + k) % len(subject.calls)] for k in range(size)]
    merged: dict[str, Any] = {}
    for name in calls[0]:
        merged[name] = [call[name] for call in calls] if name in ("prompt", "class_labels") else calls[0][name]
    if "prompt" not in merged and "class_labels" not in merged:
        merged["batch_size"] = size
    return {**merged, **run.call, "num_inference_steps": steps}


def sample(subject: Subject, run: Run, folder: Path, title: str, seed: int, steps: int, as_png: bool, progress: bool) -> None:
    """Make the images that are not there yet; ranks take batches in turn.

    Args:
        subject: whose pipeline is called as it is now.
        run: says how many, and how.
        folder: of this configuration and seed.
        title: for the bar.
        seed: of the noise.
        steps: of each call.
        as_png: one PNG per image in place of an array per batch.
        progress: show a bar.
    """
    folder.mkdir(parents=True, exist_ok=True)
    group = Group.current()
    starts = range(0, run.images, run.batch)
    mine = [k for k in range(len(starts)) if k % group.size == group.rank]
    missing = [k for k in mine if not _file(folder, k).exists()]
    for k in tqdm(missing, desc=title, unit="batch", disable=not progress):
        size = min(run.batch, run.images - starts[k])
        call = call_of(subject, run, k, size, steps)
        began = time.perf_counter()
        made = subject.pipe(**call, output_type="pt", generator=seeded(NOISE * (seed + 1) + k))
        seconds = time.perf_counter() - began
        pictures = as_images(made)
        if as_png:
            _write_png(folder, starts[k], pictures)
        told = call.get("prompt", call.get("class_labels", []))
        _write(folder, k, pictures, seconds, told)


def as_images(made: Any) -> torch.Tensor:
    """Images of a pipeline's result, float32 ``[B, C, H, W]`` in [-1, 1].

    Raises:
        InputError: there are none.
    """
    images = getattr(made, "images", made[0] if isinstance(made, tuple) else made)
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images).permute(0, 3, 1, 2)
    if not isinstance(images, torch.Tensor) or images.dim() != 4:
        raise InputError(f"the pipeline returned {type(images).__name__}, and images [B, C, H, W] are needed")
    return images.float().cpu() * 2 - 1


def _file(folder: Path, batch: int) -> Path:
    return folder / f"{batch:05d}.npz"


def _write(folder: Path, batch: int, images: torch.Tensor, seconds: float, told: Sequence[Any]) -> None:
    """``arr_0`` as in ADM's evaluation suite; ``exact`` is what PSNR is taken from."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    partial = folder / f".{batch:05d}.{os.getpid()}.partial.npz"
    arrays: Mapping[str, Any] = {
        "arr_0": pixels,
        "exact": images.numpy(),
        "seconds": np.array(seconds),
        "told": np.array([str(x) for x in told]),
    }
    np.savez(partial, **arrays)
    os.replace(partial, _file(folder, batch))


def _write_png(folder: Path, first: int, images: torch.Tensor) -> None:
    from PIL import Image

    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for k, picture in enumerate(pixels):
        Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(folder / f"{first + k:06d}.png")


def batches(folder: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor, float, list[str]]]:
    """Of what was sampled: images as stored, rounded ones, seconds, and captions or classes; in order."""
    for path in sorted(folder.glob("[0-9]*.npz")):
        with np.load(path, allow_pickle=False) as file:
            yield torch.from_numpy(file["exact"]), as_tensor(file["arr_0"]), float(file["seconds"]), list(file["told"])
