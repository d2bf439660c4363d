"""Coefficients in closed form: ridge least squares on second moments."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxmask.ir.combine import wide_dtype
from fxmask.ir.forecast import Cache, Source, slot_of
from fxmask.learning.schedule import Terms

RIDGE = 1e-5  # of the mean square of the sources


def second_moments(block: str, i: int, sources: Sequence[Source], cache: Cache, target: torch.Tensor) -> torch.Tensor:
    """Second moments float64 of (sources..., target) for cut value ``i`` of a block."""
    basis = torch.stack([cache[slot_of(source, block, i)].flatten() for source in sources] + [target.flatten()])
    wide = basis.to(wide_dtype(basis.dtype))
    return (wide @ wide.T).double().cpu()


def solve_ridge(moment: torch.Tensor, sources: Sequence[Source]) -> Terms:
    """Ridge least squares, shrunk towards the latest value, from the second moments of (sources..., target)."""
    gram, target = moment[:-1, :-1], moment[:-1, -1]
    prior = torch.zeros(len(sources), dtype=torch.float64)
    prior[0] = 1.0
    ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-30) * torch.eye(len(sources), dtype=torch.float64)
    move = torch.linalg.solve(gram + ridge, target - gram @ prior)
    return tuple(zip(sources, (prior + move).tolist(), strict=True))


def damped_step(normal: torch.Tensor, damping: float) -> list[float]:
    """Step of Gauss-Newton, from the second moments float64 ``[P + 1, P + 1]`` of (P derivatives, error)."""
    matrix = normal[:-1, :-1] + damping * torch.diag(normal.diagonal()[:-1]) + 1e-12 * torch.eye(len(normal) - 1)
    step: list[float] = torch.linalg.solve(matrix, -normal[:-1, -1]).tolist()
    return step
