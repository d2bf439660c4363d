"""Lift weights: parameters and buffers become the first arguments of the graph.

    before:  %w = get_attr[layer.weight]; %y = linear(%x, %w)
    after:   %w = placeholder[weight_0];  %y = linear(%x, %w)      called with (layer.weight, x)

Compiled code then belongs to no model: equal layers share it, and weights that change in place need no recompilation.
"""

from __future__ import annotations

import torch
from torch import fx

from fxmask.ir.graph import attribute, copy_nodes, returned
from fxmask.passes.observer import graph_pass


@graph_pass()
def lift_weights(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, tuple[torch.Tensor, ...]]:
    """A copy of the graph without weights of its own, and the weights, which are its first arguments."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    weights: dict[str, tuple[fx.Node, torch.Tensor]] = {}
    for node in graph_module.graph.find_nodes(op="get_attr"):
        target = str(node.target)
        if target not in weights:
            held = attribute(graph_module, node)
            placeholder = graph.placeholder(f"weight_{len(weights)}")
            placeholder.meta = {**node.meta, "val": held, "weight": target}
            weights[target] = placeholder, held
        copies[node] = weights[target][0]
    copy_nodes(graph_module.graph.nodes, graph, copies)
    graph.output(tuple(copies[node] for node in returned(graph_module.graph)))
    lifted = fx.GraphModule(torch.nn.Module(), graph, class_name="Lifted")
    return lifted, tuple(held for _, held in weights.values())
