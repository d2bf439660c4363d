"""What became of the latest runs: for the report, and to say why nothing is accelerated."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from fxmask.runtime.checks import RunChecks

LATEST = 8  # runs that are remembered
MISSES = 3  # calls in a row that could have followed the plan and did not, before a warning

DOUBTFUL = "two runs with the same conditioning cannot be told apart; mark each with `with accelerated.generation():`"
MIXED = "the samples of a batch are at different timesteps"


def changed_conditioning(names: Sequence[str]) -> str:
    """Why calls do not follow a plan: conditioning that is new each time."""
    return (
        f"{names} changes from call to call, so each is taken for another image; if it changes at every step, capture with "
        f"roles={{{names[0]!r}: 'step'}}"
    )


def other_timesteps(timesteps: Sequence[float], value: float | None) -> str:
    """Why calls do not follow a plan: it is made for other timesteps."""
    shown = [f"{t:g}" for t in timesteps]
    listed = ", ".join(shown if len(shown) <= 6 else [*shown[:3], "...", *shown[-2:]])
    came = "" if value is None else f", and a call came at {value:g}"
    return (
        f"it is made for {len(shown)} steps at timesteps [{listed}]{came}. Use the same scheduler with the same settings and "
        "num_inference_steps as in accelerate() (some pipelines shift timesteps by the size of the image), and mark each run "
        "with `with accelerated.generation():`"
    )


@dataclass
class Run:
    """One sequence of calls with the same conditioning.

    Attributes:
        calls: of the denoiser.
        followed: of these, how many went on from the step before, as planned.
        macs: multiply-accumulates that were spent.
        full_macs: of the same calls without a mask.
        original: calls that the original model answered.
        guarded: the step from which on everything was computed, because the error was estimated to pass ``max_error``.
        checks: of the predictions of its full steps, where there are any.
    """

    calls: int = 0
    followed: int = 0
    macs: int = 0
    full_macs: int = 0
    original: int = 0
    guarded: int | None = None
    checks: RunChecks | None = None

    @property
    def error(self) -> tuple[float, ...] | None:
        """Estimated relative L2 error of every image; ``None`` where it cannot be told. Waits for the device."""
        return None if self.checks is None else self.checks.error()

    def add(self, macs: int, full_macs: int, followed: bool = False, original: bool = False) -> None:
        """Count one call."""
        self.calls += 1
        self.followed += followed
        self.original += original
        self.macs += macs
        self.full_macs += full_macs

    @property
    def ratio(self) -> float:
        """How many times fewer MACs than without a mask."""
        return self.full_macs / self.macs if self.macs else 1.0

    def __str__(self) -> str:
        text = f"{self.calls} calls, {self.followed} followed the plan, {self.ratio:.2f}x fewer MACs"
        errors = self.error
        if errors:
            text += f", estimated error {max(errors):.2g}" + (f" (worst of {len(errors)} images)" if len(errors) > 1 else "")
        if self.guarded is not None:
            text += f", everything computed from step {self.guarded} on"
        return f"{text}, {self.original} by the original" if self.original else text


class History:
    """The latest runs of an accelerated model, and why calls did not follow the plan. Threads share it."""

    def __init__(self) -> None:
        self._runs: deque[Run] = deque(maxlen=LATEST)
        self._reasons: dict[str, str] = {}
        self._unplanned: Run | None = None
        self._misses: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def runs(self) -> tuple[Run, ...]:
        """The latest, the last one last."""
        with self._lock:
            return tuple(self._runs)

    @property
    def reasons(self) -> dict[str, str]:
        """By cause, the latest reason in words."""
        with self._lock:
            return dict(self._reasons)

    def begin(self) -> Run:
        """A run that follows the plan begins."""
        run = Run()
        with self._lock:
            self._unplanned = None
            self._runs.append(run)
        return run

    def unplanned(self, macs: int, original: bool = False) -> None:
        """A call that belongs to no run."""
        with self._lock:
            if self._unplanned is None:
                self._unplanned = Run()
                self._runs.append(self._unplanned)
            self._unplanned.add(macs, macs, original=original)

    def miss(self, cause: str, reason: str) -> str | None:
        """Note down why a call did not follow the plan; returns the commonest cause when that has become too common."""
        with self._lock:
            self._misses[cause] += 1
            self._reasons[cause] = reason
            return self._misses.most_common(1)[0][0] if self._misses.total() >= MISSES else None

    def hit(self) -> dict[str, str]:
        """A call followed the plan; returns the reasons why others did not, which are forgotten."""
        if not self._misses and not self._reasons:
            return {}
        with self._lock:
            reasons = self._reasons
            self._misses, self._reasons = Counter(), {}
        return reasons

    @property
    def cause(self) -> str | None:
        """The commonest cause since a call followed the plan."""
        with self._lock:
            return self._misses.most_common(1)[0][0] if self._misses else None
