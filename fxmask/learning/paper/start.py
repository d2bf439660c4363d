"""Fixed schedules: everything, or one stream and all that only it reads, at evenly spaced steps.

Interval reuse (Selvaraju et al., "FORA", 2024) is the one of all blocks; reuse of one deep value (Ma et al., "DeepCache", 2024)
is that of one stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

NEAR = 0.05  # of the budget: schedules that are further away are not compared


def fixed_schedules(
    steps: int, groups: Sequence[torch.Tensor], kept: Callable[[torch.Tensor], float], budget: float
) -> list[torch.Tensor]:
    """Of each group of blocks the mask that skips it between as many evenly spaced steps as come nearest to a budget.

    Args:
        steps: T.
        groups: bool ``[B]`` each, the blocks that are skipped together.
        kept: of a mask ``[T, B]`` the fraction of the full MACs.
        budget: that is wanted; masks further than 5 % from it are left out.

    Returns:
        Masks, bool ``[T, B]``.
    """
    found = []
    for group in groups:
        rest = (steps * kept(evenly(steps, group, 1)) - 1) / max(1, steps - 1)  # of a step that skips the group
        if rest < 1:
            count = round(steps * (budget - rest) / (1 - rest))
            got = (count + (steps - count) * rest) / steps
            if 1 <= count <= steps and abs(got / budget - 1) <= NEAR:
                found.append(evenly(steps, group, count))
    return found


def evenly(steps: int, group: torch.Tensor, count: int) -> torch.Tensor:
    """Bool ``[T, B]``: the group computes at ``count`` evenly spaced steps, the first among them, other blocks always."""
    rows = (~group).repeat(steps, 1)
    rows[[k * steps // count for k in range(count)]] = True
    return rows
