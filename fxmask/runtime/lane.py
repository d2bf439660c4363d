"""Lanes, and the courses that they are on.

Lane (calls with one conditioning) --> Course (cached values, and the row of the mask that comes next)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fxmask._torch import version_of
from fxmask.guards.watch import WeightsState
from fxmask.ir.forecast import Cache
from fxmask.runtime import clock
from fxmask.runtime.checks import RunChecks
from fxmask.runtime.executor import Executor
from fxmask.runtime.history import Run
from fxmask.runtime.prologues import Rows
from fxmask.runtime.steady import Steady, is_same_memory
from fxmask.runtime.trial import RunTrial
from fxmask.runtime.variants import Variant


@dataclass
class WholeRun:
    """What runs the steps of a course in which all lanes of one batch are computed."""

    variant: Variant
    executor: Executor
    rows: Rows  # what was computed when it began
    weights: WeightsState  # that the rows were computed with


@dataclass(frozen=True)
class Seen:
    """A sample of a call, that others are compared with, whatever its owner writes into it meanwhile."""

    given: torch.Tensor
    version: int
    copy: torch.Tensor

    @classmethod
    def of(cls, sample: torch.Tensor) -> Seen:
        """The sample of a call that is made now."""
        return cls(sample, version_of(sample), sample.clone())

    def is_same(self, other: torch.Tensor) -> bool:
        """Whether a call of the same step is of the same image. Waits for the device where memory does not tell."""
        if self.version != -1 and version_of(other) == self.version and is_same_memory(other, self.given):
            return True
        return other.shape == self.copy.shape and other.dtype == self.copy.dtype and bool(torch.equal(other, self.copy))


@dataclass
class Course:
    """One run through the rows of a mask: of one lane, or of all lanes of a mask that has rows for each."""

    start: int = 0  # the row that it began with
    next: int | None = None  # the row whose call comes next; None: no caches to go on from
    cache: Cache = field(default_factory=dict)
    sample: Seen | None = None  # of its latest call, as long as lanes are missing
    taken: set[int] = field(default_factory=set)  # numbers of its lanes
    whole: WholeRun | None = None  # what runs steps of the whole batch

    def stop(self) -> None:
        """Nothing can go on from it."""
        self.next, self.cache, self.sample = None, {}, None


@dataclass
class Lane:
    """One sequence of calls with the same conditioning."""

    conditioning: tuple[torch.Tensor, ...]  # held, so that their memory cannot become another lane's
    versions: tuple[int, ...]
    copies: tuple[torch.Tensor, ...]  # to compare with
    variant: Variant
    executor: Executor  # runs the plan from the row that its course began with
    course: Course = field(default_factory=Course)
    number: int = 0  # which of the mask's lanes it is
    rows: Rows = ()  # what was computed when its run began
    weights: WeightsState | None = None  # that the rows were computed with
    seen: int = 0  # when it was last called, in calls of its generation
    latest: int | None = None  # the step of the latest call that the plan knows
    stats: Run | None = None  # of the run that it is in
    steady: Steady | None = None  # what its next call looks like
    checks: RunChecks | None = None  # of the run that it is in
    trial: RunTrial | None = None  # of the run that it is in, if it compares ways of forming steps
    is_over: bool = False  # the run's error is estimated to pass its bound: all that is left of it is computed
    name: str | None = None  # that the pipeline calls it by
    doubtful: bool = False  # calls came that could belong to two runs; full graphs until a clear start

    @property
    def cache(self) -> Cache:
        """Stored values of its course."""
        return self.course.cache

    @property
    def position(self) -> int | None:
        """The step that its next call is expected to be; ``None`` if there are no caches to go on from."""
        following = self.course.next
        return None if following is None else self.variant.mask.step_after(following, self.number)

    def forget(self) -> None:
        """Drop the caches: the next call cannot go on from them."""
        self.course.stop()
        self.rows = ()
        self.steady = None

    @property
    def is_going(self) -> bool:
        """Whether it is in the middle of a run."""
        return self.position is not None and 0 < self.position < self.variant.mask.num_steps

    @property
    def is_expected(self) -> bool:
        """Whether the timestep of its next call is known."""
        return self.position is not None and self.position < self.variant.mask.num_steps

    def is_given(self, given: Sequence[torch.Tensor], versions: Sequence[int]) -> bool:
        """Whether its conditioning is these very tensors, unchanged.

        Of those on a device whose changes nobody counts it is taken that they did not: to compare them would wait.
        """
        return all(
            version == before and (version != -1 or not clock.on_host(x)) and (x is held or is_same_memory(x, held))
            for x, held, version, before in zip(given, self.conditioning, versions, self.versions, strict=True)
        )

    def is_twin_of(self, other: Lane) -> bool:
        """Whether nothing tells the two apart but their turns; see ``Generation._choose``."""
        same = self.variant is other.variant and self.name == other.name
        return same and self.conditioning is other.conditioning
