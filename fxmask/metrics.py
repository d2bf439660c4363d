"""How far accelerated samples are from the unaccelerated ones."""

from __future__ import annotations

import torch


def relative_error(samples: torch.Tensor, reference: torch.Tensor) -> float:
    """``||samples - reference||_2 / ||reference||_2`` over a batch, ``[B, ...]`` each."""
    difference = (samples.double() - reference.double()).norm()
    return float(difference / reference.double().norm().clamp_min(1e-30))


def psnr(samples: torch.Tensor, reference: torch.Tensor, data_range: float = 2.0) -> torch.Tensor:
    """Peak signal-to-noise ratio per image in dB, float64 ``[B]``.

    ``10 log10(data_range^2 / MSE)``, infinite for equal images.

    Args:
        samples: ``[B, ...]``.
        reference: ``[B, ...]``.
        data_range: distance between black and white; 2.0 for images in [-1, 1].
    """
    error = (samples.double() - reference.double()).flatten(1).pow(2).mean(dim=1)
    return 10 * torch.log10(data_range**2 / error)
