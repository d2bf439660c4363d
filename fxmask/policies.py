"""Masks that need no learning. Each policy is a function ``(program, timesteps) -> Mask``."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from fxmask.errors import MaskError
from fxmask.ir.mask import Mask, as_timesteps
from fxmask.ir.program import Program

Policy = Callable[[Program, Iterable[float]], Mask]


def interval(period: int, blocks: str = "branch") -> Policy:
    """Compute every branch block at every ``period``-th step and reuse it in between.

    This is FORA (Selvaraju et al., "FORA: Fast-Forward Caching in Diffusion Transformer Acceleration", 2024). Stages
    and the whole output always compute.

    Args:
        period: in steps.
        blocks: ``"branch"``; or ``"stream"``, the values after the residual additions, which spares what lies before them too.

    Raises:
        MaskError: ``period`` is not a positive integer, or ``blocks`` is unknown.
    """
    if not isinstance(period, int) or period < 1:
        raise MaskError(f"period must be a positive number of steps, got {period!r}")
    if blocks not in ("branch", "stream"):
        raise MaskError(f"blocks={blocks!r} is unknown; choose 'branch' or 'stream'")

    def policy(program: Program, timesteps: Iterable[float]) -> Mask:
        steps = as_timesteps(timesteps)
        names = tuple(block.name for block in (program.branches if blocks == "branch" else program.streams))
        rows = (torch.arange(len(steps)) % period == 0).unsqueeze(1).expand(-1, len(names))
        return Mask(rows, steps, names, fingerprint=program.fingerprint)

    return policy
