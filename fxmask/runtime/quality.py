"""What was measured of a plan on runs that it was not made from: plain numbers, which are saved with it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from fxmask.ir.mask import Mask

MEASURED = "measured"  # name among a plan's facts


@dataclass(frozen=True)
class Quality:
    """How far images made with a plan are from those made in full, with the same noise, and what both took.

    Attributes:
        mask: digest of the mask that it was measured with.
        images: how many were compared.
        psnr: mean over images, dB.
        psnr_low: 10th percentile over images, dB.
        error: relative L2 error over all images.
        fewer_steps: so many steps cost the same; ``None`` where that cannot be compared.
        fewer_psnr: mean over the same images made with fewer steps, dB.
        fewer_psnr_low: 10th percentile of these.
        seconds: of a call, median; what compiles is left out.
        full_seconds: of the same call in full.
        device: where, e.g. ``"cpu"`` or the name of a GPU.
    """

    mask: str
    images: int
    psnr: float
    psnr_low: float
    error: float
    fewer_steps: int | None = None
    fewer_psnr: float | None = None
    fewer_psnr_low: float | None = None
    seconds: float | None = None
    full_seconds: float | None = None
    device: str | None = None

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any], mask: Mask) -> Quality | None:
        """What the facts of a plan say of its present mask; ``None`` if nothing, or if it was of another mask."""
        try:
            found = msgspec.convert(facts.get(MEASURED), cls)
        except msgspec.ValidationError:
            return None
        return found if found.mask == digest_of_mask(mask) else None

    @property
    def speedup(self) -> float | None:
        """Measured: seconds of a call in full over seconds with the plan."""
        return None if not self.seconds or self.full_seconds is None else self.full_seconds / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON; what is not known is not in it."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def lines(self) -> list[tuple[str, str]]:
        """Names and values for people."""
        found = [
            ("held-out PSNR", f"{decibels(self.psnr)} mean, {decibels(self.psnr_low)} 10th percentile ({self.images} images)")
        ]
        if self.fewer_steps is not None and self.fewer_psnr is not None:
            low = "" if self.fewer_psnr_low is None else f", {decibels(self.fewer_psnr_low)} 10th percentile"
            found.append((f"{self.fewer_steps} steps instead", f"{decibels(self.fewer_psnr)} mean{low}"))
        if self.speedup is not None:
            took = f"{self.full_seconds:.3g} s in full by the original, {self.seconds:.3g} s with the plan"
            found.append(("measured speed-up", f"{self.speedup:.2f}x ({took})"))
        return found


def decibels(value: float) -> str:
    """A PSNR; images that are all but equal have no useful one."""
    return f"{value:.1f} dB" if value < 200 else "over 200 dB"


def digest_of_mask(mask: Mask) -> str:
    """Changes with what is computed or forecast."""
    calls = mask.by_call
    terms = sorted((calls.forecast.terms if calls.forecast else {}).items())
    lanes = (mask.lanes, mask.order) if mask.lanes else ()
    text = repr((calls.timesteps, calls.blocks, calls.compute.tolist(), terms, *lanes))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
