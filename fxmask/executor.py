"""Executor: runs the steps of one plan. The only place where a plan's reads and writes touch real tensors.

It knows nothing of timesteps, lanes or generations. Several executors (plans of one mask that start at different steps)
share a ``GraphStore``, so that equal step graphs are compiled once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from fxmask.backends import get_backend
from fxmask.mask import Plan, Slot
from fxmask.passes.specialize import StepGraph, forecast_coefficients, specialize_step
from fxmask.program import Program

Cache = MutableMapping[Slot, torch.Tensor]


class GraphStore:
    """The step graphs of one program, specialised and compiled when first needed.

    Args:
        program: the captured denoiser.
        backend: name of a backend.

    Raises:
        BackendError: there is no such backend.
    """

    def __init__(self, program: Program, backend: str) -> None:
        self.program = program
        self._compile = get_backend(backend)
        self._graphs: dict[Any, tuple[StepGraph, Callable[..., Any]]] = {}
        self._lock = threading.Lock()

    def get(self, plan: Plan, step: int) -> tuple[StepGraph, Callable[..., Any]]:
        """The graph of a step, and the callable that a backend made of it."""
        key = plan.steps[step].key
        if key not in self._graphs:
            with self._lock:
                if key not in self._graphs:
                    steps = [i for i, other in enumerate(plan.steps) if other.graph == plan.steps[step].graph]
                    graph = specialize_step(self.program, plan, steps)
                    self._graphs[key] = graph, self._compile(graph.graph_module)
        return self._graphs[key]

    def __len__(self) -> int:
        return len(self._graphs)


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
        self._coefficients: dict[int, torch.Tensor | None] = {}

    def run_full(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs of the unmasked program; no cache is read or written."""
        return self.run_step(self.plan.start, tensors, {})

    def run_step(self, step: int, tensors: Sequence[torch.Tensor], cache: Cache) -> list[torch.Tensor]:
        """Run one step: read what it loads from ``cache``, store what it must, drop what nobody reads again.

        ``cache`` changes only after the graph has run, so that a failing step leaves it as it was.

        Args:
            step: number of the step.
            tensors: the program's inputs, in order.
            cache: of one lane.

        Raises:
            KeyError: a slot is missing; the steps were not run in order.
        """
        plan = self.plan.steps[step]
        graph, run = self.graphs.get(self.plan, step)
        arguments = [tensors[k] for k in graph.inputs]
        if graph.coefficients:
            arguments.append(self._coefficient_table(step))
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
        first = {step.graph: i for i, step in reversed(list(enumerate(self.plan.steps))) if step.graph >= 0}
        for step in tqdm(sorted(first.values()), desc="compiling step graphs", unit="graph", disable=not progress):
            slots = {slot for load in self.plan.steps[step].formed for slot in load.slots} | set(self.plan.steps[step].drop)
            self.run_step(step, tensors, {slot: self._blank(slot) for slot in slots})

    def _blank(self, slot: Slot) -> torch.Tensor:
        """A cached value like ``run_step`` would store, filled with zeros."""
        value = self.program.node(self.program.block(slot.block).values[slot.value]).meta["val"]
        sizes, strides = tuple(map(int, value.shape)), tuple(map(int, value.stride()))
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device).zero_()

    def _coefficient_table(self, step: int) -> torch.Tensor:
        if step not in self._coefficients:
            self._coefficients[step] = forecast_coefficients(self.program, self.plan.steps[step].formed)
        table = self._coefficients[step]
        assert table is not None
        return table


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in storage of its own size: a compiler may have placed it inside a larger buffer."""
    if tensor.untyped_storage().nbytes() > 2 * tensor.numel() * tensor.element_size() + 64:
        return tensor.clone()
    return tensor
