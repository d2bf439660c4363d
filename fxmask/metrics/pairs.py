"""How far accelerated samples are from the unaccelerated ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxmask.errors import InputError
from fxmask.metrics.optional import optional


def relative_error(samples: torch.Tensor, reference: torch.Tensor) -> float:
    """``||samples - reference||_2 / ||reference||_2`` over a batch, ``[B, ...]`` each.

    Raises:
        InputError: one of them is no tensor, e.g. a whole model output.
    """
    _require_tensors(samples=samples, reference=reference)
    difference = (samples.double() - reference.double()).norm()
    return float(difference / reference.double().norm().clamp_min(1e-30))


def psnr(samples: torch.Tensor, reference: torch.Tensor, data_range: float = 2.0) -> torch.Tensor:
    """Peak signal-to-noise ratio per image in dB, float64 ``[B]``.

    ``10 log10(data_range^2 / MSE)``, infinite for equal images.

    Args:
        samples: ``[B, ...]``.
        reference: ``[B, ...]``.
        data_range: distance between black and white; 2.0 for images in [-1, 1].

    Raises:
        InputError: one of them is no tensor, e.g. a whole model output.
    """
    _require_tensors(samples=samples, reference=reference)
    error = (samples.double() - reference.double()).flatten(1).pow(2).mean(dim=1)
    return 10 * torch.log10(data_range**2 / error)


def _require_tensors(**given: Any) -> None:
    for name, value in given.items():
        if not isinstance(value, torch.Tensor):
            raise InputError(
                f"{name} must be a tensor, got {type(value).__name__}; pass the tensor of a model output (`.sample`)"
            )


def ssim(samples: torch.Tensor, reference: torch.Tensor, data_range: float = 2.0, window: int = 11) -> torch.Tensor:
    """Structural similarity per image, ``[B]`` (Wang et al., 2004), by ``torchmetrics``.

    Args:
        samples: ``[B, C, H, W]``.
        reference: ``[B, C, H, W]``.
        data_range: distance between black and white.
        window: side of the Gaussian window; images must be larger than half of it.

    Raises:
        InputError: one of them is no tensor of images, or torchmetrics is not installed.
    """
    _require_tensors(samples=samples, reference=reference)
    functional = optional("torchmetrics.functional.image")
    found: torch.Tensor = functional.structural_similarity_index_measure(
        samples.float(), reference.float(), kernel_size=window, sigma=1.5 * window / 11, data_range=data_range, reduction="none"
    )
    return found.reshape(-1)


def lpips(
    samples: torch.Tensor,
    reference: torch.Tensor,
    network: Callable[[torch.Tensor], Sequence[torch.Tensor]],
    weights: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Learned perceptual distance per image, ``[B]`` (Zhang et al., 2018, Eq. 1), on any network.

    Features are scaled to length 1 at each place; their squared differences are weighed by channel, and averaged over places.

    Args:
        samples: ``[B, C, H, W]``, as the network takes them.
        reference: ``[B, C, H, W]``.
        network: images to a list of feature maps ``[B, C_l, H_l, W_l]``.
        weights: of each map's channels ``[C_l]``; 1 if not given, an uncalibrated distance.

    Raises:
        InputError: one of them is no tensor.
    """
    _require_tensors(samples=samples, reference=reference)
    total = torch.zeros(len(samples), dtype=torch.float64, device=samples.device)
    pairs = zip(network(samples), network(reference), strict=True)
    for layer, (a, b) in enumerate(pairs):
        difference = (_of_length_one(a) - _of_length_one(b)).double().square()
        scale = torch.ones(difference.shape[1]) if weights is None else weights[layer].flatten()
        total += (difference * scale.to(difference).reshape(1, -1, 1, 1)).sum(1).mean(dim=(1, 2))
    return total


def _of_length_one(features: torch.Tensor) -> torch.Tensor:
    return features / (features.square().sum(1, keepdim=True) + 1e-10).sqrt()
