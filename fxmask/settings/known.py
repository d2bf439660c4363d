"""What is known of one setting of one denoiser."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fxmask.ir.mask import Mask
from fxmask.ir.trial import Trial
from fxmask.learning.instant.levels import ReusePlan, Squares
from fxmask.learning.instant.plans import InstantPlan
from fxmask.runtime.checks import Checks
from fxmask.runtime.trial import Findings
from fxmask.runtime.variants import Variants
from fxmask.sampling.sampler import Sampler

KEPT_RUNS = 8  # recorded runs that are kept of each setting, the latest
TIMES = 32  # calls whose seconds are remembered


@dataclass
class Known:
    """What is known of a setting.

    Attributes:
        runs: recorded.
        plan: of the recorded runs alone, if its plan is that one.
        squares: errors of reused blocks and of forecasts, where they were compared.
        trial: a mask that keeps what is to be compared in the next call, and what that is.
        findings: of the trial that is in use.
        trials: calls that compared.
        mask: that is in use.
        checks: of its full steps.
        variants: programs and plan; ``None`` until the second call.
        facts: about the sampler.
        refused: why it runs as it always did.
        unused: the denoiser takes no step here.
        full: seconds of calls in full.
        fast: seconds of accelerated calls, those that compiled left out.
        calls: of the pipeline.
        drifted: runs in a row whose estimated error was far beyond the plan's.
        effort: that the mask was made with.
    """

    runs: deque[Sampler] = field(default_factory=lambda: deque(maxlen=KEPT_RUNS))
    plan: InstantPlan | ReusePlan | None = None
    squares: Squares = field(default_factory=dict)
    trial: tuple[Mask, Trial] | None = None
    findings: Findings | None = None
    trials: int = 0
    mask: Mask | None = None
    checks: Checks | None = None
    variants: Variants | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    refused: str | None = None
    unused: bool = False
    full: deque[float] = field(default_factory=lambda: deque(maxlen=TIMES))
    fast: deque[float] = field(default_factory=lambda: deque(maxlen=TIMES))
    calls: int = 0
    drifted: int = 0
    effort: str = "instant"


def named(error: Exception) -> str:
    """An error and what kind it is."""
    return f"{type(error).__name__}: {error}"


def count_graphs(planned: Sequence[tuple[Any, Known, Variants]]) -> int:
    """How many step graphs there are of some denoisers' plans."""
    return sum(len(v.graphs) for _, _, variants in planned for v in variants.known)
