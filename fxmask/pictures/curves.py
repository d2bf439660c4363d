"""Curves: errors over the steps, error against cost, and how scores are spread (Fig. 7 of arXiv 2603.19939)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from fxmask.errors import InputError
from fxmask.pictures.canvas import figure, style

BINS = 20  # of scores
NEAR = 0.1  # of 0 and of 1


class Point(Protocol):
    """What is drawn of a ``fxmask.ParetoPoint``."""

    @property
    def mac_ratio(self) -> float:
        """MACs of the full run over the plan's."""

    @property
    def decibels(self) -> float:
        """Error of the final samples, mean over images."""

    @property
    def fewer_steps(self) -> float | None:
        """The same of fewer steps at the same cost."""


def save_scores(scores: torch.Tensor, path: str | Path, *, title: str | None = None) -> Path:
    """Draw how the paper's scores are spread between 0 and 1, as in its Fig. 7.

    Args:
        scores: float ``[T, B]`` in [0, 1], of ``PaperOptions(on_scores=...)``.
        path: PNG or SVG.
        title: above it.

    Returns:
        The file.

    Raises:
        InputError: there are none, they are not in [0, 1], or the file cannot be written.
    """
    values = torch.as_tensor(scores).detach().cpu().double().flatten()
    if not len(values) or not bool(((values >= 0) & (values <= 1)).all()):
        raise InputError(f"scores of shape {tuple(torch.as_tensor(scores).shape)} must be numbers in [0, 1], one at least")
    shares = 100 * torch.histc(values, BINS, 0.0, 1.0) / len(values)
    with figure(path, 6.0, 3.6) as made:
        axes = made.add_subplot()
        edges = [(k + 0.5) / BINS for k in range(BINS)]
        axes.bar(edges, shares.tolist(), width=0.9 / BINS, color="#9ecae1", edgecolor="black", linewidth=0.6, hatch="///")
        for place, near, side in ((0.02, values <= NEAR, "left"), (0.98, values >= 1 - NEAR, "right")):
            text = f"{100 * float(near.double().mean()):.0f}% within {NEAR:g}"
            axes.text(place, 0.95, text, transform=axes.transAxes, ha=side, va="top", fontsize=9)
        axes.set_xlim(0, 1)
        axes.margins(y=0.2)
        axes.set_xlabel("score")
        axes.set_ylabel("share of scores (%)")
        axes.set_title(title or f"scores of {len(values)} steps and blocks", fontsize=10)
    return Path(path)


def save_step_errors(
    errors: Mapping[str, Sequence[float]],
    path: str | Path,
    *,
    kept: Sequence[float] | None = None,
    title: str | None = None,
) -> Path:
    """Draw an error at every step, a curve for each name.

    Args:
        errors: by name, T numbers each; those that are 0 (a step that is exact) are left out of the curve.
        path: PNG or SVG.
        kept: share of the MACs that each step computes, T numbers in [0, 1], as bars behind.
        title: above it.

    Returns:
        The file.

    Raises:
        InputError: there is nothing to draw, or the file cannot be written.
    """
    if not errors or not all(len(values) for values in errors.values()):
        raise InputError("errors must hold one curve at least, with a number for every step")
    count = max(map(len, errors.values()))
    with figure(path, max(6.0, min(14.0, 0.06 * count + 4)), 3.8) as made:
        axes = made.add_subplot()
        for k, (name, values) in enumerate(errors.items()):
            shown = [value if value > 0 else math.nan for value in values]
            axes.plot(range(len(shown)), shown, label=name, markevery=max(1, count // 25), zorder=3, **style(k))
        axes.set_yscale("log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("step")
        axes.set_ylabel("relative error")
        axes.grid(alpha=0.3)
        if kept is not None:
            behind = axes.twinx()
            behind.bar(range(len(kept)), [100 * x for x in kept], width=1.0, color="#dddddd", zorder=0)
            behind.set_ylim(0, 300)
            behind.set_yticks([0, 100])
            behind.set_ylabel("computed (%, bars)", fontsize=8)
            axes.set_zorder(behind.get_zorder() + 1)
            axes.patch.set_visible(False)
        axes.legend(fontsize=8)
        axes.set_title(title or "error at each step", fontsize=10)
    return Path(path)


def save_pareto(points: Sequence[Point], path: str | Path) -> Path:
    """Draw error on held-out noise against MACs; a point per plan of ``fxmask.pareto``, and fewer steps at the same cost.

    Args:
        points: from ``fxmask.pareto``.
        path: PNG or SVG.

    Returns:
        The file.

    Raises:
        InputError: there is no point, or the file cannot be written.
    """
    if not points:
        raise InputError("there is no point to draw; fxmask.pareto(program, calls) returns them")
    with figure(path, 6.4, 4.4) as made:
        draw_pareto(points, made.add_subplot())
    return Path(path)


def draw_pareto(points: Sequence[Point], axes: Any) -> None:
    """Draw error on held-out noise against MACs, on matplotlib ``axes``; a point per plan of ``fxmask.pareto``."""
    ordered = sorted(points, key=lambda p: p.mac_ratio)
    axes.plot([1 / p.mac_ratio for p in ordered], [p.decibels for p in ordered], label="fxmask", **style(0))
    for p in ordered:
        axes.annotate(
            f"{p.mac_ratio:.2f}x", (1 / p.mac_ratio, p.decibels), textcoords="offset points", xytext=(4, 6), fontsize=8
        )
    fewer = [(1 / p.mac_ratio, p.fewer_steps) for p in ordered if p.fewer_steps is not None]
    if fewer:
        axes.plot(*zip(*fewer, strict=True), label="fewer steps of the sampler", **style(1))
        axes.legend(fontsize=8)
    axes.set_xlabel("share of the full run's MACs")
    axes.set_ylabel("error of the final samples (dB, mean over images)")
    axes.set_title("error against MACs", fontsize=10)
    axes.margins(0.12)
    axes.grid(alpha=0.3)
