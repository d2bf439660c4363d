"""Masks as heat maps: every step, or counts over a few steps as in Fig. 6 of arXiv 2603.19939."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fxmask.errors import InputError
from fxmask.ir.mask import Mask
from fxmask.ir.text import ABSENT, BLENDED, FORECAST, STATES, columns_of
from fxmask.ir.text import FULL as COMPUTED
from fxmask.pictures.canvas import figure

COLOURS = ("#f7fbff", "#86b4d8", "#4a90c4", "#08306b")  # evenly spaced in lightness, so that a grey print tells them apart
NOT_CALLED = "#dddddd"
DOTS = {FORECAST: "#08306b", BLENDED: "#ffffff", ABSENT: "#ffffff"}  # colour of the dot in a cell, where cells have room
DOTTED_CELLS = 4_000  # a map with more has no dots
NAMED_ROWS = 60  # a map with more names groups of blocks
NUMBERED_CELLS = 1_600  # a table of counts with more has no figures in it
CELL = (0.05, 0.19)  # inches, least and most
ROW = (0.065, 0.17)
LARGEST = 16.0  # inches of the map itself
LABEL = 38  # characters of a name
SPACE = 0.115  # inches between two names


def save_heat_map(mask: Mask, path: str | Path, *, title: str | None = None) -> Path:
    """Draw a mask: a row per block, a column per step; the darker, the more is computed.

    Args:
        mask: to draw.
        path: PNG or SVG.
        title: above it; the mask in short, if not given.

    Returns:
        The file.

    Raises:
        InputError: the file cannot be written, or matplotlib is not installed.
    """
    width, height = _size(mask.num_steps, len(columns_of(mask)))
    with figure(path, width + 2.6, height + 1.3) as made:
        axes = made.add_subplot()
        _draw(mask, axes, height)
        axes.set_title(repr(mask) if title is None else title, fontsize=9)
        made.legend(handles=_legend(mask), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return Path(path)


def draw_mask(mask: Mask, axes: Any) -> None:
    """Draw the same on matplotlib ``axes`` of your own."""
    height = axes.get_window_extent().height / axes.figure.dpi
    _draw(mask, axes, height)
    axes.set_title(f"computed blocks (dark), {mask.num_steps} steps")


def save_counts(mask: Mask, path: str | Path, *, every: int = 5, title: str | None = None) -> Path:
    """Draw how often each block computes in every few steps, as in the paper's Fig. 6; the darker, the more.

    Args:
        mask: to draw.
        path: PNG or SVG.
        every: so many steps share a column.
        title: above it.

    Returns:
        The file.

    Raises:
        InputError: the file cannot be written, matplotlib is not installed, or ``every`` is below 1.
    """
    if every < 1:
        raise InputError(f"every={every} must be at least 1: so many steps share a column")
    counts = counts_of(mask, every)
    width, height = _size(2 * counts.shape[1], len(counts))
    with figure(path, width + 3.2, height + 1.2) as made:
        axes = made.add_subplot()
        from matplotlib import colormaps
        from matplotlib.colors import BoundaryNorm

        levels = colormaps["Blues"].resampled(every + 1)
        norm = BoundaryNorm([k - 0.5 for k in range(every + 2)], every + 1)
        image = axes.imshow(counts.numpy(), aspect="auto", cmap=levels, norm=norm, interpolation="nearest")
        _name_rows(names_of(mask), axes, height)
        _number_columns(axes, counts.shape[1], every)
        axes.set_xlabel(f"first of {every} steps ({mask.num_steps} in all)")
        axes.set_title(title or f"how often a block computes in {every} steps", fontsize=9)
        made.colorbar(image, ax=axes, ticks=range(every + 1), label="computations", fraction=0.03, pad=0.01)
        if counts.numel() <= NUMBERED_CELLS:
            for (b, k), n in zip(itertools.product(*map(range, counts.shape)), counts.flatten().tolist(), strict=True):
                axes.text(k, b, n, ha="center", va="center", fontsize=5.5, color="white" if n > every / 2 else "black")
    return Path(path)


def counts_of(mask: Mask, every: int) -> torch.Tensor:
    """How often each block computes in every few steps, int64 ``[B, ceil(T / every)]``; with lanes ``[B * L, ...]``."""
    states = states_of(mask)
    computed = (states == COMPUTED) | (states == BLENDED)
    return torch.stack([part.sum(dim=1) for part in torch.split(computed.long(), every, dim=1)], dim=1)


def states_of(mask: Mask) -> torch.Tensor:
    """What each step does with each block, int64 ``[B, T]``, or ``[B * L, T]``: an index of ``STATES``."""
    return torch.tensor([states for _, states in columns_of(mask)], dtype=torch.long).reshape(-1, mask.num_steps)


def names_of(mask: Mask) -> list[str]:
    """Of the rows of ``states_of``."""
    return [name for name, _ in columns_of(mask)]


def _size(columns: int, rows: int) -> tuple[float, float]:
    """Inches of a map."""
    width = max(3.5, min(LARGEST, columns * max(CELL[0], min(CELL[1], 9.0 / max(1, columns)))))
    return width, max(0.8, min(LARGEST, rows * max(ROW[0], min(ROW[1], 9.0 / max(1, rows)))))


def _draw(mask: Mask, axes: Any, height: float) -> None:
    from matplotlib.colors import ListedColormap

    states = states_of(mask)
    colours = ListedColormap([*COLOURS, NOT_CALLED])
    axes.imshow(states.numpy(), aspect="auto", cmap=colours, vmin=-0.5, vmax=len(STATES) - 0.5, interpolation="nearest")
    if states.numel() <= DOTTED_CELLS:
        for state, colour in DOTS.items():
            rows, columns = (states == state).nonzero(as_tuple=True)
            axes.scatter(columns.tolist(), rows.tolist(), s=3.5, c=colour, linewidths=0)
    _name_rows(names_of(mask), axes, height)
    _number_columns(axes, mask.num_steps, 1)
    axes.set_xlabel(f"step (timesteps {mask.timesteps[0]:g} to {mask.timesteps[-1]:g})")


def _legend(mask: Mask) -> list[Any]:
    """A patch for every state that occurs."""
    from matplotlib.lines import Line2D

    found = sorted(set(states_of(mask).flatten().tolist()), reverse=True)
    return [
        Line2D(
            [],
            [],
            marker="s",
            linestyle="",
            markersize=8,
            markerfacecolor=[*COLOURS, NOT_CALLED][k],
            markeredgecolor="#555555",
            label=STATES[k],
        )
        for k in found
    ]


def _number_columns(axes: Any, count: int, every: int) -> None:
    apart = next(k for k in (1, 2, 5, 10, 20, 25, 50, 100, 200, 500, 1000, count) if count / k <= 26)
    places = range(0, count, apart)
    axes.set_xticks(places, [k * every for k in places], fontsize=7)


def _name_rows(blocks: Sequence[str], axes: Any, height: float) -> None:
    """Names of blocks, or of groups of them with lines in between, where there is no room for each."""
    if len(blocks) <= NAMED_ROWS and len(blocks) * SPACE <= height * 1.6:
        axes.set_yticks(
            range(len(blocks)), [_short(name) for name in blocks], fontsize=min(7, max(4, 60 * height / max(1, len(blocks))))
        )
        return
    groups = grouped(blocks, most=max(1, int(height / SPACE)))
    for first, _, _ in groups[1:]:
        axes.axhline(first - 0.5, color="#888888", linewidth=0.4)
    places = [(first + last) / 2 for first, last, _ in groups]
    axes.set_yticks(places, [_short(name) for _, _, name in groups], fontsize=6)


def grouped(blocks: Sequence[str], most: int) -> list[tuple[int, int, str]]:
    """Neighbours that share the beginning of their names: first row, last row, name. At most so many, where possible.

    The longest beginnings are taken that are few enough. Where these are very few, neighbours of the next longer ones are put
    together instead.
    """
    finer: list[list[int]] = [[b] for b in range(len(blocks))]
    for length in range(max((name.count(".") + 1 for name in blocks), default=1), 0, -1):
        names = [_beginning(name, length) for name in blocks]
        rows = [list(part) for _, part in itertools.groupby(range(len(blocks)), names.__getitem__)]
        if len(rows) <= most and (len(rows) >= most // 4 or len(finer) <= most):
            return [(part[0], part[-1], _group_name(blocks, part, length)) for part in rows]
        if len(rows) <= most:
            break
        finer = rows
    size = -(-len(finer) // most)
    packs = [list(itertools.chain(*finer[k : k + size])) for k in range(0, len(finer), size)]
    return [(part[0], part[-1], f"{blocks[part[0]]} ... ({len(part)})") for part in packs]


def _group_name(blocks: Sequence[str], rows: Sequence[int], length: int) -> str:
    if len(rows) == 1:
        return blocks[rows[0]]
    return f"{_beginning(blocks[rows[0]], length)} ({len(rows)})"


def _beginning(name: str, length: int) -> str:
    return ".".join(name.split(".")[:length])


def _short(name: str) -> str:
    """The end of a long name tells more."""
    return name if len(name) <= LABEL else f"...{name[3 - LABEL :]}"
