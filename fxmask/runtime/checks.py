"""Free checks: at a step that computes the prediction, what a forecast of it would have been.

The forecast is formed of the predictions of earlier full steps, which the caller was handed, and compared with the prediction:
one norm per row, on the device, which nobody waits for. Relative to what the same comparison gave on the runs that the plan
was fitted on, it says how much worse than these a run is, image by image; the plan's estimated error grows with it.

    error of a run ~ estimated error * sqrt(sum over checked steps k of share[k] * (measure[k] / expected[k])^2)

``share[k]`` is the part of the estimated square error that comes from the steps formed right before step k.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fxmask._torch import version_of
from fxmask.ir.combine import root_mean_square
from fxmask.ir.outputs import sampled_part
from fxmask.runtime.clock import on_its_way

MOST_RATIO = 1e3  # of a measure to what was expected of it


@dataclass(frozen=True)
class Check:
    """The comparison at one step.

    Attributes:
        sources: steps whose predictions the forecast reads, the latest first.
        coefficients: of these.
        expected: root mean square of the difference on the recorded runs.
        share: part of the estimated square error that it stands for.
    """

    sources: tuple[int, ...]
    coefficients: tuple[float, ...]
    expected: float
    share: float


@dataclass(frozen=True)
class Checks:
    """The comparisons of a plan.

    Attributes:
        by_step: at which steps.
        error: estimated relative L2 error of the final samples, where all measures are as expected.
        lanes: how the rows of a call are combined for one image: guidance at 4 has -3 and 4, up to a factor.
        max_error: a run whose estimated error passes it computes everything from then on.
    """

    by_step: Mapping[int, Check]
    error: float
    lanes: tuple[float, ...] = (1.0,)
    max_error: float | None = None

    @functools.cached_property
    def last_use(self) -> dict[int, int]:
        """By step, the last one that reads its prediction."""
        return {j: k for k, check in sorted(self.by_step.items()) for j in check.sources}


@dataclass
class RunChecks:
    """The comparisons of one lane of a run.

    Attributes:
        checks: of the plan.
        measures: by step, root mean square of the difference for every image, on the device.
    """

    checks: Checks
    measures: dict[int, torch.Tensor] = field(default_factory=dict)
    _kept: dict[int, tuple[torch.Tensor, int]] = field(default_factory=dict)
    _pending: list[tuple[torch.Tensor, Any]] = field(default_factory=list)
    _spent: torch.Tensor | None = None
    _sent: tuple[list[int], torch.Tensor, Any] | None = None

    def computed(self, step: int, prediction: torch.Tensor, sample: torch.Tensor | None = None) -> None:
        """Compare a step's prediction ``[rows, ...]`` with its forecast, and keep it for later ones.

        Args:
            step: its number.
            prediction: what was computed.
            sample: that it is for; where the prediction has more channels than that, the others say nothing of it.
        """
        check, last_use = self.checks.by_step.get(step), self.checks.last_use
        if check is not None and all(self._unchanged(j) for j in check.sources):
            difference = prediction
            for j, c in zip(check.sources, check.coefficients, strict=True):
                difference = torch.sub(difference, self._kept[j][0], alpha=c)
            part = difference if sample is None else sampled_part(difference, sample)
            self.measures[step] = root_mean_square(part, self.checks.lanes)
            if self.checks.max_error is not None:
                self._send(check, self.measures[step])
        if step in last_use:
            self._kept[step] = prediction, version_of(prediction)
        for j in [j for j in self._kept if last_use.get(j, -1) <= step]:
            del self._kept[j]

    def _unchanged(self, step: int) -> bool:
        """Whether the caller still has a prediction as it was handed out."""
        kept = self._kept.get(step)
        return kept is not None and version_of(kept[0]) == kept[1]

    # The guard

    def _send(self, check: Check, measure: torch.Tensor) -> None:
        """Add to what the run has spent of its error, and have the sum copied to the host in the background."""
        ratio = (measure / max(check.expected, 1e-30)).square() * check.share
        self._spent = ratio if self._spent is None else self._spent + ratio
        self._pending.append(on_its_way(self._spent.max().reshape(1)))

    def is_over(self) -> bool:
        """Whether the error of some image is estimated to pass the bound, by what has arrived on the host; never waits."""
        arrived = [copy for copy, event in self._pending if event is None or event.query()]
        if not arrived or self.checks.max_error is None:
            return False
        self._pending = self._pending[len(arrived) :]
        return self.checks.error * math.sqrt(float(arrived[-1].tolist()[0])) > self.checks.max_error

    # The estimate

    def send(self) -> None:
        """Have all measures copied to the host in the background: the run is over."""
        if self.measures and self._sent is None:
            steps = sorted(self.measures)
            values = torch.stack([self.measures[k] for k in steps])
            self._sent = steps, *on_its_way(values)

    def arrived_error(self) -> tuple[float, ...] | None:
        """The same as ``error`` of a run that is over; ``None`` while its measures are on their way. Never waits."""
        if self._sent is None or (self._sent[2] is not None and not self._sent[2].query()):
            return None
        steps, values, _ = self._sent
        return estimated_error(self.checks, dict(zip(steps, values.tolist(), strict=True)))

    def error(self) -> tuple[float, ...] | None:
        """Estimated relative L2 error of every image; ``None`` where nothing was compared. Waits for the device."""
        return estimated_error(self.checks, {k: x.tolist() for k, x in self.measures.items()})


def estimated_error(checks: Checks, measures: Mapping[int, list[float]]) -> tuple[float, ...] | None:
    """Estimated relative L2 error of every image, from the measures of a run."""
    if not measures:
        return None
    shares = {k: checks.by_step[k].share for k in measures}
    total = sum(shares.values())
    if total <= 0:
        return None
    images = min(len(x) for x in measures.values())
    result = []
    for n in range(images):
        ratios = [(shares[k], min(MOST_RATIO, x[n] / max(checks.by_step[k].expected, 1e-30))) for k, x in measures.items()]
        result.append(checks.error * math.sqrt(sum(share * ratio**2 for share, ratio in ratios) / total))
    return tuple(result)
