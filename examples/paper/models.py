"""The paper's models whose pipelines need more than a name on the hub: calls for every class or caption."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where digits.py is

import diffusers
from data import folder_of
from digits import load_model

from fxmask import InputError

Named = tuple[Any, list[dict[str, Any]]]
CLASSES = 1000


def _pretrained(kind: Any, name: str) -> Any:
    try:
        return kind.from_pretrained(name)
    except Exception as error:  # of a hub, of a file
        raise InputError(
            f"{name!r} cannot be had ({type(error).__name__}): it is downloaded once where there is a network"
        ) from error


def pruned_cifar10() -> Named:
    """The DDPM of CIFAR-10, pruned: FXMASK_PRUNED is a folder as `examples/training/prune.py` writes it, on DDIM."""
    folder = _folder("FXMASK_PRUNED", "a pruned UNet2DModel, config.json and model.safetensors")
    scheduler = _pretrained(diffusers.DDIMScheduler, "google/ddpm-cifar10-32")
    return diffusers.DDIMPipeline(load_model(folder.name, folder.parent), scheduler), [{}]


def consistency_cifar10() -> Named:
    """A consistency model of CIFAR-10, converted to a pipeline: FXMASK_CONSISTENCY is its folder."""
    folder = _folder("FXMASK_CONSISTENCY", "a ConsistencyModelPipeline")
    return _pretrained(diffusers.ConsistencyModelPipeline, str(folder)), [{}]


def _folder(variable: str, what: str) -> Path:
    folder = os.environ.get(variable)
    if folder is None or not Path(folder).is_dir():
        raise InputError(f"{what} is needed: set {variable} to its folder")
    return Path(folder)


def dit_256() -> Named:
    """DiT-XL/2 at 256 pixels on DDIM, guided at 1.5 as in its paper."""
    return _dit("facebook/DiT-XL-2-256")


def dit_512() -> Named:
    """DiT-XL/2 at 512 pixels on DDIM."""
    return _dit("facebook/DiT-XL-2-512")


def _dit(name: str) -> Named:
    pipe = _pretrained(diffusers.DiTPipeline, name)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe, [{"class_labels": k, "guidance_scale": 1.5} for k in range(CLASSES)]


def ldm_imagenet() -> Named:
    """LDM-4-G on ImageNet, which is on no hub as a pipeline.

    FXMASK_LDM is the folder of the converted one, which takes class labels.
    """
    folder = os.environ.get("FXMASK_LDM")
    if folder is None or not Path(folder).is_dir():
        raise InputError("LDM-4-G must be converted to a diffusers pipeline first (cin256-v2); set FXMASK_LDM to its folder")
    pipe = _pretrained(diffusers.DiffusionPipeline, folder)
    return pipe, [{"class_labels": k, "guidance_scale": 1.5} for k in range(CLASSES)]


def pixart_sigma() -> Named:
    """PixArt-Sigma-XL at 1024 pixels on DPM-Solver.

    The captions of MS-COCO are in FXMASK_DATA/coco/captions.txt, one per line.
    """
    captions = folder_of("coco") / "captions.txt"
    if not captions.is_file():
        raise InputError(f"{captions} is needed: one caption of MS-COCO's validation pictures per line")
    pipe = _pretrained(diffusers.PixArtSigmaPipeline, "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS")
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    return pipe, [{"prompt": line, "guidance_scale": 4.5} for line in captions.read_text(encoding="utf-8").splitlines() if line]
