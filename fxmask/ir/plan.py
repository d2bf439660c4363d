"""Plan: a mask after liveness analysis, what each step really computes, loads, stores and drops."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from fxmask.ir.explain import explain_step
from fxmask.ir.forecast import Load, Slot
from fxmask.ir.mask import Mask
from fxmask.ir.program import Program
from fxmask.ir.text import as_html, plan_text


@dataclass(frozen=True)
class StepPlan:
    """What one step does.

    Attributes:
        compute: names of the blocks that are live and computed.
        load: cut values read from the cache, in graph order.
        blend: cut values that are computed and then combined with others, in graph order.
        store: (block, value index) written to the cache: exactly what some later step reads from this one.
        live_out: (block, value index) that the step's graph returns: ``store``, and what other steps that share the graph
            store.
        drop: slots that no later step reads, to be freed after this step.
        graph: index of the step graph that the step runs; steps with equal indices share one.
        macs: multiply-accumulates of the step at the batch size that the program was captured with.
    """

    compute: frozenset[str]
    load: tuple[Load, ...]
    store: tuple[tuple[str, int], ...]
    live_out: tuple[tuple[str, int], ...]
    drop: tuple[Slot, ...]
    graph: int
    macs: int
    blend: tuple[Load, ...] = ()

    @property
    def formed(self) -> tuple[Load, ...]:
        """Every cut value that is formed from others: loads, then blends."""
        return self.load + self.blend

    @property
    def key(self) -> tuple[Any, ...]:
        """What decides which graph a step runs: live computes, shape of the loads, stored values."""
        return (self.compute, tuple(x.form for x in self.load), tuple(x.form for x in self.blend), self.live_out)


@dataclass(frozen=True, repr=False)
class Plan:
    """The rectified mask with its load and store sets.

    Attributes:
        mask: the mask with every dead compute turned off.
        steps: one ``StepPlan`` per step; of a mask with lanes one per call, in the order of ``mask.order``. Steps of slots
            and loads count like them.
        start: the first step that runs; 0 unless made for a run that begins in the middle.
        full_macs: MACs of one unmasked step.
        peak_cache_bytes: largest number of bytes cached at once, at the captured batch size: per lane, or of all lanes
            together if these have rows of their own.
        fingerprint: fingerprint of the program.
        source: the mask as it was given; a run that starts elsewhere is rectified from it again.
    """

    mask: Mask
    steps: tuple[StepPlan, ...]
    start: int
    full_macs: int
    peak_cache_bytes: int
    fingerprint: str
    source: Mask = field(compare=False, repr=False)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The timestep of each of ``steps``."""
        return tuple(self.mask.timesteps[step] for step, _ in self.mask.order)

    @functools.cached_property
    def whole_steps(self) -> frozenset[int]:
        """Of a mask whose lanes come in one batch, the first call of each step whose lanes all compute everything."""
        size = len(self.mask.lanes)
        if not self.mask.batched:
            return frozenset()
        calls = range(-(-self.start // size) * size, len(self.steps), size)
        return frozenset(c for c in calls if all(not x.formed and x.macs == self.full_macs for x in self.steps[c : c + size]))

    @property
    def macs_per_step(self) -> tuple[int, ...]:
        """MACs of each step that runs; with lanes, of each call."""
        return tuple(step.macs for step in self.steps[self.start :])

    @property
    def mac_ratio(self) -> float:
        """Ideal speed-up: MACs of the unmasked run over MACs of this one."""
        return self.full_macs * len(self.macs_per_step) / max(1, sum(self.macs_per_step))

    @property
    def distinct_graphs(self) -> int:
        """How many different step graphs the plan runs."""
        return len({step.graph for step in self.steps[self.start :]})

    @property
    def first_steps(self) -> dict[int, int]:
        """The first step of each distinct graph, by the graph's index."""
        return {step.graph: i for i, step in reversed(list(enumerate(self.steps))) if step.graph >= 0}

    @property
    def kept_per_step(self) -> tuple[float, ...]:
        """Share of the full MACs that each step still computes."""
        return tuple(macs / max(1, self.full_macs) for macs in self.macs_per_step)

    def explain(self, step: int, program: Program) -> str:
        """What a step does with every block, and why: computed, loaded or forecast from where, stored, dead.

        Args:
            step: from 0; of a mask with lanes the call, counted over all lanes.
            program: the captured denoiser.

        Raises:
            InputError: the plan has no such step, or is of another program.
        """
        return explain_step(self, step, program)

    def __str__(self) -> str:
        return plan_text(self)

    def __repr__(self) -> str:
        return f"Plan({self.mask.num_steps} steps, {self.mac_ratio:.2f}x fewer MACs, {self.distinct_graphs} step graphs)"

    def _repr_html_(self) -> str:
        return as_html(plan_text(self))
