"""How long each part of a denoiser takes on this machine, as prices of graph nodes: what ``cost="latency"`` spends.

MACs say how fast a plan could be; a convolution at high resolution and a matrix product of as many MACs take different
times. The graph is cut where branches join their streams, each distinct part is compiled as the backend will compile it and
timed on real values, and the time of a part is divided among its nodes in proportion to what each takes on its own. A step
then costs the sum over its live nodes, as with MACs, so that liveness prices every set of blocks. What does not depend on the
sample is left out of both sides (``per_step``): it is computed for all steps at once, whatever the mask is, and is no saving of
the mask's.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from fxmask.backends import get_backend
from fxmask.backends.inductor import Compiled, can_compile
from fxmask.ir.graph import attribute, is_view
from fxmask.ir.program import Program
from fxmask.passes.binding_times import BindingTime, binding_times
from fxmask.passes.split_regions import Region, build_regions, joins
from fxmask.timing import timed

REPEATS = 7


@torch.no_grad()
def measure_latency(program: Program, backend: str = "auto", repeats: int = REPEATS) -> dict[str, float]:
    """Seconds of every node of a program's graph, at the captured shapes, by node name.

    Args:
        program: the captured denoiser, with weights.
        backend: ``"eager"``, or any other: parts are compiled by Inductor. CUDA graphs save launches besides, which all
            parts pay alike.
        repeats: each part is timed in so many sweeps over the graph; medians count.

    Raises:
        CaptureError: the program was captured without weights.
        BackendError: unknown backend.
    """
    program.require_verified()
    get_backend(backend)
    module = program.graph_module
    regions, segments = _parts(program)
    values: dict[str, Any] = dict(zip(_placeholders(module), program.example.tensors.values(), strict=True))
    for node in module.graph.find_nodes(op="get_attr"):
        values[node.name] = attribute(module, node)
    compiles = backend != "eager" and can_compile(module)
    runs: dict[str, Callable[..., Any]] = {}
    for region in regions:
        runs.setdefault(region.key, Compiled(region.graph_module, ()) if compiles else region.graph_module)
    alone = _alone(module, values)
    taken: dict[str, list[float]] = {key: [] for key in runs}
    for sweep in range(repeats + 1):  # the first one compiles
        held = dict(values)
        for region in regions:
            seconds, results = timed(runs[region.key], *(held[name] for name in region.inputs))
            if sweep:
                taken[region.key].append(seconds)
            held.update(zip(region.outputs, results, strict=True))
    prices = dict.fromkeys((node.name for node in module.graph.nodes), 0.0)
    for region, segment in zip(regions, segments, strict=True):
        total = sum(alone[node] for node in segment)
        for node in segment:
            prices[node.name] = statistics.median(taken[region.key]) * (alone[node] / total if total else 1 / len(segment))
    return prices


def per_step(program: Program, prices: Mapping[str, float]) -> dict[str, float]:
    """Prices without what is computed for all steps at once: values of timestep and conditioning."""
    times = {node.name: time for node, time in binding_times(program).items()}
    return {name: price if times[name] & BindingTime.SAMPLE else 0.0 for name, price in prices.items()}


def _parts(program: Program) -> tuple[list[Region], list[list[fx.Node]]]:
    """The regions of the whole graph, and the nodes of each. Those that hand nothing on are left out."""
    ends = joins(program)
    segments: list[list[fx.Node]] = [[]]
    for node in program.graph_module.graph.nodes:
        if node.op == "call_function":
            segments[-1].append(node)
            if node.name in ends:
                segments.append([])
    home = {node.name: k for k, segment in enumerate(segments) for node in segment}
    regions = build_regions(program.graph_module, [tuple(s) for s in segments if s])
    return regions, [segments[home[region.outputs[0]]] for region in regions]


def _placeholders(module: fx.GraphModule) -> list[str]:
    return [node.name for node in module.graph.find_nodes(op="placeholder")]


def _alone(module: fx.GraphModule, values: Mapping[str, Any]) -> dict[fx.Node, float]:
    """Seconds of each node run as an operator of its own; views are free."""
    sweeps = [_Sweep(module) for _ in range(3)]
    for sweep in sweeps:
        sweep.run(*(values[name] for name in _placeholders(module)))
    return {node: statistics.median(sweep.seconds[node] for sweep in sweeps) for node in sweeps[0].seconds}


class _Sweep(fx.Interpreter):
    """Runs a graph operator by operator and keeps the seconds of each."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seconds: dict[fx.Node, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        """One node."""
        if n.op != "call_function":
            return super().run_node(n)
        seconds, result = timed(super().run_node, n)
        self.seconds[n] = 0.0 if is_view(n) else seconds
        return result
