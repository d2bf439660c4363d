"""Binding times: what a value depends on says when it can be computed at the earliest.

    weights < timestep < conditioning < sample

    before:  %e = silu(time_mlp(%t)); %m = linear(%e, %w); %k = linear(%text, %wk); %y = f(%x, %m, %k)     at every step
    after:   %m: a table with a row for each step; %k: once per generation; %y = f(%x, table_m[i], once_k)

The results are the same up to rounding. Values are ``staged`` where a step needs them: views of staged values and what is
cheaper to compute than to read stay in the step graphs, so that a staged value is the smallest tensor that will do.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from fxmask.passes.count_macs import count_macs
from fxmask.passes.lift_weights import lift_weights
from fxmask.passes.merge_common import merge_common
from fxmask.passes.observer import functional, graph_pass, has_shapes
from fxmask.passes.remove_dead import remove_dead
from fxmask.passes.split_regions import is_view
from fxmask.program import Program

# Rows of values that depend on timestep and conditioning grow with batch and steps; beyond this they stay in the steps.
MOST_TABLE_BYTES = 256 * 2**20


class BindingTime(enum.IntFlag):
    """What a value depends on, besides the weights."""

    WEIGHTS = 0
    TIMESTEP = 1
    CONDITIONING = 2
    SAMPLE = 4


OF_ROLE = {"timestep": BindingTime.TIMESTEP, "conditioning": BindingTime.CONDITIONING}


@dataclass(frozen=True)
class Prologue:
    """A graph that computes staged values.

    Attributes:
        graph_module: called as ``graph_module(*inputs, *given)``; returns one tensor per name in ``values``.
        inputs: positions, in ``Program.inputs``, of its arguments.
        values: the nodes whose values it computes, each once.
        sources: every node that is staged -> the one of ``values`` that is equal to it.
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

    def __call__(self, tensors: Sequence[torch.Tensor], staged: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The values by name, for all of the program's inputs and what is staged already."""
        run = self.compiled or self.graph_module
        results = run(*(tensors[k] for k in self.inputs), *(staged[name] for name in self.given))
        return dict(zip(self.values, results, strict=True))


@dataclass(frozen=True)
class Staging:
    """What is computed outside the steps.

    Attributes:
        once: values that depend on weights and conditioning only: one call per generation.
        table: values that depend on the timestep too, but not on the sample: one row per step.
    """

    once: Prologue | None = None
    table: Prologue | None = None

    @property
    def sources(self) -> dict[str, str]:
        """Every staged node -> the staged value that is equal to it."""
        return {name: source for part in (self.once, self.table) if part for name, source in part.sources.items()}

    def at(self, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The staged values of one call, computed as the program would."""
        staged: dict[str, torch.Tensor] = {}
        for part in (self.once, self.table):
            if part is not None:
                staged.update(part(tensors, staged))
        return staged


def binding_times(program: Program) -> dict[fx.Node, BindingTime]:
    """What each node depends on; random numbers are drawn anew at every step, like samples.

    A block's value may come from another step, whatever it is computed from: it counts as a sample.
    """
    roles = iter(program.inputs)
    cut = {value for block in program.blocks for value in block.values}
    times: dict[fx.Node, BindingTime] = {}
    for node in program.graph_module.graph.nodes:
        if node.op == "placeholder":
            times[node] = OF_ROLE.get(program.roles[next(roles)], BindingTime.SAMPLE)
            continue
        time = BindingTime.WEIGHTS
        for given in node.all_input_nodes:
            time |= times[given]
        if node.name in cut or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            time |= BindingTime.SAMPLE
        times[node] = time
    return times


def stage(program: Program, num_steps: int) -> Staging:
    """Everything that need not be computed at every step of ``num_steps``."""
    times = binding_times(program)
    once = hoist_conditioning(program, times)
    table = fold_timestep(program, times, once, num_steps)
    return Staging(once, table)


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
        if num_steps * sum(_bytes(n) for n in frontier) <= MOST_TABLE_BYTES:
            return _prologue(program, frontier, hoisted)
    return None


def _frontier(program: Program, early: Collection[fx.Node]) -> list[fx.Node]:
    """The nodes of ``early`` whose values the other nodes need, past views and what is cheaper computed than read."""
    late: set[fx.Node] = set()
    frontier = []
    for node in reversed(program.graph_module.graph.nodes):
        needed = any(user in late or user not in early for user in node.users)
        if node.op == "call_function" and node in early and needed:
            if _is_glue(node, early):
                late.add(node)
            elif isinstance(node.meta["val"], torch.Tensor):
                frontier.append(node)
    return frontier[::-1]


def _is_glue(node: fx.Node, early: Collection[fx.Node]) -> bool:
    """Views, constants made from nothing, and pointwise operators that only make a tensor larger."""
    if is_view(node) or not node.all_input_nodes:
        return True
    if torch.Tag.pointwise not in getattr(node.target, "tags", ()):
        return False
    return _bytes(node) > 2 * sum(_bytes(given) for given in node.all_input_nodes)


def _bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    return int(value.numel()) * value.element_size() if isinstance(value, torch.Tensor) else 0


def _prologue(program: Program, wanted: Sequence[fx.Node], given: Mapping[str, str]) -> Prologue | None:
    """The graph of ``wanted``, given what is staged already: node -> the value that is equal to it."""
    if not wanted:
        return None
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.graph_module.graph.find_nodes(op="placeholder"):
        copies[node] = graph.node_copy(node)
    staged = {name: graph.placeholder(f"staged_{name}") for name in dict.fromkeys(given.values())}
    for name, placeholder in staged.items():
        placeholder.meta = dict(program.node(name).meta)
    for node in program.graph_module.graph.nodes:
        if node.name in given:
            copies[node] = staged[given[node.name]]
        elif node.op not in ("placeholder", "output") and all(n in copies for n in node.all_input_nodes):
            copies[node] = graph.node_copy(node, lambda n: copies[n])
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
    needed = tuple(name for name, node in staged.items() if node.users)
    macs = sum(count_macs(node) for node in graph.nodes)
    module = fx.GraphModule(program.graph_module, graph, class_name="Prologue")
    return Prologue(module, tuple(inputs), tuple(first.values()), sources, needed, macs)


class BatchCompiler(Protocol):
    """Compiles a graph that works on all steps at once."""

    def __call__(self, row: fx.GraphModule, num_steps: int, trace: Callable[[], fx.GraphModule]) -> Callable[..., Any]:
        """What computes ``trace()``, which is ``row`` for ``num_steps`` steps; it need not be traced to be known."""


def batch_steps(
    table: Prologue,
    timestep: int,
    timesteps: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    staged: dict[str, torch.Tensor],
    compiler: BatchCompiler | None = None,
) -> Callable[..., list[torch.Tensor]]:
    """The table's graph with a leading dimension for steps.

    Args:
        table: computes one row.
        timestep: position of the timestep in ``Program.inputs``.
        timesteps: ``[T, *shape of the timestep]``.
        tensors: the program's inputs; the timestep in them is not used.
        staged: what is staged already.
        compiler: if its operators are not to run one after the other.

    Returns:
        A function of ``(timesteps, tensors, staged)`` that returns one tensor ``[T, ...]`` per value. Its operators work on
        all steps at once, so their number does not grow with them.
    """
    lifted, weights = lift_weights(table.graph_module)

    def arguments(steps: torch.Tensor, tensors: Sequence[torch.Tensor], staged: dict[str, torch.Tensor]) -> list[Any]:
        inputs = [steps if k == timestep else tensors[k] for k in table.inputs]
        return [*weights, *inputs, *(staged[name] for name in table.given)]

    dims = (*(None for _ in weights), *(0 if k == timestep else None for k in table.inputs), *(None for _ in table.given))

    def rows(*given: torch.Tensor) -> Any:
        return torch.vmap(lifted, in_dims=dims)(*given)

    def trace() -> fx.GraphModule:
        with torch.no_grad():
            batched = make_fx(torch.func.functionalize(rows))(*arguments(timesteps, tensors, staged))
        remove_dead(batched.graph)
        merge_common(batched.graph)
        batched.recompile()
        return batched

    run = compiler(lifted, len(timesteps), trace) if compiler else trace()
    return lambda steps, tensors, staged: run(*arguments(steps, tensors, staged))
