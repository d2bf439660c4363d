"""How long each part of a denoiser takes on this machine, as prices of graph nodes: what ``cost="latency"`` spends.

MACs say how fast a plan could be; a convolution at high resolution and a matrix product of as many MACs take different
times. The graph is cut where branches join their streams, each distinct part is compiled as the backend will compile it and
timed on real values, and the time of a part is divided among its nodes in proportion to what each takes on its own. A step
then costs the sum over its live nodes, as with MACs, so that liveness prices every set of blocks. What does not depend on the
sample is left out of both sides (``per_step``): it is computed for all steps at once, whatever the mask is, and is no saving of
the mask's.

On a GPU, seconds are those of the kernels alone, which launching runs ahead of: what a step of large batches takes, and of any
batch with CUDA graphs. A small batch without these takes longer, for launches.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from fxmask.backends import get_backend
from fxmask.backends.inductor import Compiled, can_compile, strides_of
from fxmask.backends.layouts import Layouts
from fxmask.frontend.modules import module_device
from fxmask.ir.graph import attribute, is_view
from fxmask.ir.program import Program
from fxmask.learning.stopwatch import Stopwatch, stopwatch_for
from fxmask.passes.binding_times import BindingTime, binding_times
from fxmask.passes.split_regions import Region, build_regions, joins

REPEATS = 7


@torch.no_grad()
def measure_latency(program: Program, backend: str = "auto", repeats: int = REPEATS) -> dict[str, float]:
    """Seconds of every node of a program's graph, at the captured shapes, by node name.

    Args:
        program: the captured denoiser, with weights.
        backend: ``"eager"``, or any other: parts are compiled by Inductor.
        repeats: each part is timed in so many sweeps over the graph; medians count.

    Raises:
        CaptureError: the program was captured without weights.
        BackendError: unknown backend.
    """
    program.require_verified()
    get_backend(backend)
    module = program.graph_module
    compiles = backend != "eager" and can_compile(module)
    laid_out = Layouts().apply(module) if compiles else module  # weights of convolutions, as the backend has them on a GPU
    regions, segments = _parts(laid_out, joins(program))
    values: dict[str, Any] = dict(zip(_placeholders(module), program.example.tensors.values(), strict=True))
    for node in laid_out.graph.find_nodes(op="get_attr"):
        values[node.name] = attribute(laid_out, node)
    runs: dict[str, Callable[..., Any]] = {}
    for region in regions:
        strides = strides_of(region.graph_module) if laid_out is not module else None
        runs.setdefault(region.key, Compiled(region.graph_module, (), strides) if compiles else region.graph_module)
    stopwatch = stopwatch_for(module_device(module))
    alone = _alone(laid_out, values, stopwatch)
    taken: dict[str, list[float]] = {key: [] for key in runs}
    for sweep in range(repeats + 1):  # the first one compiles
        held = dict(values)
        for region in regions:
            results = stopwatch.time(runs[region.key], *(held[name] for name in region.inputs))
            held.update(zip(region.outputs, results, strict=True))
        for region, seconds in zip(regions, stopwatch.seconds(), strict=True):
            if sweep:
                taken[region.key].append(seconds)
    prices = dict.fromkeys((node.name for node in module.graph.nodes), 0.0)
    for region, segment in zip(regions, segments, strict=True):
        segment = [node for node in segment if node.name in prices]  # without what brings results into their layout
        total = sum(alone[node] for node in segment)
        for node in segment:
            prices[node.name] = statistics.median(taken[region.key]) * (alone[node] / total if total else 1 / len(segment))
    return prices


def per_step(program: Program, prices: Mapping[str, float]) -> dict[str, float]:
    """Prices without what is computed for all steps at once: values of timestep and conditioning."""
    times = {node.name: time for node, time in binding_times(program).items()}
    return {name: price if times[name] & BindingTime.SAMPLE else 0.0 for name, price in prices.items()}


def _parts(module: fx.GraphModule, ends: frozenset[str]) -> tuple[list[Region], list[list[fx.Node]]]:
    """The regions of the whole graph, which end at ``ends``, and the nodes of each; without those that hand nothing on."""
    segments: list[list[fx.Node]] = [[]]
    for node in module.graph.nodes:
        if node.op == "call_function":
            segments[-1].append(node)
            if node.name in ends:
                segments.append([])
    home = {node.name: k for k, segment in enumerate(segments) for node in segment}
    regions = build_regions(module, [tuple(s) for s in segments if s])
    return regions, [segments[home[region.outputs[0]]] for region in regions]


def _placeholders(module: fx.GraphModule) -> list[str]:
    return [node.name for node in module.graph.find_nodes(op="placeholder")]


def _alone(module: fx.GraphModule, values: Mapping[str, Any], stopwatch: Stopwatch) -> dict[fx.Node, float]:
    """Seconds of each node run as an operator of its own; views are free."""
    taken: dict[fx.Node, list[float]] = {}
    for _ in range(3):
        sweep = _Sweep(module, stopwatch)
        sweep.run(*(values[name] for name in _placeholders(module)))
        for node, seconds in zip(sweep.timed, stopwatch.seconds(), strict=True):
            taken.setdefault(node, []).append(0.0 if is_view(node) else seconds)
    return {node: statistics.median(seconds) for node, seconds in taken.items()}


class _Sweep(fx.Interpreter):
    """Runs a graph operator by operator, each timed."""

    def __init__(self, module: fx.GraphModule, stopwatch: Stopwatch) -> None:
        super().__init__(module)
        self.timed: list[fx.Node] = []
        self._stopwatch = stopwatch

    def run_node(self, n: fx.Node) -> Any:
        """One node."""
        if n.op != "call_function":
            return super().run_node(n)
        self.timed.append(n)
        return self._stopwatch.time(super().run_node, n)
