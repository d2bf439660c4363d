"""Executor: runs the steps of one plan. The only place where a plan's reads and writes touch real tensors.

It knows nothing of timesteps, lanes or generations. Several executors (plans of one mask that start at different steps)
share a ``GraphStore``, so that equal step graphs are compiled once.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm.auto import tqdm

from fxmask.backends import get_backend
from fxmask.backends.compiler import Compiler, StageCompiler
from fxmask.backends.inductor import restride
from fxmask.mask import Plan, Slot
from fxmask.passes.specialize import StepGraph, forecast_coefficients, specialize_step
from fxmask.passes.split_regions import JOIN, KEPT, joins
from fxmask.passes.stage_values import Prologue, Staging, batch_steps, stage
from fxmask.program import Program

logger = logging.getLogger(__name__)

Cache = MutableMapping[Slot, torch.Tensor]


class GraphStore:
    """The step graphs of one program, specialised and compiled when first needed.

    Args:
        program: the captured denoiser.
        backend: name of a backend.
        mode: of the backend; ``None`` for its default.
        compiler: of the backend, if there is one already.

    Raises:
        BackendError: there is no such backend, or no such mode.
    """

    def __init__(self, program: Program, backend: str, mode: str | None = None, compiler: Compiler | None = None) -> None:
        self.program = program
        self._exact = get_backend(backend).exact
        self.compiler = compiler or get_backend(backend).compiler(mode)
        self._graphs: dict[Any, tuple[StepGraph, Callable[..., Any]]] = {}
        self._stages: dict[tuple[float, ...], Stages] = {}
        self._lock = threading.RLock()

    def get(self, plan: Plan, step: int) -> tuple[StepGraph, Callable[..., Any]]:
        """The graph of a step, and the callable that a backend made of it."""
        key = plan.steps[step].key
        if key not in self._graphs:
            with self._lock:
                if key not in self._graphs:
                    self._specialize(plan)
        return self._graphs[key]

    def prepare(self, plan: Plan) -> None:
        """Specialise all step graphs of a plan now; each is compiled at its first call."""
        with self._lock:
            self._specialize(plan)

    @functools.cached_property
    def _joins(self) -> frozenset[str]:
        return joins(self.program)

    def _specialize(self, plan: Plan) -> None:
        """The graphs of a plan that are not there yet."""
        marks: dict[str, list[str]] = {name: [JOIN] for name in self._joins}
        for slot in {slot for step in plan.steps for load in step.formed for slot in load.slots}:
            marks.setdefault(self.program.block(slot.block).values[slot.value], []).append(KEPT)
        made = {}
        for key in dict.fromkeys(step.key for step in plan.steps if step.graph >= 0):
            if key not in self._graphs:
                steps = [i for i, step in enumerate(plan.steps) if step.graph >= 0 and step.key == key]
                made[key] = specialize_step(self.program, plan, steps, self.stages(plan).staging.sources, marks)
        self.compiler.learn([graph.graph_module for graph in made.values()])
        for key, graph in made.items():
            self._graphs[key] = graph, self.compiler.compile(graph.graph_module)

    def stages(self, plan: Plan) -> Stages:
        """What runs outside the steps of a plan."""
        timesteps = plan.mask.timesteps
        if timesteps not in self._stages:
            with self._lock:
                if timesteps not in self._stages:
                    compiler = self.compiler if isinstance(self.compiler, StageCompiler) else None
                    self._stages[timesteps] = Stages(self.program, timesteps, not self._exact, compiler)
        return self._stages[timesteps]

    def __len__(self) -> int:
        return len(self._graphs)


Row = Mapping[str, torch.Tensor]  # staged values of one step, by name


class Stages:
    """Computes the staged values of a generation.

    Args:
        program: the captured denoiser.
        timesteps: of the plan.
        batched: compute the table's rows for all steps in one go, which differs from the program by rounding.
        compiler: of what runs once per generation; without one it runs operator by operator.
    """

    def __init__(
        self, program: Program, timesteps: Sequence[float], batched: bool, compiler: StageCompiler | None = None
    ) -> None:
        self.program = program
        self.staging: Staging = stage(program, len(timesteps))
        self._compiler = compiler
        if compiler and self.staging.once and self.staging.once.inputs:  # what needs only weights is too little
            once = replace(self.staging.once, compiled=compiler.compile(self.staging.once.graph_module))
            self.staging = replace(self.staging, once=once)
        self._timesteps = timesteps
        self._wanted = batched
        self._batched: Callable[..., list[torch.Tensor]] | None = None
        self._steps: torch.Tensor | None = None

    def begin(self, tensors: Sequence[torch.Tensor]) -> list[Row]:
        """The staged values that can be had before the first step: one row per step, or none if there are none.

        Args:
            tensors: the program's inputs; which timestep is in them does not matter.
        """
        staging = self.staging
        once = staging.once(tensors, {}) if staging.once else {}
        if staging.table is None or not self._wanted:
            return [once] * len(self._timesteps) if once else []
        try:
            columns = self._columns(staging.table, tensors, once)
        except Exception:  # an operator that has no batched form
            logger.warning("the timestep's values are computed at each step", exc_info=True)
            self._wanted = False
            return self.begin(tensors)
        return [{**once, **dict(zip(staging.table.values, row, strict=True))} for row in zip(*columns, strict=True)]

    def complete(self, row: Row, tensors: Sequence[torch.Tensor]) -> Row:
        """The row with what was not had before this step."""
        table = self.staging.table
        missing = table is not None and table.values[0] not in row
        return {**row, **table(tensors, dict(row))} if table is not None and missing else row

    def at(self, tensors: Sequence[torch.Tensor]) -> Row:
        """The staged values of a call that stands alone."""
        return self.staging.at(tensors)

    def _columns(self, table: Prologue, tensors: Sequence[torch.Tensor], once: dict[str, torch.Tensor]) -> list[Any]:
        """One sequence of T tensors per value of the table."""
        name = self.program.signature.timestep
        assert name is not None
        position = self.program.inputs.index(name)
        if self._steps is None:
            like = tensors[position]
            steps = torch.tensor(self._timesteps, dtype=torch.float64).to(like.dtype).to(like.device)
            self._steps = steps.reshape(-1, *(1,) * like.dim()).expand(-1, *like.shape).contiguous()
        if self._batched is None:
            compiler = self._compiler.compile_batched if self._compiler else None
            self._batched = batch_steps(table, position, self._steps, tensors, once, compiler)
        values = self._batched(self._steps, tensors, once)
        wanted = [self.program.node(node).meta["val"] for node in table.values]
        return [_like(value, meta).unbind(0) for value, meta in zip(values, wanted, strict=True)]


def _like(rows: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
    """Rows in memory as the program would have each of them."""
    sizes, strides = tuple(map(int, meta.shape)), tuple(map(int, meta.stride()))
    if tuple(rows.shape[1:]) == sizes and tuple(rows.stride()[1:]) == strides:
        return rows
    return torch.stack([torch.empty_strided(sizes, strides, dtype=x.dtype, device=x.device).copy_(x) for x in rows])


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
        self._coefficients: dict[int, list[torch.Tensor]] = {}
        self._layouts = [_dense_strides(x) for x in self.program.example.tensors.values()]

    def begin(self, tensors: Sequence[torch.Tensor]) -> list[Row]:
        """What can be computed before the first step of a run, for ``run_step``."""
        return self.graphs.stages(self.plan).begin(tensors)

    def run_full(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs of the unmasked program; no cache is read or written."""
        return self.run_step(self.plan.start, tensors, {})

    def run_step(
        self, step: int, tensors: Sequence[torch.Tensor], cache: Cache, rows: Sequence[Row] = ()
    ) -> list[torch.Tensor]:
        """Run one step: read what it loads from ``cache``, store what it must, drop what nobody reads again.

        ``cache`` changes only after the graph has run, so that a failing step leaves it as it was.

        Args:
            step: number of the step.
            tensors: the program's inputs, in order.
            cache: of one lane.
            rows: from ``begin`` with the same conditioning; without them the call stands alone.

        Raises:
            KeyError: a slot is missing; the steps were not run in order.
        """
        plan = self.plan.steps[step]
        graph, run = self.graphs.get(self.plan, step)
        arguments = [restride(tensors[k], self._layouts[k]) for k in graph.inputs]
        if graph.staged:
            stages = self.graphs.stages(self.plan)
            row = stages.complete(rows[step], tensors) if rows else stages.at(tensors)
            arguments.extend(row[name] for name in graph.staged)
        if graph.coefficients:
            arguments.extend(self._forecast_coefficients(step, graph))
        arguments.extend(cache[slot] for load in plan.formed for slot in load.slots)
        results = run(*arguments)
        for (block, value), tensor in zip(graph.store, results[graph.num_outputs :], strict=True):
            if (block, value) in plan.store:
                cache[Slot(block, value, step)] = _compact(tensor)
        for slot in plan.drop:
            del cache[slot]
        return list(results[: graph.num_outputs])

    def compile_all(self, progress: bool) -> None:
        """Compile every distinct graph now, by running it once on the captured call with blank caches."""
        tensors = list(self.program.example.tensors.values())
        rows = self.begin(tensors)
        first = {step.graph: i for i, step in reversed(list(enumerate(self.plan.steps))) if step.graph >= 0}
        for step in tqdm(sorted(first.values()), desc="compiling step graphs", unit="graph", disable=not progress):
            slots = {slot for load in self.plan.steps[step].formed for slot in load.slots} | set(self.plan.steps[step].drop)
            self.run_step(step, tensors, {slot: self._blank(slot) for slot in slots}, rows)

    def _blank(self, slot: Slot) -> torch.Tensor:
        """A cached value like ``run_step`` would store, filled with zeros."""
        value = self.program.node(self.program.block(slot.block).values[slot.value]).meta["val"]
        sizes, strides = tuple(map(int, value.shape)), tuple(map(int, value.stride()))
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device).zero_()

    def _forecast_coefficients(self, step: int, graph: StepGraph) -> list[torch.Tensor]:
        if step not in self._coefficients:
            loads = [self.plan.steps[step].formed[k] for k in graph.coefficients]
            nodes = [self.program.node(self.program.block(x.block).values[x.value]) for x in loads]
            tables = [forecast_coefficients(x, node.meta["val"]) for x, node in zip(loads, nodes, strict=True)]
            self._coefficients[step] = tables
        return self._coefficients[step]


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in storage of its own size: a compiler may have placed it inside a larger buffer."""
    if tensor.untyped_storage().nbytes() > 2 * tensor.numel() * tensor.element_size() + 64:
        return tensor.clone()
    return tensor


def _dense_strides(example: torch.Tensor) -> tuple[int, ...]:
    """Strides that compiled graphs expect of an input: those of the captured call, or contiguous if these overlap."""
    dense = torch.empty_like(example, device="meta")  # keeps strides where they are dense
    return tuple(dense.stride())
