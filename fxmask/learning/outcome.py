"""What the user asks for: a speed-up, a fraction of MACs, or an error."""

from __future__ import annotations

from dataclasses import dataclass

from fxmask.errors import OutcomeError

EXAMPLES = {"speedup": 2.0, "macs": 0.5, "max_error": 0.05}
TOLERANCE = 0.03  # an outcome counts as met within this fraction


@dataclass(frozen=True)
class Outcome:
    """What the user asked for: at most one of a speed-up, a fraction of MACs, or an error.

    Attributes:
        speedup: total MACs of the full run over total MACs of the accelerated one, > 1.
        macs: fraction of the full run's MACs that may be spent, in (0, 1].
        max_error: largest relative L2 error of the final samples, > 0.

    Raises:
        OutcomeError: two were given, or one is out of range.
    """

    speedup: float | None = None
    macs: float | None = None
    max_error: float | None = None

    def __post_init__(self) -> None:
        given = {k: v for k, v in vars(self).items() if v is not None}
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise OutcomeError(
                    f"{name}={value!r} must be a number, got {type(value).__name__}; e.g. {name}={EXAMPLES[name]}"
                )
        if len(given) > 1:
            raise OutcomeError(f"give only one outcome, got {given}; drop all but one of speedup, macs, max_error")
        if self.speedup is not None and not self.speedup >= 1:
            raise OutcomeError(f"speedup={self.speedup} must be at least 1 (2.0 halves the MACs)")
        if self.macs is not None and not 0 < self.macs <= 1:
            raise OutcomeError(f"macs={self.macs} must be in (0, 1]: the fraction of the full run's MACs that is kept")
        if self.max_error is not None and not self.max_error > 0:
            raise OutcomeError(f"max_error={self.max_error} must be positive: relative L2 error of the final samples")

    def refuse_with(self, other: str) -> None:
        """Raise ``OutcomeError`` if an outcome was given beside ``other``."""
        given = [k for k, v in vars(self).items() if v is not None]
        if given:
            raise OutcomeError(f"{other}= already says what runs at which step; drop {given[0]}=")

    @property
    def budget(self) -> float:
        """Fraction of the full run's MACs to spend; 0.5 where nothing was asked for."""
        if self.macs is not None:
            return self.macs
        return 1 / (self.speedup if self.speedup is not None else 2.0)
