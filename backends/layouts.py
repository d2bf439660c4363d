"""Weights of convolutions laid out once, in the memory layout that convolutions on a GPU read.

    step graph:  %w = get_attr[conv.weight], contiguous;  %y = conv2d(%cache, %w)          a transposition of each at every call
    laid out:    %w = a copy of it, channels-last;        %y = conv2d(%cache, %w)          %cache is channels-last already

The model's own weights are neither changed nor given other strides. A copy is made once per program, whatever the number of
its step graphs, and follows its weight: what is written in place is seen by the tensor's version, what is put elsewhere by its
address, and what leaves no trace (``weight.data.add_()``) when ``refresh`` is called. A model in
``torch.channels_last`` already needs no copies.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import fx

from fxmask.backends.straight_line import restride
from fxmask.guards.watch import WeightsState, WeightWatch
from fxmask.ir.graph import attribute, copy_nodes, output_node, placeholders, returned
from fxmask.passes.choose_layouts import LAYOUT, propagate

aten = torch.ops.aten


class Layouts:
    """Lays out the step graphs of one program."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # identity of a weight -> the weight, its copy
        self._watch: WeightWatch | None = None  # of these weights
        self._seen: WeightsState | None = None
        self._turn = 0
        self._graphs: weakref.WeakKeyDictionary[fx.GraphModule, fx.GraphModule] = weakref.WeakKeyDictionary()

    def __len__(self) -> int:
        """How many weights have a copy."""
        return len(self._copies)

    def apply(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        """The graph on weights that are laid out, with the layouts of its values noted down; itself if nothing is marked.

        Cached values come in and leave in the layouts that are marked, results in those that the program gives them.
        """
        if not any(LAYOUT in node.meta for node in graph_module.graph.nodes):
            return graph_module
        with self._lock:
            if graph_module not in self._graphs:
                self._graphs[graph_module] = self._laid_out(graph_module)
            return self._graphs[graph_module]

    def follow(self) -> None:
        """Bring the copies up to date with weights that were written to or put elsewhere since. Costs microseconds."""
        self._turn += 1
        if self._watch is None or self._seen is None or self._watch.changed(self._seen, self._turn):
            self.refresh()

    def refresh(self) -> None:
        """Bring all copies up to date, in the memory that they have, so that what was recorded reads them."""
        with self._lock, torch.no_grad():
            if self._watch is None:
                self._watch = WeightWatch([weight for weight, _ in self._copies.values()])
            self._seen = self._watch.now()
            for weight, laid_out in self._copies.values():
                laid_out.copy_(weight)

    def _laid_out(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        copy_nodes(graph_module.graph.nodes, graph, copies)
        end = graph.output(tuple(copies[node] for node in returned(graph_module.graph)))
        attributes = {}
        for node in graph.find_nodes(op="get_attr"):
            held = attribute(graph_module, node)
            attributes[str(node.target)] = self._copy_of(held, node.meta[LAYOUT]) if LAYOUT in node.meta else held
        made = fx.GraphModule(attributes, graph, class_name="LaidOut")
        marked = {node: node.meta[LAYOUT] for node in placeholders(graph) if LAYOUT in node.meta}
        values, impossible = propagate(made, marked)
        for node in impossible:
            node.target = aten.reshape.default
        ends = []
        for node in returned(graph):
            wanted = node.meta.get(LAYOUT, tuple(map(int, node.meta["val"].stride())))
            ends.append(node if values[node].stride() == wanted else self._converted(node, values))
        for node, value in values.items():
            node.meta = {**node.meta, "val": value}
        end.args = (tuple(ends),)
        made.recompile()
        return made

    def _converted(self, node: fx.Node, values: dict[fx.Node, torch.Tensor]) -> fx.Node:
        """A result in the layout that it is to have; the kernel that computes it stores it so."""
        wanted = torch.channels_last if LAYOUT in node.meta else torch.contiguous_format
        with node.graph.inserting_before(output_node(node.graph)):
            made = node.graph.call_function(aten.clone.default, (node,), {"memory_format": wanted})
        made.meta = dict(node.meta)
        made.meta["val"] = torch.empty_like(values[node], memory_format=wanted)
        return made

    def _copy_of(self, weight: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
        if weight.stride() == strides:
            return weight
        if id(weight) not in self._copies:
            with torch.no_grad():
                laid_out = restride(weight.detach(), strides)
            self._copies[id(weight)] = weight, laid_out
            self._watch = None
        return self._copies[id(weight)][1]
