"""Graphs that are given some blocks, already formed: what learning runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fxmask.ir.forecast import Load, Slot
from fxmask.ir.liveness import live_nodes
from fxmask.ir.macs import count_macs
from fxmask.ir.program import Program
from fxmask.passes.specialize import build_step_graph
from fxmask.passes.step_graph import StepGraph


@dataclass(frozen=True)
class CutGraph:
    """A program some of whose blocks are given from outside, already formed.

    Attributes:
        step_graph: the specialised graph.
        load: (block, value index) of the values that it is given, in order.
        macs: multiply-accumulates of one call.
    """

    step_graph: StepGraph
    load: tuple[tuple[str, int], ...]
    macs: int

    @property
    def store(self) -> tuple[tuple[str, int], ...]:
        """(block, value index) of the extra outputs."""
        return self.step_graph.store

    @property
    def num_outputs(self) -> int:
        """How many outputs come before them."""
        return self.step_graph.num_outputs

    def __call__(self, tensors: Sequence[torch.Tensor], formed: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Outputs, then stores, for all of the program's inputs and the given values."""
        results: tuple[torch.Tensor, ...] = self.step_graph.graph_module(*(tensors[k] for k in self.step_graph.inputs), *formed)
        return results


def live_under(
    program: Program, loads: frozenset[str], prices: Mapping[str, float] | None = None
) -> tuple[frozenset[str], float]:
    """The blocks that a step still computes when it is given the blocks ``loads``, and what it costs.

    Args:
        program: the captured denoiser.
        loads: names of blocks.
        prices: of the nodes, by name; multiply-accumulates if not given.
    """
    live, _ = live_nodes(program.graph_module.graph, _values_of(program, loads))
    names = {node.name for node in live}
    blocks = frozenset(b.name for b in program.blocks if b.name not in loads and names.issuperset(b.values))
    return blocks, sum(count_macs(node) if prices is None else prices[node.name] for node in live)


def cut_graph(program: Program, loads: frozenset[str], live_out: Sequence[str]) -> CutGraph:
    """The graph that is given the blocks ``loads`` and also returns the values of the blocks ``live_out``."""
    given = _values_of(program, loads)
    live, read = live_nodes(program.graph_module.graph, given)
    reached = tuple(given[node.name] for node in read)
    load = tuple(Load(name, i, 1, ((Slot(name, i, 0), 1.0),)) for name, i in reached)
    store = tuple((name, i) for name in live_out for i in range(len(program.block(name).values)))
    return CutGraph(build_step_graph(program, load, store, ()), reached, sum(map(count_macs, live)))


def _values_of(program: Program, blocks: frozenset[str]) -> dict[str, tuple[str, int]]:
    """(block, value index) of every cut value of some blocks, by node name."""
    return {value: (name, i) for name in blocks for i, value in enumerate(program.block(name).values)}
