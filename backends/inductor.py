"""Compile graphs with Inductor: C++ on a CPU, Triton on a GPU.

A graph goes to Inductor itself, with its weights as inputs, not through torch.compile: nothing is guarded at each call,
there is no recompile limit behind which graphs silently run eagerly, and what is compiled belongs to no model.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxmask._torch import STANDALONE_LOGGER, inductor_compile, quiet_loggers, tracing
from fxmask.backends.generated_code import collected_code
from fxmask.backends.layouts import Layouts
from fxmask.backends.straight_line import chain_regions, restride
from fxmask.backends.toolchain import cpu_compiler_problem, gpu_compiler_problem
from fxmask.ir.graph import is_view, placeholders
from fxmask.passes.lift_weights import lift_weights
from fxmask.passes.merge_regions import COMPILATION_NODES, Vocabulary

logger = logging.getLogger(__name__)
CPU_REMEDY = "Install g++ or clang, or set CXX, and accelerate again"
BUDGET = 4.0  # regions have at most this many times the nodes of the largest step graph
compilations = 0  # by this process; tests count them
_counting = threading.Lock()


def can_compile(graph_module: fx.GraphModule) -> bool:
    """Whether Inductor works for this graph's device; warns if not, once for the graphs of a compiler."""
    device = device_type(graph_module)
    if device == "cpu":
        problem = cpu_compiler_problem()
        why = problem and f"no working C++ compiler, so step graphs run eagerly: {problem}. {CPU_REMEDY}"
    elif device == "cuda":
        problem = gpu_compiler_problem()
        why = problem and f"Triton cannot compile here, so step graphs run eagerly: {problem}, and accelerate again"
    elif device == "meta":  # has no values to run on
        why = None
    else:
        why = (
            f"step graphs have not been compiled on a device of type {device!r} yet, only on CPUs and NVIDIA GPUs (cuda), so "
            "they run eagerly, which skips the same blocks"
        )
    if why:
        warnings.warn(f"{why}; or pass backend='eager' to silence this.", stacklevel=3)
    return not why


def device_type(graph_module: fx.GraphModule) -> str:
    """What a graph runs on, by its weights and arguments; numbers may lie on the CPU beside a GPU's tensors."""
    values = [node.meta.get("val") for node in placeholders(graph_module.graph)]
    tensors = [*graph_module.parameters(), *graph_module.buffers(), *(x for x in values if isinstance(x, torch.Tensor))]
    return next((x.device.type for x in tensors if x.device.type != "cpu"), "cpu")


class _Compiles:
    """What compilers of this module share: without a compiler for their device, graphs run eagerly, with one warning."""

    def __init__(self) -> None:
        self.layouts = Layouts()
        self._works: bool | None = None

    def compiles(self, graph_module: fx.GraphModule) -> bool:
        """``can_compile``, asked once: all graphs of a program are on one device."""
        if self._works is None:
            self._works = can_compile(graph_module)
        return self._works

    def compile_once(self, graph_module: fx.GraphModule) -> Callable[..., Any]:
        """A callable that computes what a graph that is no step's computes, once per run.

        On a GPU it is compiled: each of its many operators would be a launch of its own. On a CPU compiling takes longer than
        it saves in hundreds of images, so that it runs operator by operator.
        """
        if device_type(graph_module) != "cuda" or not self.compiles(graph_module):
            return graph_module
        return Compiled(*lift_weights(graph_module))

    def compile_batched(self, row: fx.GraphModule, num_steps: int, trace: Callable[[], fx.GraphModule]) -> Callable[..., Any]:
        """The same for ``trace()``, which is ``row`` for all steps at once."""
        traced = trace()
        return Compiled(traced, ()) if device_type(row) == "cuda" and self.compiles(row) else traced


class WholeGraphs(_Compiles):
    """Each step graph is one compilation, at its first call, for the shapes and memory layouts of that call."""

    def prepare(self, graph_modules: Sequence[fx.GraphModule]) -> None:
        """Nothing depends on other graphs."""

    def compile(self, graph_module: fx.GraphModule) -> Callable[..., Any]:
        """A callable that compiles at its first call."""
        if not self.compiles(graph_module):
            return graph_module
        laid_out = self.layouts.apply(graph_module)
        lifted, weights = lift_weights(laid_out)
        if laid_out is graph_module:
            return Compiled(lifted, weights)
        return following(self.layouts, Compiled(lifted, weights, strides_of(laid_out)))


class Regions(_Compiles):
    """Step graphs in parts; equal parts, of whatever step graph, are one compilation."""

    def __init__(self) -> None:
        super().__init__()
        self._vocabulary = Vocabulary()
        self._compiled: dict[str, Compiled] = {}
        self._prepared = False

    def prepare(self, graph_modules: Sequence[fx.GraphModule]) -> None:
        """Choose the parts, so that compiling them costs about as much as ``BUDGET`` times the largest graph."""
        if not self._prepared and graph_modules and self.compiles(graph_modules[0]):
            largest = max(
                sum(node.op == "call_function" and not is_view(node) for node in g.graph.nodes) for g in graph_modules
            )
            laid_out = [self.layouts.apply(g) for g in graph_modules]
            self._vocabulary.choose_merges(laid_out, int(BUDGET * largest) + COMPILATION_NODES)
            self._prepared = True

    def compile(self, graph_module: fx.GraphModule) -> Callable[..., Any]:
        """A callable whose parts compile at their first call."""
        if not self.compiles(graph_module):
            return graph_module
        laid_out = self.layouts.apply(graph_module)
        regions = self._vocabulary.split(laid_out)
        declared = laid_out is not graph_module
        runs = [
            self._compiled.setdefault(r.key, Compiled(r.graph_module, (), strides_of(r.graph_module) if declared else None))
            for r in regions
        ]
        run = chain_regions(laid_out, regions, runs)
        return following(self.layouts, run) if declared else run


class Compiled:
    """A graph that is compiled when first called.

    Args:
        graph_module: without weights of its own.
        weights: its first arguments.
        strides: that its other arguments are compiled for; those of the first call if not given.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        weights: Sequence[torch.Tensor],
        strides: Sequence[tuple[int, ...]] | None = None,
    ) -> None:
        self.graph_module = graph_module
        self._weights = tuple(weights)
        self._run: Callable[..., Any] | None = None
        self._declared = strides
        self._strides: list[tuple[int, ...]] = []
        self.code: list[str] = []  # what Inductor generated, where ``generated_code`` was active
        self._lock = threading.Lock()

    def __call__(self, *arguments: torch.Tensor) -> Any:
        """The graph's results for its arguments besides the weights."""
        if self._run is None:
            with self._lock:
                if self._run is None:
                    self._strides = list(self._declared or [x.stride() for x in arguments])
                    arguments = tuple(map(restride, arguments, self._strides))
                    with tracing(), collected_code(self.code):
                        self._run = compile_graph(self.graph_module, [*self._weights, *arguments])
        elif [x.stride() for x in arguments] != self._strides:
            arguments = tuple(map(restride, arguments, self._strides))
        return self._run(*self._weights, *arguments)


def compile_graph(graph_module: fx.GraphModule, arguments: Sequence[torch.Tensor]) -> Callable[..., Any]:
    """Compile a graph for the shapes, types and layouts of these arguments."""
    global compilations
    with _counting:
        compilations += 1
    # an artifact that cannot be saved to disk (caches switched off) is fine here, and is reported as an error
    with tracing(), torch.no_grad(), quiet_loggers(STANDALONE_LOGGER):
        return inductor_compile(graph_module, [x.detach() for x in arguments])


def strides_of(graph_module: fx.GraphModule) -> list[tuple[int, ...]]:
    """Of a graph's arguments, as noted down."""
    return [tuple(map(int, node.meta["val"].stride())) for node in placeholders(graph_module.graph)]


def following(layouts: Layouts, run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` after weights that changed are laid out again. Who records it calls its ``before`` in front of each replay."""

    def follow_and_run(*arguments: torch.Tensor) -> Any:
        layouts.follow()
        return run(*arguments)

    made: Any = follow_and_run
    made.parts = parts_of(run)
    made.before = layouts.follow
    return follow_and_run


def parts_of(run: Any) -> tuple[Compiled, ...]:
    """The compilations behind what a compiler of this module returned."""
    return (run,) if isinstance(run, Compiled) else tuple(getattr(run, "parts", ()))
