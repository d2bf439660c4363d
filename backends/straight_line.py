"""Calling the regions of a step graph one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxmask.ir.graph import attribute
from fxmask.passes.split_regions import Region


def chain_regions(
    graph_module: fx.GraphModule, regions: Sequence[Region], runs: Sequence[Callable[..., Any]]
) -> Callable[..., Any]:
    """A function that calls the regions one after the other and frees what no later one reads.

    It is straight-line code, like what fx generates for a graph.
    """
    names = {node.name: f"v{k}" for k, node in enumerate(graph_module.graph.nodes)}
    placeholders = [node.name for node in graph_module.graph.find_nodes(op="placeholder")]
    weights = {n.name: attribute(graph_module, n) for n in graph_module.graph.find_nodes(op="get_attr")}
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


def restride(tensor: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """The tensor in the memory layout that a graph was compiled for."""
    if tensor.stride() == strides:
        return tensor
    return tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)
