"""What need not be computed at every step: a table over timesteps, and values of the conditioning once per run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxmask.ir.graph import copy_nodes, is_view, placeholders, value_bytes
from fxmask.ir.liveness import needed_for
from fxmask.ir.macs import count_macs
from fxmask.ir.program import Program
from fxmask.passes.binding_times import BindingTime, binding_times
from fxmask.passes.conditions import functional, has_shapes
from fxmask.passes.merge_common import merge_common
from fxmask.passes.observer import graph_pass
from fxmask.passes.remove_dead import remove_dead

# Rows of values that depend on timestep and conditioning grow with batch and steps; beyond this they stay in the steps.
MOST_TABLE_BYTES = 256 * 2**20
CONVERSIONS = (torch.ops.aten.to, torch.ops.aten._to_copy, torch.ops.aten.type_as)


@dataclass(frozen=True)
class Prologue:
    """A graph that computes precomputed values.

    Attributes:
        graph_module: called as ``graph_module(*inputs, *given)``; returns one tensor per name in ``values``.
        inputs: positions, in ``Program.inputs``, of its arguments.
        values: the nodes whose values it computes, each once.
        sources: every node that is precomputed -> the one of ``values`` that is equal to it.
        given: the nodes whose values it is given.
        macs: multiply-accumulates of one call.
        compiled: what a backend made of the graph, if it compiles prologues.
    """

    graph_module: fx.GraphModule
    inputs: tuple[int, ...]
    values: tuple[str, ...]
    sources: Mapping[str, str]
    given: tuple[str, ...]
    macs: int
    compiled: Callable[..., Any] | None = None

    def __call__(self, tensors: Sequence[torch.Tensor], precomputed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The values by name, for all of the program's inputs and what is precomputed already."""
        run = self.compiled or self.graph_module
        results = run(*(tensors[k] for k in self.inputs), *(precomputed[name] for name in self.given))
        return dict(zip(self.values, results, strict=True))


@dataclass(frozen=True)
class Prologues:
    """What is computed outside the steps.

    Attributes:
        once: values that depend on weights and conditioning only: one call per generation.
        table: values that depend on the timestep too, but not on the sample: one row per step.
    """

    once: Prologue | None = None
    table: Prologue | None = None

    @property
    def sources(self) -> dict[str, str]:
        """Every precomputed node -> the precomputed value that is equal to it."""
        return {name: source for part in (self.once, self.table) if part for name, source in part.sources.items()}

    def at(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The precomputed values of one call, computed as the program would."""
        precomputed: dict[str, torch.Tensor] = {}
        for part in (self.once, self.table):
            if part is not None:
                precomputed.update(part(tensors, precomputed))
        return precomputed


def make_prologues(program: Program, num_steps: int) -> Prologues:
    """Everything that need not be computed at every step of ``num_steps``."""
    times = binding_times(program)
    once = hoist_conditioning(program, times)
    table = fold_timestep(program, times, once, num_steps)
    return Prologues(once, table)


@graph_pass(requires=(functional, has_shapes), otherwise=lambda program, times: None)
def hoist_conditioning(program: Program, times: dict[fx.Node, BindingTime]) -> Prologue | None:
    """What depends on weights and conditioning only."""
    early = {node for node, time in times.items() if time in (BindingTime.WEIGHTS, BindingTime.CONDITIONING)}
    return _prologue(program, _frontier(program, early), {})


@graph_pass(requires=(functional, has_shapes), otherwise=lambda program, times, once, num_steps: None)
def fold_timestep(
    program: Program, times: dict[fx.Node, BindingTime], once: Prologue | None, num_steps: int
) -> Prologue | None:
    """What depends on the timestep, but not on the sample.

    Values that depend on the conditioning too have one row per step for each generation; they are left out if
    conditioning is not hoisted, or if the table would be too large.
    """
    hoisted = once.sources if once else {}
    both = BindingTime.TIMESTEP | BindingTime.CONDITIONING
    for allowed in ((BindingTime.TIMESTEP, both), (BindingTime.TIMESTEP,)) if once else ((BindingTime.TIMESTEP,),):
        early = {node for node, time in times.items() if time in (*allowed, BindingTime.WEIGHTS)}
        if both in allowed:
            early |= {node for node, time in times.items() if time == BindingTime.CONDITIONING}
        frontier = [n for n in _frontier(program, early) if times[n] & BindingTime.TIMESTEP and n.name not in hoisted]
        if num_steps * sum(value_bytes(n) for n in frontier) <= MOST_TABLE_BYTES:
            return _prologue(program, frontier, hoisted)
    return None


def _frontier(program: Program, early: Collection[fx.Node]) -> list[fx.Node]:
    """The nodes of ``early`` whose values the other nodes need, past views and what is cheaper computed than read."""
    late: set[fx.Node] = set()
    frontier = []
    stored = _stored_bytes(program.graph_module.graph)
    for node in reversed(program.graph_module.graph.nodes):
        needed = any(user in late or user not in early for user in node.users)
        if node.op == "call_function" and node in early and needed:
            if _is_glue(node, stored):
                late.add(node)
            elif isinstance(node.meta["val"], torch.Tensor):
                frontier.append(node)
    return frontier[::-1]


def _is_glue(node: fx.Node, stored: Mapping[fx.Node, int]) -> bool:
    """Views, constants made from nothing, pointwise operators that only make a tensor larger, and weights in another type than
    the smaller one that they are stored in: who stores them so has no memory for more."""
    if is_view(node) or not node.all_input_nodes:
        return True
    if node in stored and value_bytes(node) > stored[node]:
        return True
    if torch.Tag.pointwise not in getattr(node.target, "tags", ()):
        return False
    return value_bytes(node) > 2 * sum(value_bytes(given) for given in node.all_input_nodes)


def _stored_bytes(graph: fx.Graph) -> dict[fx.Node, int]:
    """For weights, and what views, conversions and pointwise operators make of weights alone: bytes of these weights."""
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            found[node] = value_bytes(node)
        elif node.op == "call_function" and node.all_input_nodes and all(given in found for given in node.all_input_nodes):
            tags = getattr(node.target, "tags", ())
            if is_view(node) or torch.Tag.pointwise in tags or getattr(node.target, "overloadpacket", None) in CONVERSIONS:
                found[node] = sum(found[given] for given in node.all_input_nodes)
    return found


def _prologue(program: Program, wanted: Sequence[fx.Node], given: Mapping[str, str]) -> Prologue | None:
    """The graph of ``wanted``, given what is precomputed already: node -> the value that is equal to it."""
    if not wanted:
        return None
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    copy_nodes(placeholders(program.graph_module.graph), graph, copies)
    precomputed = {name: graph.placeholder(f"precomputed_{name}") for name in dict.fromkeys(given.values())}
    for name, placeholder in precomputed.items():
        placeholder.meta = dict(program.node(name).meta)
    copies.update({program.node(name): precomputed[source] for name, source in given.items()})
    copy_nodes(needed_for(program.graph_module.graph, {node.name for node in wanted}, given), graph, copies)
    end = graph.output(tuple(copies[node] for node in wanted))
    merge_common(graph)
    remove_dead(graph)
    first: dict[fx.Node, str] = {}
    for node, made in zip(wanted, list(end.args[0]), strict=True):
        first.setdefault(made, node.name)
    sources = {node.name: first[made] for node, made in zip(wanted, list(end.args[0]), strict=True)}
    end.args = (tuple(first),)
    inputs = []
    for position, node in enumerate(list(graph.find_nodes(op="placeholder"))):
        if not node.users:
            graph.erase_node(node)
        elif position < len(program.inputs):
            inputs.append(position)
    needed = tuple(name for name, node in precomputed.items() if node.users)
    macs = sum(count_macs(node) for node in graph.nodes)
    module = fx.GraphModule(program.graph_module, graph, class_name="Prologue")
    return Prologue(module, tuple(inputs), tuple(first.values()), sources, needed, macs)
