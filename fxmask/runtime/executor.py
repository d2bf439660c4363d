"""Executor: runs the steps of one plan. The only place where a plan's reads and writes touch real tensors.

It knows nothing of timesteps, lanes or generations. Several executors (plans of one mask that start at different steps)
share a ``GraphStore``, so that equal step graphs are compiled once.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from fxmask.backends.straight_line import restride
from fxmask.ir.forecast import Cache, Slot
from fxmask.ir.plan import Plan
from fxmask.passes.step_graph import StepGraph
from fxmask.runtime.coefficients import Coefficients
from fxmask.runtime.graph_store import GraphStore, keys_of
from fxmask.runtime.prologues import PrecomputedRow, PrologueRunner, Rows
from fxmask.runtime.static_memory import dense


class Ready(NamedTuple):
    """A step, prepared once.

    Attributes:
        graph: that it runs.
        run: what a backend made of the graph.
        inputs: positions of the program's inputs that it takes, and the memory layout of each.
        pick: takes the precomputed values that it reads out of a row.
        coefficients: of its forecasts.
        slots: that it reads.
        read: takes their values out of a cache.
        store: positions of results, and the slots that they go to.
        targets: these slots.
        take: takes what is stored out of the results.
        drop: slots that nobody reads again.
        timed: whether it reads the timestep itself.
        loose: positions of stored results that lie in larger memory; ``None`` until it has run.
        before: what must run before ``run`` where that is replayed from a recording; ``None`` if nothing must.
    """

    graph: StepGraph
    run: Callable[..., Any]
    inputs: tuple[tuple[int, tuple[int, ...]], ...]
    pick: Callable[[PrecomputedRow], tuple[torch.Tensor, ...]]
    coefficients: tuple[torch.Tensor, ...]
    slots: tuple[Slot, ...]
    read: Callable[[Cache], tuple[torch.Tensor, ...]]
    store: tuple[tuple[int, Slot], ...]
    targets: tuple[Slot, ...]
    take: Callable[[Any], tuple[torch.Tensor, ...]]
    drop: tuple[Slot, ...]
    timed: bool
    loose: frozenset[int] | None
    before: Callable[[], None] | None


class Executor:
    """Runs the steps of one plan.

    Args:
        plan: of ``graphs.program``.
        graphs: where step graphs are kept.
    """

    def __init__(self, plan: Plan, graphs: GraphStore) -> None:
        self.plan = plan
        self.program = graphs.program
        self.graphs = graphs
        self._ready: dict[int, Ready] = {}
        timestep = self.program.signature.timestep
        self._timestep = self.program.inputs.index(timestep) if timestep in self.program.inputs else -1
        self._layouts = [dense(x)[1] for x in self.program.example.tensors.values()]

    @functools.cached_property
    def coefficients(self) -> Coefficients:
        """Of the plan's forecasts."""
        return Coefficients.of(self.plan, self.program)

    def begin(self, tensors: Sequence[torch.Tensor], before: Rows = ()) -> Rows:
        """What can be computed before the first step of a run, for ``run_step``.

        Args:
            tensors: the program's inputs; which timestep is in them does not matter.
            before: of the same run, if its weights were changed in the middle of it.
        """
        self._refresh_layouts()
        return self.prologues.begin(tensors)

    def _refresh_layouts(self) -> None:
        layouts = getattr(self.graphs.compiler, "layouts", None)
        if layouts is not None:  # weights may have been written to without a trace since the last run
            layouts.refresh()

    @functools.cached_property
    def prologues(self) -> PrologueRunner:
        """What runs outside the steps."""
        return self.graphs.prologue_runner(self.plan)

    def needs_timestep(self, step: int) -> bool:
        """Whether a step reads the timestep, rather than what was computed of it before the first step."""
        ready = self._ready.get(step)
        return ready is None or ready.timed

    def run_full(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs of the unmasked program; no cache is read or written."""
        return self.run_step(self.plan.start, tensors, {})

    def run_step(
        self,
        step: int,
        tensors: Sequence[torch.Tensor],
        cache: Cache,
        rows: Rows = (),
        exact: bool = True,
    ) -> list[torch.Tensor]:
        """Run one step: read what it loads from ``cache``, store what it must, drop what nobody reads again.

        ``cache`` changes only after the graph has run, so that a failing step leaves it as it was.

        Args:
            step: number of the step.
            tensors: the program's inputs, in order.
            cache: of one lane.
            rows: from ``begin`` with the same conditioning; without them the call stands alone.
            exact: whether the timestep is the very one that the rows are for.

        Raises:
            KeyError: a slot is missing; the steps were not run in order.
        """
        ready = self._ready.get(step) or self._prepare(step)
        graph = ready.graph
        arguments = self._arguments(ready, step, tensors, rows if exact else ())
        arguments += ready.coefficients
        arguments += ready.read(cache)
        run = ready.run if ready.loose is not None else self.graphs.first_call(self.plan, step, ready.run)
        results = run(*arguments)
        loose = ready.loose if ready.loose is not None else self._settle(step, ready, results)
        if not loose:
            for slot, value in zip(ready.targets, ready.take(results), strict=True):
                cache[slot] = value
        else:
            for k, slot in ready.store:
                cache[slot] = _compact(results[k])
        for slot in ready.drop:
            del cache[slot]
        return list(results[: graph.num_outputs])

    def _arguments(self, ready: Ready, step: int, tensors: Sequence[torch.Tensor], rows: Rows) -> list[torch.Tensor]:
        """What a step's graph takes of the inputs and of what is precomputed; without rows that is computed now."""
        arguments = [restride(tensors[k], layout) for k, layout in ready.inputs]
        if ready.graph.precomputed:
            if not rows:
                row = self.prologues.at(tensors)
            else:
                row = self.prologues.complete(rows[step], tensors) if ready.timed else rows[step]
            arguments += ready.pick(row)
        return arguments

    def begin_whole(self, tensors: Sequence[torch.Tensor]) -> Rows:
        """As ``begin``, for ``run_whole``, which is never a recording of a step."""
        self._refresh_layouts()
        return self.prologues.begin(tensors)

    def run_whole(
        self, step: int, tensors: Sequence[torch.Tensor], rows: Rows = ()
    ) -> tuple[list[torch.Tensor], dict[tuple[str, int], torch.Tensor]]:
        """Run a step that computes everything; return its outputs, and by (block, value) all that any step may read of it.

        Args:
            step: number of the step.
            tensors: the program's inputs, in order.
            rows: from ``begin_whole`` with the same conditioning; without them the call stands alone.
        """
        ready = self._ready.get(step) or Executor._prepare(self, step)
        graph, run = ready.graph, self.graphs.first_call(self.plan, step, ready.run)
        results = run(*self._arguments(ready, step, tensors, rows))
        return list(results[: graph.num_outputs]), dict(zip(graph.store, results[graph.num_outputs :], strict=True))

    def _settle(self, step: int, ready: Ready, results: Sequence[torch.Tensor]) -> frozenset[int]:
        """Note down which stored results lie in larger memory: where a compiler puts them does not change."""
        loose = frozenset(k for k, _ in ready.store if _compact(results[k]) is not results[k])
        self._ready[step] = ready._replace(loose=loose)
        return loose

    def _prepare(self, step: int) -> Ready:
        """All that running a step needs besides tensors."""
        plan = self.plan.steps[step]
        graph, run = self.graphs.get(self.plan, step)
        stored = [(k, name) for k, name in enumerate(graph.store, graph.num_outputs) if name in plan.store]
        store = tuple((k, Slot(block, value, step)) for k, (block, value) in stored)
        slots = tuple(slot for load in plan.formed for slot in load.slots)
        ready = Ready(
            graph,
            run,
            tuple((k, self._layouts[k]) for k in graph.inputs),
            _picker(graph.precomputed),
            self.coefficients.at(step) if graph.coefficients else (),
            slots,
            _picker(slots),
            store,
            tuple(slot for _, slot in store),
            _picker([k for k, _ in store]),
            plan.drop,
            self._timestep in graph.inputs or bool(graph.precomputed and self.prologues.completes),
            None,
            getattr(run, "before", None),
        )
        self._ready[step] = ready
        return ready

    def compile_all(self, *, progress: bool) -> None:
        """Compile every distinct graph now, by running it once on the captured call with blank caches."""
        tensors = list(self.program.example.tensors.values())
        rows = self.begin(tensors)
        with self.graphs.bar.holding(keys_of(self.plan), progress):
            for step in sorted(self.plan.first_steps.values()):
                self.run_step(step, tensors, {slot: self.blank(slot) for slot in self.slots(step)}, rows)

    def slots(self, step: int) -> list[Slot]:
        """What a step reads or drops."""
        plan = self.plan.steps[step]
        return sorted({slot for load in plan.formed for slot in load.slots} | set(plan.drop))

    def blank(self, slot: Slot) -> torch.Tensor:
        """A cached value like ``run_step`` would store, filled with zeros."""
        value = self.node_of(slot).meta["val"]
        sizes, strides = tuple(map(int, value.shape)), tuple(map(int, value.stride()))
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device).zero_()

    def node_of(self, slot: Slot) -> fx.Node:
        """The node whose value a slot holds."""
        return self.program.node(self.program.block(slot.block).values[slot.value])


def _picker(keys: Sequence[Any]) -> Callable[[Any], tuple[torch.Tensor, ...]]:
    """Reads entries of a mapping as a tuple, in one call."""
    if len(keys) > 1:
        return operator.itemgetter(*keys)
    return lambda mapping: tuple(mapping[key] for key in keys)


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in storage of its own size: a compiler may have placed it inside a larger buffer."""
    if tensor.untyped_storage().nbytes() > 2 * tensor.numel() * tensor.element_size() + 64:
        return tensor.clone()
    return tensor
