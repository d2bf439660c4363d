"""Steps that are recorded once and then replayed: as CUDA graphs, on an NVIDIA GPU.

A recording is of a whole step, its results go where later recordings read them (see ``static_memory.py``), and it serves every
step that runs the same graph on the same buffers. What cannot be recorded runs as it would without.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxmask._torch import copy_all as put
from fxmask.backends.protocol import Capturer
from fxmask.errors import BackendError
from fxmask.guards.check import PLAIN_TENSORS
from fxmask.guards.watch import WeightWatch
from fxmask.ir.forecast import Cache, Slot
from fxmask.ir.graph import attribute, value_bytes
from fxmask.ir.plan import Plan
from fxmask.passes.assign_buffers import assign_buffers
from fxmask.runtime.executor import Executor, Ready
from fxmask.runtime.graph_store import GraphStore
from fxmask.runtime.prologues import PrecomputedRow, Rows
from fxmask.runtime.static_memory import MOST_RUNS, Lease, StaticMemory, Table, blank_like

WATCHED = 8  # weights whose place is looked at in each step, besides those that precomputed values are made of
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Recorded:
    """A step of a run, ready to be replayed.

    Attributes:
        replay: does its work.
        given: positions of the inputs that are copied in.
        places: where these are copied to, and at last the step's index.
        index: what is copied there.
        reads: views of the cached values that it reads, in the order of the step's slots.
        stores: slots, and views of the values that it leaves for them.
        outputs: where it leaves the results.
    """

    replay: Any
    given: tuple[int, ...]
    places: list[torch.Tensor]
    index: list[torch.Tensor]
    reads: tuple[torch.Tensor, ...]
    stores: tuple[tuple[Slot, torch.Tensor], ...]
    outputs: list[torch.Tensor]


class ReplayingExecutor(Executor):
    """Runs the steps of one plan by replaying recordings of them.

    Args:
        plan: of ``graphs.program``.
        graphs: where step graphs are kept.
        capturer: records.
    """

    def __init__(self, plan: Plan, graphs: GraphStore, capturer: Capturer) -> None:
        super().__init__(plan, graphs)
        self._capturer = capturer
        self._owner = object()  # of memory: plans of several settings share a store of graphs, and have other buffers
        self._device = self.program.example.sample.device
        module = self.program.graph_module
        held = [attribute(module, node) for node in module.graph.find_nodes(op="get_attr")]
        self._weights = WeightWatch([x for x in held if type(x) in PLAIN_TENSORS and not x.is_meta], WATCHED)
        self._changing = tuple(k for k, name in enumerate(self.program.inputs) if self.program.roles[name] != "conditioning")
        self._fixed = tuple(k for k in range(len(self.program.inputs)) if k not in self._changing)
        self._problem: str | None = None  # why nothing is recorded
        self._said_full = False

    def begin(self, tensors: Sequence[torch.Tensor], before: Rows = ()) -> Rows:
        """What can be computed before the first step of a run, and the memory that the run works in, for ``run_step``."""
        if self._problem is not None or not self._capturer.is_idle(self._device):
            return super().begin(tensors)
        with self._capturer.ordered(self._device):
            try:
                lease = before if isinstance(before, Lease) else self.graphs.memories.lend(self._owner, self._memory)
            except torch.OutOfMemoryError as error:
                self._give_up(error)
                return super().begin(tensors)
            if lease is None:
                self._say_full()
                return super().begin(tensors)
            memory = lease.memory
            self._follow_weights(memory)
            self._refresh_layouts()
            put([memory.inputs[k] for k in self._fixed], [tensors[k] for k in self._fixed])
            self._precompute(memory)
        return lease

    def run_step(
        self,
        step: int,
        tensors: Sequence[torch.Tensor],
        cache: Cache,
        rows: Rows = (),
        exact: bool = True,
    ) -> list[torch.Tensor]:
        """Run one step; see ``Executor.run_step``. With a lease in ``rows``, what it stores lies in the lease's memory."""
        if not isinstance(rows, Lease) or self._problem is not None or not self._capturer.is_idle(self._device):
            return super().run_step(step, tensors, cache, rows, exact)
        memory = rows.memory
        ready = self._ready.get(step) or self._prepare(step)
        values = ready.read(cache)
        with self._capturer.ordered(self._device):
            self._watch_weights(memory, step)
            if not exact:
                return self._unrecorded(memory, step, tensors, cache, rows)
            recorded = memory.steps.get(step)
            if recorded is None or not all(map(operator.is_, values, recorded.reads)):
                self._bring(memory, ready.slots, values)
                recorded = memory.steps.get(step)
            if recorded is None:
                try:
                    recorded = self._recorded(memory, step, ready)
                except BackendError as error:
                    self._give_up(error)
                    return super().run_step(step, tensors, cache, rows, exact)
            if ready.before is not None:  # Python that is in no recording: weights that changed are laid out again
                ready.before()
            put(recorded.places, [*map(tensors.__getitem__, recorded.given), *recorded.index])
            recorded.replay()
            outputs = [x.clone() for x in recorded.outputs]
        for slot, view in recorded.stores:
            cache[slot] = view
        for slot in ready.drop:
            del cache[slot]
        return outputs

    def _give_up(self, error: Exception) -> None:
        """Record nothing from here on, and say why."""
        self._problem = str(error)
        logger.warning("steps run one kernel after the other, not as CUDA graphs: %s", error)

    def _say_full(self) -> None:
        if not self._said_full:
            self._said_full = True
            logger.warning(
                "more than %d runs are in progress, each with memory of its own for CUDA graphs; further ones run their steps "
                "one kernel after the other. End runs that are abandoned (leave generation(), drop its object)",
                MOST_RUNS,
            )

    def _memory(self) -> StaticMemory:
        """Memory for one run."""
        program, parts = self.program, self.prologues.prologues
        once = parts.once.values if parts.once is not None else ()
        rows = parts.table.values if parts.table is not None and self.prologues.is_batched else ()
        value_of = {name: program.node(name).meta["val"] for name in (*once, *rows)}
        layout = assign_buffers(self.plan, lambda slot: value_bytes(self.node_of(slot)))
        with torch.inference_mode(False), torch.no_grad():  # it is written to in any mode
            return StaticMemory(
                inputs=blank_like(list(program.example.tensors.values()), self._device),
                once=dict(zip(once, blank_like([value_of[name] for name in once], self._device), strict=True)),
                table=self._table({name: value_of[name] for name in rows}),
                layout=layout,
                bytes=[torch.zeros(size, dtype=torch.uint8, device=self._device) for size in layout.sizes],
            )

    def _table(self, values: Mapping[str, torch.Tensor]) -> Table:
        return Table(values, len(self.plan.steps), self.coefficients, self._device)

    # When a run begins

    def _precompute(self, memory: StaticMemory) -> None:
        """Fill in what is precomputed, by a recording if that can be made."""
        if not memory.once and not memory.table.row:
            return

        def compute() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
            once, columns = self.prologues.compute(memory.inputs)
            places = [*map(memory.once.__getitem__, once), *map(memory.table.column, columns)]
            return places, [*once.values(), *columns.values()]

        def prepare() -> None:
            _, values = compute()
            put([torch.empty_like(x) for x in values], values)

        def fill() -> None:
            put(*compute())

        if "begin" not in memory.recorded:
            self.prologues.compute(memory.inputs)  # traced and compiled now, or found to have no batched form
            if memory.table.row and not self.prologues.is_batched:
                memory.table = self._table({})
            try:
                memory.recorded["begin"] = self._capturer.record(prepare, fill, self._device), (), ()
            except BackendError as error:  # something in it waits for the device, say; steps may be recorded all the same
                logger.info("what a run precomputes is not recorded: %s", error)
                memory.recorded["begin"] = fill, (), ()
        memory.recorded["begin"][0]()

    def _follow_weights(self, memory: StaticMemory) -> None:
        """Forget recordings of weights that lie elsewhere now; those that are recorded stay while the run may replay."""
        now = self._weights.now()
        if memory.weights is None or memory.weights.places != now.places:
            memory.forget_recordings()
            memory.weights = now
            memory.held = []
        if not memory.held:
            memory.held = [x.untyped_storage() for x in self._weights.weights]

    def _watch_weights(self, memory: StaticMemory, step: int) -> None:
        """The same for some of the weights, others in each step."""
        assert memory.weights is not None
        if self._weights.moved(memory.weights, step):
            self._follow_weights(memory)

    # Each step

    def _unrecorded(
        self, memory: StaticMemory, step: int, tensors: Sequence[torch.Tensor], cache: Cache, rows: Lease
    ) -> list[torch.Tensor]:
        """A step at a timestep that the table has no row for: run as it is, with its values left where others read them."""
        outputs = super().run_step(step, tensors, cache, rows, exact=False)
        for _, slot in self._ready[step].store:
            view = memory.place(slot, cache[slot])
            view.copy_(cache[slot])
            cache[slot] = view
        return outputs

    def _bring(self, memory: StaticMemory, slots: Sequence[Slot], values: Sequence[torch.Tensor]) -> None:
        """Copy cached values that lie elsewhere (of a step that was not replayed) to where recordings read them."""
        for slot, value in zip(slots, values, strict=True):
            view = memory.views[slot] if slot in memory.views else memory.place(slot, value)
            if view is not value:
                view.copy_(value)

    def _recorded(self, memory: StaticMemory, step: int, ready: Ready) -> _Recorded:
        """How a step is replayed. A recording is made unless a step with the same graph and the same buffers has one.

        Raises:
            BackendError: it cannot be recorded.
        """
        reads = tuple(memory.views[slot] for slot in ready.slots)
        where = (*(memory.layout.of[slot] for slot in ready.slots), -1, *(memory.layout.of[slot] for _, slot in ready.store))
        key = (self.plan.steps[step].key, where, tuple(view.stride() for view in reads))
        if key not in memory.recorded:
            memory.recorded[key] = self._record(memory, step, ready, reads)
        replay, outputs, forms = memory.recorded[key]
        stores = tuple((slot, memory.place(slot, form)) for (_, slot), form in zip(ready.store, forms, strict=True))
        given = self._given(ready)
        index = [memory.table.steps[step]] if memory.table else []
        places = [*map(memory.inputs.__getitem__, given), *([memory.table.index] if index else [])]
        made = _Recorded(replay, given, places, index, reads, stores, list(outputs))
        memory.steps[step] = made
        return made

    def _completes(self, ready: Ready) -> bool:
        """Whether a step computes its own row of the table."""
        return bool(ready.graph.precomputed) and self.prologues.completes

    def _given(self, ready: Ready) -> tuple[int, ...]:
        """Positions of the inputs that change from step to step and that a step reads."""
        read = {k for k, _ in ready.inputs}
        if self._completes(ready):
            read |= set(range(len(self.program.inputs)))
        return tuple(k for k in self._changing if k in read)

    def _record(
        self, memory: StaticMemory, step: int, ready: Ready, reads: Sequence[torch.Tensor]
    ) -> tuple[Callable[[], None], list[torch.Tensor], list[torch.Tensor]]:
        """A recording of a step, where it leaves its results, and the forms of the values that it stores."""
        graph, table = ready.graph, memory.table
        coefficients = table.coefficients_at(step)
        kept = [*range(graph.num_outputs), *(k for k, _ in ready.store)]

        def compute() -> list[torch.Tensor]:
            table.select()
            row: PrecomputedRow = {**memory.once, **table.row}
            if self._completes(ready):
                row = self.prologues.complete(row, memory.inputs)
            inputs, precomputed = [memory.inputs[k] for k in graph.inputs], [row[name] for name in graph.precomputed]
            results = ready.run(*inputs, *precomputed, *coefficients, *reads)
            return [results[k] for k in kept]

        def prepare() -> None:
            results = compute()
            put([torch.empty_like(x) for x in results], results)

        forms = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in compute()]
        outputs = [memory.output(k, forms[k], self._device) for k in range(graph.num_outputs)]
        stores = [memory.place(slot, form) for (_, slot), form in zip(ready.store, forms[graph.num_outputs :], strict=True)]

        def run() -> None:
            put([*outputs, *stores], compute())

        return self._capturer.record(prepare, run, self._device), outputs, forms[graph.num_outputs :]


def executor_of(plan: Plan, graphs: GraphStore) -> Executor:
    """What runs a plan's steps: by replaying recordings, if the backend makes them."""
    return ReplayingExecutor(plan, graphs, graphs.capturer) if graphs.capturer else Executor(plan, graphs)
