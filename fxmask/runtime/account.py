"""What a plan has cost and what it has saved, and who makes better plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Account:
    """Seconds spent on a model's plans, and saved by them.

    Attributes:
        images: calls of the pipeline (or runs of the sampler) that were accelerated.
        recorded: calls that ran in full and were recorded in passing.
        calls: further calls of the denoiser that learning has taken; 0 for ``effort="instant"`` of a pipeline.
        learning: seconds of fitting and of learning in the foreground.
        capturing: seconds of capturing the denoiser.
        compiling: seconds of compiling step graphs.
        saved_per_image: seconds that an accelerated call takes less than a full one, medians; ``None`` until both were seen.
    """

    images: int = 0
    recorded: int = 0
    calls: int = 0
    learning: float = 0.0
    capturing: float = 0.0
    compiling: float = 0.0
    saved_per_image: float | None = None

    @property
    def spent(self) -> float:
        """Seconds spent in all."""
        return self.learning + self.capturing + self.compiling

    @property
    def saved(self) -> float:
        """Seconds saved until now."""
        return self.images * (self.saved_per_image or 0.0)

    @property
    def break_even(self) -> int | None:
        """After how many accelerated images what was spent is saved; ``None`` if it is not known, or never."""
        if self.saved_per_image is None or self.saved_per_image <= 0:
            return None
        return -int(-self.spent // self.saved_per_image)

    @property
    def left(self) -> float:
        """Seconds that are still to be saved."""
        return max(0.0, self.spent - self.saved)

    def __str__(self) -> str:
        text = f"{self.images} accelerated, {self.recorded} in full; {self.spent:.1f} s spent"
        if self.calls:
            text += f" and {self.calls} further calls of the denoiser"
        if self.break_even is None:
            return text
        state = f"paid back after {self.break_even} images" if not self.left else f"{self.left:.1f} s left to pay"
        return f"{text}, {self.saved:.1f} s saved ({state}; breaks even at image {self.break_even})"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return {**vars(self), "spent": self.spent, "saved": self.saved, "break_even": self.break_even, "left": self.left}


class Improver(Protocol):
    """Makes better plans of a model from what was recorded."""

    def improve(self, effort: str, **options: Any) -> bool:
        """See ``AcceleratedModel.improve``."""

    def account(self) -> Account:
        """What was spent and saved until now."""

    def note(self, facts: Mapping[str, Any]) -> None:
        """Keep facts about the plan that is in use."""
