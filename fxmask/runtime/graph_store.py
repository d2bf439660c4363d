"""The step graphs of one program, specialised and compiled when first needed."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from fxmask.backends import get_backend
from fxmask.backends.protocol import Compiler, PrologueCompiler
from fxmask.ir.plan import Plan
from fxmask.ir.program import Program
from fxmask.passes.specialize import specialize_step
from fxmask.passes.split_regions import JOIN, KEPT, joins
from fxmask.passes.step_graph import StepGraph
from fxmask.runtime.compile_bar import CompileBar
from fxmask.runtime.prologues import PrologueRunner
from fxmask.runtime.static_memory import Memories


class GraphStore:
    """The step graphs of one program, specialised and compiled when first needed.

    Args:
        program: the captured denoiser.
        backend: name of a backend.
        mode: of the backend; ``None`` for its default.
        compiler: of the backend, if there is one already.

    Raises:
        BackendError: there is no such backend, no such mode, or the backend cannot work where the program is.

    Attributes:
        capturer: records steps, to be replayed; ``None`` if each is called.
        memories: that recorded steps work in.
        bar: shown while step graphs compile.
    """

    def __init__(self, program: Program, backend: str, mode: str | None = None, compiler: Compiler | None = None) -> None:
        self.program = program
        chosen = get_backend(backend)
        self._exact = chosen.exact
        self.compiler = compiler or chosen.compiler(mode)
        self.capturer = chosen.capturer_for(program.example.sample.device)
        self.memories = Memories()
        self.bar = CompileBar()
        self._graphs: dict[Any, tuple[StepGraph, Callable[..., Any]]] = {}
        self._prologues: dict[tuple[float, ...], PrologueRunner] = {}
        self._lock = threading.RLock()

    def get(self, plan: Plan, step: int) -> tuple[StepGraph, Callable[..., Any]]:
        """The graph of a step, and the callable that a backend made of it."""
        key = plan.steps[step].key
        if key not in self._graphs:
            with self._lock:
                if key not in self._graphs:
                    self._specialize(plan)
        return self._graphs[key]

    def first_call(self, plan: Plan, step: int, run: Callable[..., Any]) -> Callable[..., Any]:
        """``run`` of a step, which compiles when it is called for the first time; the bar shows that."""
        return run if self._exact else self.bar.first_call(plan.steps[step].key, keys_of(plan), run)

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
        for key in keys_of(plan):
            if key not in self._graphs:
                steps = [i for i, step in enumerate(plan.steps) if step.graph >= 0 and step.key == key]
                made[key] = specialize_step(self.program, plan, steps, self.prologue_runner(plan).prologues.sources, marks)
        self.compiler.prepare([graph.graph_module for graph in made.values()])
        for key, graph in made.items():
            self._graphs[key] = graph, self.compiler.compile(graph.graph_module)

    def prologue_runner(self, plan: Plan) -> PrologueRunner:
        """What runs outside the steps of a plan."""
        timesteps = plan.timesteps
        if timesteps not in self._prologues:
            with self._lock:
                if timesteps not in self._prologues:
                    compiler = self.compiler if isinstance(self.compiler, PrologueCompiler) else None
                    self._prologues[timesteps] = PrologueRunner(self.program, timesteps, not self._exact, compiler)
        return self._prologues[timesteps]

    def __len__(self) -> int:
        return len(self._graphs)


def keys_of(plan: Plan) -> list[Any]:
    """What tells the distinct step graphs of a plan apart, in order."""
    return list(dict.fromkeys(step.key for step in plan.steps if step.graph >= 0))
