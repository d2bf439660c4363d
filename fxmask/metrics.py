"""How far accelerated samples are from the unaccelerated ones."""

from __future__ import annotations

from typing import Any

import torch

from fxmask.errors import InputError


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
