"""Which of several plans to hand out, when there are few images to judge them by.

Errors are in dB, one per image, and of every plan the same images. Images that are hard are hard for all plans, so plans are
compared image by image. A plan that more was fitted for must be better by more than the standard error of that difference, and
by up to twice as much where two or three images say so: their own differences tell little of how far others lie apart.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

FEW = 16  # images, below which plans are judged on all of them by turns
SPREAD = 3.0  # dB: by how much differences of two plans vary between images, as long as few images say so
WEIGHT = 2  # images that this counts for
HARDLY_ANY = 4  # images, below which even they say little: two that are hard for one plan say nothing of the easy ones


def margin(differences: Sequence[float]) -> float:
    """By how much the mean of differences in dB, one per image, must lie from zero to count: its standard error, or more."""
    count = len(differences)
    mean = statistics.fmean(differences)
    squares = WEIGHT * SPREAD**2 + sum((x - mean) ** 2 for x in differences)
    return (1 + 2 / count) * math.sqrt(squares / (WEIGHT + count - 1) / count)


def is_ahead(errors: Sequence[float], others: Sequence[float]) -> bool:
    """Whether a plan of another kind leads by more than the margin, by more than twice that where there are hardly any images.

    Args:
        errors: its errors in dB by image, see ``choose``.
        others: those of the plan that it would replace.
    """
    differences = [y - x for x, y in zip(*_distinct([errors, others]), strict=True)]
    return statistics.fmean(differences) > margin(differences) * (2 if len(differences) < HARDLY_ANY else 1)


def choose(errors: Sequence[Sequence[float]], fitted: Sequence[int]) -> int:
    """The plan that least was fitted for, among those within a margin of the best.

    Args:
        errors: of each plan, in dB by image. An image that is there twice counts once: guidance may double batches.
        fitted: how much was fitted for each, in any unit. Of equals the best is taken.

    Returns:
        Its number.
    """
    columns = _distinct(errors)
    means = [statistics.fmean(x) for x in columns]
    best = min(range(len(columns)), key=means.__getitem__)

    def is_as_good(n: int) -> bool:
        differences = [x - y for x, y in zip(columns[n], columns[best], strict=True)]
        return fitted[n] < fitted[best] and means[n] - means[best] <= margin(differences)

    alike = [best, *filter(is_as_good, range(len(columns)))]
    return min(alike, key=lambda n: (fitted[n], means[n]))


def _distinct(errors: Sequence[Sequence[float]]) -> list[tuple[float, ...]]:
    """Errors of each plan on images that differ."""
    images = dict.fromkeys(tuple(round(x, 4) for x in image) for image in zip(*errors, strict=True))
    return list(zip(*images, strict=True))
