"""Shared helpers of the example scripts: the digits data, the shipped checkpoints and a small classifier."""

import json
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits as sklearn_digits
from torch import Tensor, nn

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
IMAGE_SIZE = 16
NUM_CLASSES = 10
NULL_CLASS = 1000  # The index that diffusers' DiTPipeline hard-codes for "no class".


class DigitClassifier(nn.Module):
    """A small convolutional classifier whose penultimate feature is short enough for Frechet distances.

    Args:
        channels: Width of each of the three convolution stages; a stage halves the resolution.
        features: Length of the penultimate feature.
    """

    def __init__(self, channels: tuple[int, ...] = (32, 64, 64), features: int = 48) -> None:
        super().__init__()
        self.config = {"channels": list(channels), "features": features}
        stages: list[nn.Module] = []
        for wide_in, wide_out in zip((1, *channels[:-1]), channels, strict=True):
            # Group norm rather than batch norm: no running statistics to average or to ship.
            stages += [nn.Conv2d(wide_in, wide_out, 3, padding=1), nn.GroupNorm(8, wide_out), nn.SiLU()]
            stages += [nn.Conv2d(wide_out, wide_out, 3, padding=1), nn.GroupNorm(8, wide_out), nn.SiLU()]
            stages.append(nn.AvgPool2d(2))
        self.stages = nn.Sequential(*stages)
        self.embed = nn.Linear(channels[-1] * (IMAGE_SIZE >> len(channels)) ** 2, features)
        self.head = nn.Linear(features, NUM_CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """Returns the penultimate features [N, F] of images [N, 1, 16, 16] in [-1, 1]."""
        return F.silu(self.embed(self.stages(images).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Returns the class logits [N, 10] of images [N, 1, 16, 16] in [-1, 1]."""
        return self.head(self.features(images))


def load_digits() -> tuple[Tensor, Tensor]:
    """Returns scikit-learn's 1,797 digits: images float32 [N, 1, 16, 16] in [-1, 1] and labels int64 [N]."""
    data = sklearn_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16.0  # Grey values run from 0 to 16.
    images = F.interpolate(images, size=IMAGE_SIZE, mode="bicubic", align_corners=False)
    return images.clamp(0, 1) * 2 - 1, torch.from_numpy(data.target).long()


def build_model(config: dict) -> nn.Module:
    """Builds the (randomly initialised) model that a shipped `config.json` describes."""
    arguments = {key: value for key, value in config.items() if not key.startswith("_")}
    if config["_class_name"] == DigitClassifier.__name__:
        return DigitClassifier(**arguments)
    return getattr(diffusers, config["_class_name"])(**arguments)


def load_model(name: str, root: Path = CHECKPOINTS) -> nn.Module:
    """Loads a shipped model, cast from half precision to float32, in evaluation mode.

    Args:
        name: Folder of the checkpoint: `ddpm`, `dit` or `classifier`.
        root: Folder that holds the checkpoints.

    Returns:
        The model, on the CPU.
    """
    config = json.loads((root / name / "config.json").read_text(encoding="utf-8"))
    model = build_model(config)
    weights = {key: value.float() for key, value in load_file(root / name / "model.safetensors").items()}
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def save_model(name: str, config: dict, weights: dict[str, Tensor], root: Path = CHECKPOINTS) -> Path:
    """Writes `config.json` and half-precision `model.safetensors`; `load_model` reads them back.

    Args:
        name: Folder of the checkpoint.
        config: Constructor arguments plus `_class_name`.
        weights: The float32 state dictionary.
        root: Folder that holds the checkpoints.

    Returns:
        The folder written.
    """
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    halves = {key: value.half().contiguous() for key, value in weights.items()}
    save_file(halves, folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it private to its owner.
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def load_scheduler(kind: str = "DDIMScheduler", root: Path = CHECKPOINTS) -> diffusers.SchedulerMixin:
    """Loads the shipped noise schedule into the diffusers scheduler class called `kind`."""
    return getattr(diffusers, kind).from_pretrained(root / "scheduler")


def load_classifier(root: Path = CHECKPOINTS) -> DigitClassifier:
    """Loads the shipped digit classifier."""
    model = load_model("classifier", root)
    assert isinstance(model, DigitClassifier)
    return model
