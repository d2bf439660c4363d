"""The meaning of a mask: a slow interpreter of (program, mask, forecast) over the steps, with a dictionary as cache.

Every node of the graph is computed at every step; only then a cut value is replaced by its cached one. Nothing is
removed, nothing is shared. Every other form of a program is tested against this one.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxmask.errors import MaskError
from fxmask.mask import INPUT, Mask
from fxmask.passes.forecast import form
from fxmask.program import Program
from fxmask.trajectory import Trajectory

Cache = dict[tuple[int, str, int], torch.Tensor]  # (step, block, value index) -> stored value


def run(
    program: Program, mask: Mask, calls: Trajectory | Sequence[Mapping[str, Any] | Sequence[Mapping[str, Any]]]
) -> list[Any]:
    """Run the masked program over the steps of a generation.

    Args:
        program: the captured denoiser; the calls must have the shapes that it was captured with.
        mask: ``[T, B]``.
        calls: a trajectory, or T steps, each a dict of the denoiser's arguments or a list of them, one per lane.

    Returns:
        T results in the model's own return type; a list of them per step where a step has several lanes.

    Raises:
        MaskError: the number of calls is not T.
    """
    steps: list[Any] = list(calls.calls if isinstance(calls, Trajectory) else calls)
    if len(steps) != mask.num_steps:
        raise MaskError(f"the mask has {mask.num_steps} steps, but {len(steps)} calls were given; one per step is needed")
    caches: dict[int, Cache] = {}
    results: list[Any] = []
    for i, step in enumerate(steps):
        lanes = [step] if isinstance(step, Mapping) else list(step)
        outputs = [run_step(program, mask, i, call, caches.setdefault(k, {})) for k, call in enumerate(lanes)]
        results.append(outputs[0] if len(outputs) == 1 else outputs)
    return results


@torch.no_grad()
def run_step(program: Program, mask: Mask, step: int, call: Mapping[str, Any], cache: Cache) -> Any:
    """One call of the masked program. Reads and writes ``cache``; returns the model's own return type."""
    bound = program.signature.bind((), dict(call))
    cut = {
        name: (block.name, i) for block in program.blocks if block.name in mask.blocks for i, name in enumerate(block.values)
    }
    computes = dict(zip(mask.blocks, mask.compute[step].tolist(), strict=True))
    values: dict[fx.Node, Any] = {}
    arguments = iter(bound.tensors.values())
    for node in program.graph_module.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(arguments)
            if node.name in program.input_block.values:
                cache[step, INPUT, 0] = values[node].clone()
        elif node.op == "get_attr":
            values[node] = operator.attrgetter(str(node.target))(program.graph_module)
        elif node.op == "output":
            tensors = fx.map_arg(node.args[0], lambda n: values[n])
            return program.outputs(tensors, dict(bound.static).get("return_dict"))
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
            values[node] = node.target(*args, **kwargs)
            if node.name in cut:
                block, i = cut[node.name]
                if computes[block]:
                    cache[step, block, i] = values[node].clone()
                if not computes[block] or mask.blends(step, block):
                    values[node] = _formed(mask, step, block, i, cache)
                if mask.blends(step, block):
                    cache[step, block, i] = values[node].clone()
    raise AssertionError("a graph ends with its output")


def _formed(mask: Mask, step: int, block: str, i: int, cache: Cache) -> torch.Tensor:
    load = mask.loaded_from(step, block, i)
    stored = [cache[slot.step, slot.block, slot.value] for slot, _ in load.terms]
    return stored[0].clone() if load.plain else form(stored, [c for _, c in load.terms])
