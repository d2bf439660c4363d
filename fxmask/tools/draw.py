"""Pictures of masks and of learned plans, on matplotlib axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fxmask.ir.mask import Mask

if TYPE_CHECKING:
    from fxmask.learning.candidate import ParetoPoint


def draw_mask(mask: Mask, axes: Any) -> None:
    """Draw a mask as a heat map on matplotlib ``axes``: a row per block, a column per step, dark = computed."""
    axes.imshow(mask.compute.T.float().numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=1.2, interpolation="nearest")
    axes.set_yticks(range(len(mask.blocks)), mask.blocks, fontsize=6)
    axes.set_xticks(range(0, mask.num_steps, max(1, mask.num_steps // 10)))
    axes.set_xlabel("step")
    axes.set_title(f"computed blocks (dark), {mask.num_steps} steps")


def draw_pareto(points: Sequence[ParetoPoint], axes: Any) -> None:
    """Draw error on held-out noise against MACs, on matplotlib ``axes``; a point per plan of ``fxmask.pareto``."""
    ordered = sorted(points, key=lambda p: p.mac_ratio)
    axes.plot([1 / p.mac_ratio for p in ordered], [p.decibels for p in ordered], marker="o")
    for p in ordered:
        axes.annotate(f"{p.mac_ratio:.2f}x", (1 / p.mac_ratio, p.decibels), textcoords="offset points", xytext=(4, 6))
    axes.set_xlabel("share of the full run's MACs")
    axes.set_ylabel("error of the final samples (dB, mean over images)")
    axes.set_title("error against MACs")
    axes.margins(0.12)
    axes.grid(alpha=0.3)
