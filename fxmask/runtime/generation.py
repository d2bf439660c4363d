"""Generations: one run of the sampling loop each, with a lane for each sequence of calls."""

from __future__ import annotations

import contextvars
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxmask._torch import version_of
from fxmask.ir.calls import BoundCall
from fxmask.ir.forecast import Cache
from fxmask.runtime.clock import Clock
from fxmask.runtime.prologues import PrecomputedRow
from fxmask.runtime.variants import Variant, Variants

# Largest relative difference between a recorded timestep and the same one in the precision that it arrives in.
TIMESTEP_ROUNDING = {torch.bfloat16: 4e-3, torch.float16: 5e-4}


# Without a marked generation, a lane that was not called for this many calls is taken for abandoned.
IDLE_CALLS = 64


@dataclass
class Lane:
    """One sequence of calls with the same conditioning."""

    conditioning: tuple[torch.Tensor, ...]  # held, so that their memory cannot become another lane's
    versions: tuple[int, ...]
    variant: Variant
    start: int = 0
    position: int | None = None  # the step that the next call is expected to be; None: no caches to go on from
    cache: Cache = field(default_factory=dict)
    rows: list[PrecomputedRow] = field(default_factory=list)  # what was computed when its run began
    seen: int = 0  # when it was last called, in calls of its generation
    latest: int | None = None  # the step of the latest call that the plan knows
    doubtful: bool = False  # calls came that could belong to two runs; full graphs until a clear start

    def forget(self) -> None:
        """Drop the caches: the next call cannot go on from them."""
        self.position = None
        self.cache = {}
        self.rows = []


class Generation:
    """One run of the sampling loop; caches live as long as it does.

    Use as a context manager around the calls of one run. It may be entered again, so that two runs can be interleaved
    step by step in one thread, each in its own generation.

    Args:
        variants: the programs of the model that is called.
        current: where the marked generation of this context is kept.
    """

    _predicts = True  # timesteps that are slow to read: the caller vouches for their sequence

    def __init__(self, variants: Variants, current: contextvars.ContextVar[Generation | None]) -> None:
        self._variants = variants
        self._current = current
        self._lanes: list[Lane] = []
        self._tokens: list[contextvars.Token[Generation | None]] = []
        self._clock = Clock()
        self._count = 0
        self.calls = 0
        self.matched = 0

    def __enter__(self) -> Generation:
        self._tokens.append(self._current.set(self))
        return self

    def __exit__(self, *exception: object) -> None:
        self._current.reset(self._tokens.pop())
        if exception[0] is None and not self._tokens:
            self.warn_if_useless()

    def run(self, variant: Variant, bound: BoundCall) -> list[torch.Tensor] | None:
        """Run one call of the denoiser and move its lane forward; ``None`` if the original must run."""
        tensors = list(bound.tensors.values())
        lane, step = self._locate(self._siblings(variant, bound), bound)
        if step is None or step != lane.position:  # not a run in progress: its weights may have been replaced
            current = self._variants.of(bound)
            if current is not variant:
                return None if current is None else self.run(current, bound)
        self._count += 1
        lane.seen = self._count
        self.calls += 1
        if step is None:
            lane.forget()
            return variant.executor(0).run_full(tensors)
        if step != lane.position:
            lane.start, lane.cache = step, {}
            lane.rows = variant.executor(step).begin(tensors)
        else:
            self.matched += 1
        # If the step raises, the position is not known to have been reached: the next call must not go on from it.
        lane.position = None
        outputs = variant.executor(lane.start).run_step(step, tensors, lane.cache, lane.rows)
        lane.position = step + 1
        return outputs

    def variant_in_use(self, bound: BoundCall) -> Variant | None:
        """The variant that a run in progress uses for this form of call, if its weights are still where they were.

        Whether weights were replaced is looked up when a run starts, not at every step: that takes a walk over them.
        """
        for lane in self._lanes:
            running = lane.position is not None and 0 < lane.position < lane.variant.mask.num_steps
            if running and lane.variant.key == bound.key and lane.variant.in_place():
                return lane.variant
        return None

    def _siblings(self, variant: Variant, bound: BoundCall) -> list[Lane]:
        """The lanes with this call's conditioning (the same tensors, unchanged, or else equal ones), at least one."""
        roles = variant.program.roles
        given = tuple(x for name, x in bound.tensors.items() if roles.get(name) == "conditioning")
        lanes = [lane for lane in self._lanes if lane.variant is variant]
        for test in (_identical, _equal):
            same = [x for x in lanes if all(map(test, given, x.conditioning, x.versions))]
            if same:
                return same
        self._forget_idle_lanes()
        lane = Lane(given, tuple(version_of(x) for x in given), variant)
        self._lanes.append(lane)
        return [lane]

    def _locate(self, siblings: list[Lane], bound: BoundCall) -> tuple[Lane, int | None]:
        """The lane and the step of the plan that a call is; the step is ``None`` if it must run in full."""
        waiting = sorted(siblings, key=lambda x: x.seen)
        lane = waiting[0]
        mask = lane.variant.mask
        name = lane.variant.program.signature.timestep
        if name is None:  # nothing but the count tells steps apart
            return lane, self._counted(lane)
        timestep = bound.timestep
        rounding = TIMESTEP_ROUNDING.get(timestep.dtype, 1e-6) if isinstance(timestep, torch.Tensor) else 1e-6
        value = None if timestep is None else self._read_timestep(lane, timestep, rounding)
        matches = [] if value is None else [i for i, t in enumerate(mask.timesteps) if _close(t, value, rounding)]
        if not matches:
            return lane, None
        lane = self._choose(waiting, matches)
        step = lane.position if lane.position in matches else matches[0]
        assert step is not None
        lane.doubtful = self._is_doubtful(lane, step)
        lane.latest = step
        return lane, None if lane.doubtful else step

    def _forget_idle_lanes(self) -> None:
        """A marked generation ends when its owner says so."""

    def _counted(self, lane: Lane) -> int | None:
        """The step of a denoiser that takes no timestep: nothing but the count tells steps apart."""
        position = lane.position if lane.position is not None else (0 if not lane.cache else None)
        return position if position is not None and position < lane.variant.mask.num_steps else None

    def _choose(self, waiting: Sequence[Lane], matches: Sequence[int]) -> Lane:
        """Of lanes with the same conditioning the one whose turn it is; a new one if all have just had theirs."""
        for lane in waiting:
            if lane.position in matches:
                return lane
        if all(lane.latest in matches and lane.position is not None for lane in waiting):
            first = waiting[0]
            self._lanes.append(Lane(first.conditioning, first.versions, first.variant))
            return self._lanes[-1]
        return waiting[0]

    def _read_timestep(self, lane: Lane, timestep: Any, rounding: float) -> float | None:
        """The timestep's value. Waits for the device only where a marked generation cannot predict it."""
        wrong = self._clock.wrong_prediction(rounding)
        if wrong is not None:
            for other in self._lanes:
                other.forget()
            raise RuntimeError(
                f"inside generation() a call was taken for timestep {wrong[0]:g}, but it was at {wrong[1]:g}; its result is "
                "wrong. Mark each run of the sampling loop with a generation() of its own, and follow the plan's timesteps"
            )
        expected = lane.position is not None and lane.position < lane.variant.mask.num_steps
        if self._predicts and expected and not self._clock.knows(timestep):
            value = lane.variant.mask.timesteps[lane.position or 0]
            self._clock.predict(timestep, value)
            return value
        return self._clock.read(timestep)

    def _is_doubtful(self, lane: Lane, step: int) -> bool:
        """Whether a call could belong to one of two runs; in a marked generation there is one."""
        return False

    def warn_if_useless(self) -> None:
        """Warn if a run that should have been accelerated was not."""
        mask = self._variants.plan.mask
        if self.calls > 1 and not self.matched and not bool(mask.compute.all()):
            warnings.warn(
                f"none of {self.calls} denoiser calls followed the plan, so nothing was accelerated: it is made for "
                f"{mask.num_steps} steps at timesteps {_abbreviate(mask.timesteps)}. Use the same scheduler and "
                "num_inference_steps as in accelerate(), and mark each run with `with accelerated.generation():`",
                stacklevel=3,
            )


class InferredGeneration(Generation):
    """Runs that nobody marked, one after the other: they are told apart by their timesteps and conditioning."""

    _predicts = False

    def start_again(self) -> None:
        """Count the calls of the next run, after a warning if the last one was not accelerated."""
        self.warn_if_useless()
        self.calls = self.matched = 0

    def _forget_idle_lanes(self) -> None:
        """Lanes of runs that ended or were abandoned hold memory for nothing."""
        self._lanes = [x for x in self._lanes if x.cache and self._count - x.seen <= IDLE_CALLS]

    def _counted(self, lane: Lane) -> int | None:
        """None: where a run begins cannot be counted."""
        return None

    def _choose(self, waiting: Sequence[Lane], matches: Sequence[int]) -> Lane:
        """The lane that was not called for longest."""
        return waiting[0]

    def _is_doubtful(self, lane: Lane, step: int) -> bool:
        """Whether a call could belong to one of two runs with the same conditioning.

        Two calls in a row at one step are an abandoned run and a new one, or two runs step by step, or two lanes that
        nothing tells apart; only ``generation()`` can say which. The doubt ends when the sequence goes back: a new run.
        """
        if lane.latest is None or step == lane.position:
            return False
        return step == lane.latest or (lane.doubtful and step > lane.latest)


def _identical(a: torch.Tensor, b: torch.Tensor, version: int) -> bool:
    return (
        version_of(b) == version != -1
        and a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
    )


def _equal(a: torch.Tensor, b: torch.Tensor, version: int) -> bool:
    return version_of(b) == version and torch.equal(a, b)


def _close(a: float, b: float, rounding: float) -> bool:
    return abs(a - b) <= rounding * max(abs(a), 1e-3)


def _abbreviate(values: tuple[float, ...]) -> str:
    shown = [f"{v:g}" for v in values]
    return "[" + ", ".join(shown if len(shown) <= 6 else [*shown[:3], "...", *shown[-2:]]) + "]"
