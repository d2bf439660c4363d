"""Readers of the data sets that the paper's FID is measured against. They must be had beforehand: FXMASK_DATA is their folder.

FXMASK_DATA/cifar10/cifar-10-batches-py/...    torchvision's layout
FXMASK_DATA/lsun-bedroom/*.jpg, lsun-church/*.jpg, imagenet/**/*.JPEG, coco/val2017/*.jpg
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from fxmask import InputError

BATCH = 64
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def folder_of(name: str) -> Path:
    """Where a data set lies.

    Raises:
        InputError: it is not there; says where it is looked for.
    """
    root = os.environ.get("FXMASK_DATA")
    if root is None:
        raise InputError(f"the data set {name!r} is needed: set FXMASK_DATA to the folder that holds {name}/")
    place = Path(root) / name
    if not place.is_dir():
        raise InputError(f"the data set {name!r} is not in {root}; put it there, or point FXMASK_DATA elsewhere")
    return place


def pictures(name: str, size: int) -> Iterator[torch.Tensor]:
    """Batches [B, 3, size, size] in [-1, 1] of a folder of pictures: the largest square in the middle, resized."""
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    files = sorted(path for path in folder_of(name).rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(f"the data set {name!r} in {folder_of(name)} holds no pictures")
    for start in range(0, len(files), BATCH):
        batch = []
        for path in files[start : start + BATCH]:
            picture = Image.open(path).convert("RGB")
            side = min(picture.size)
            left, top = ((extent - side) // 2 for extent in picture.size)
            square = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
            batch.append(pil_to_tensor(square).float() / 127.5 - 1)
        yield torch.stack(batch)


def cifar10() -> Iterator[torch.Tensor]:
    """The 50,000 training images."""
    from torchvision.datasets import CIFAR10

    place = folder_of("cifar10")
    try:
        data = CIFAR10(str(place), train=True, download=False)
    except RuntimeError as error:
        raise InputError(f"the data set 'cifar10' in {place} is incomplete: {error}") from error
    for start in range(0, len(data.data), BATCH):
        yield torch.from_numpy(data.data[start : start + BATCH]).permute(0, 3, 1, 2).float() / 127.5 - 1


def lsun_bedroom() -> Iterator[torch.Tensor]:
    """Bedrooms at 256 pixels."""
    return pictures("lsun-bedroom", 256)


def lsun_church() -> Iterator[torch.Tensor]:
    """Churches at 256 pixels."""
    return pictures("lsun-church", 256)


def imagenet_256() -> Iterator[torch.Tensor]:
    """ImageNet at 256 pixels."""
    return pictures("imagenet", 256)


def imagenet_512() -> Iterator[torch.Tensor]:
    """ImageNet at 512 pixels."""
    return pictures("imagenet", 512)


def coco() -> Iterator[torch.Tensor]:
    """The validation pictures of MS-COCO at 1024 pixels."""
    return pictures("coco", 1024)
