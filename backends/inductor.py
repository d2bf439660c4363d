"""Compile graphs with Inductor: C++ on a CPU, Triton on a GPU.

A graph goes to Inductor itself, with its weights as inputs, not through torch.compile: nothing is guarded at each call,
there is no recompile limit behind which graphs silently run eagerly, and what is compiled belongs to no model.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import operator
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx

from fxmask.passes.lift_weights import lift_weights
from fxmask.passes.split_regions import COMPILATION_NODES, Region, Vocabulary, is_view

logger = logging.getLogger(__name__)
BUDGET = 4.0  # regions have at most this many times the nodes of the largest step graph
compilations = 0  # by this process; tests count them
_counting = threading.Lock()


@functools.cache
def cpu_compiler_problem() -> str | None:
    """Why Inductor cannot compile C++ on this machine, or ``None`` if it can."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        return str(error).strip().splitlines()[0]
    except Exception as error:  # whatever else a broken toolchain raises: eager still works
        return f"{type(error).__name__}: {error}"
    return None


def can_compile(graph_module: fx.GraphModule) -> bool:
    """Whether Inductor works for this graph's device; warns if not."""
    on_cpu = all(p.device.type == "cpu" for p in list(graph_module.parameters()) + list(graph_module.buffers()))
    problem = cpu_compiler_problem() if on_cpu else None
    if problem is not None:
        warnings.warn(
            f"no working C++ compiler, so step graphs run eagerly: {problem}. "
            "Install g++ or clang, or set CXX, and accelerate again; or pass backend='eager' to silence this.",
            stacklevel=3,
        )
    return problem is None


class WholeGraphs:
    """Each step graph is one compilation, at its first call, for the shapes and memory layouts of that call.

    Without a C++ compiler a CPU graph runs eagerly, with a warning.
    """

    def learn(self, graph_modules: Sequence[fx.GraphModule]) -> None:
        """Nothing depends on other graphs."""

    def compile(self, graph_module: fx.GraphModule) -> Callable[..., Any]:
        """A callable that compiles at its first call."""
        if not can_compile(graph_module):
            return graph_module
        lifted, weights = lift_weights(graph_module)
        return Compiled(lifted, weights)


class Regions:
    """Step graphs in parts; equal parts, of whatever step graph, are one compilation."""

    def __init__(self) -> None:
        self._vocabulary = Vocabulary()
        self._compiled: dict[str, Compiled] = {}
        self._learned = False

    def learn(self, graph_modules: Sequence[fx.GraphModule]) -> None:
        """Choose the parts, so that compiling them costs about as much as ``BUDGET`` times the largest graph."""
        if not self._learned:
            largest = max(
                sum(node.op == "call_function" and not is_view(node) for node in g.graph.nodes) for g in graph_modules
            )
            self._vocabulary.learn(graph_modules, int(BUDGET * largest) + COMPILATION_NODES)
            self._learned = True

    def compile(self, graph_module: fx.GraphModule) -> Callable[..., Any]:
        """A callable whose parts compile at their first call."""
        if not can_compile(graph_module):
            return graph_module
        regions = self._vocabulary.split(graph_module)
        runs = [self._compiled.setdefault(r.key, Compiled(r.graph_module, ())) for r in regions]
        return schedule(graph_module, regions, runs)


def schedule(graph_module: fx.GraphModule, regions: Sequence[Region], runs: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
    """A function that calls the regions one after the other and frees what no later one reads.

    It is straight-line code, like what fx generates for a graph.
    """
    names = {node.name: f"v{k}" for k, node in enumerate(graph_module.graph.nodes)}
    placeholders = [node.name for node in graph_module.graph.find_nodes(op="placeholder")]
    weights = {n.name: operator.attrgetter(str(n.target))(graph_module) for n in graph_module.graph.find_nodes(op="get_attr")}
    end = next(iter(graph_module.graph.find_nodes(op="output")))
    results = [node.name for node in end.args[0]]
    last = {name: k for k, region in enumerate(regions) for name in (*region.outputs, *region.inputs)}
    last.update(dict.fromkeys([*results, *weights, *placeholders], len(regions)))
    lines = [f"def run({', '.join(names[name] for name in placeholders)}):"]
    for k, region in enumerate(regions):
        outputs, inputs = ([names[name] for name in part] for part in (region.outputs, region.inputs))
        lines.append(f"    {', '.join(outputs)}, = r{k}({', '.join(inputs)})")
        done = [names[name] for name in dict.fromkeys((*region.inputs, *region.outputs)) if last[name] == k]
        lines += [f"    del {', '.join(done)}"] if done else []
    lines.append(f"    return ({', '.join(names[name] for name in results)},)")
    scope: dict[str, Any] = {f"r{k}": run for k, run in enumerate(runs)}
    scope.update({names[name]: weight for name, weight in weights.items()})
    exec("\n".join(lines), scope)
    run: Any = scope["run"]
    run.parts = tuple(runs)
    return run  # type: ignore[no-any-return]


class Compiled:
    """A graph that is compiled when first called.

    Args:
        graph_module: without weights of its own.
        weights: its first arguments.
    """

    def __init__(self, graph_module: fx.GraphModule, weights: Sequence[torch.Tensor]) -> None:
        self._graph_module = graph_module
        self._weights = tuple(weights)
        self._run: Callable[..., Any] | None = None
        self._strides: list[tuple[int, ...]] = []
        self.code: list[str] = []  # what Inductor generated, where ``generated_code`` was active
        self._lock = threading.Lock()

    def __call__(self, *arguments: torch.Tensor) -> Any:
        """The graph's results for its arguments besides the weights."""
        if self._run is None:
            with self._lock:
                if self._run is None:
                    self._strides = [x.stride() for x in arguments]
                    with _collected(self.code):
                        self._run = compile_graph(self._graph_module, [*self._weights, *arguments])
        elif [x.stride() for x in arguments] != self._strides:
            arguments = tuple(map(restride, arguments, self._strides))
        return self._run(*self._weights, *arguments)


def restride(tensor: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """The tensor in the memory layout that a graph was compiled for."""
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def compile_graph(graph_module: fx.GraphModule, arguments: Sequence[torch.Tensor]) -> Callable[..., Any]:
    """Compile a graph for the shapes, types and layouts of these arguments."""
    global compilations
    with _counting:
        compilations += 1
    with torch.no_grad(), _quiet():
        artifact: Callable[..., Any] = torch._inductor.standalone_compile(
            graph_module, [x.detach() for x in arguments], dynamic_shapes="from_example_inputs"
        )
    return artifact


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """An artifact that cannot be saved to disk (caches switched off) is fine here."""
    log = logging.getLogger("torch._inductor.standalone_compile")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


_collecting: contextvars.ContextVar[bool] = contextvars.ContextVar("fxmask_collecting", default=False)


@contextlib.contextmanager
def generated_code() -> Iterator[None]:
    """Keep the code that Inductor generates inside; nothing is taken from its cache."""
    token = _collecting.set(True)
    try:
        with torch._inductor.config.patch(force_disable_caches=True):
            yield
    finally:
        _collecting.reset(token)


@contextlib.contextmanager
def _collected(code: list[str]) -> Iterator[None]:
    if not _collecting.get():
        yield
        return
    from torch._inductor.graph import GraphLowering

    with mock.patch.object(GraphLowering, "save_output_code", code.append):
        yield


def parts_of(run: Any) -> tuple[Compiled, ...]:
    """The compilations behind what a compiler of this module returned."""
    return (run,) if isinstance(run, Compiled) else tuple(getattr(run, "parts", ()))


def count_calls(code: str) -> tuple[int, int]:
    """How many generated kernels and how many library routines a generated module calls."""
    lines = code[code.find("def call(") :].splitlines()
    kernels = sum(bool(re.match(r"\s+(?:\w+ = )?(?:cpp_fused\w*\(|triton_\w+\.run\()", line)) for line in lines)
    externs = sum(bool(re.match(r"\s+(?:\w+ = )?(?:extern_kernels\.|torch\.ops\.|aten\.)", line)) for line in lines)
    return kernels, externs
