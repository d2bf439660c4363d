"""One symbolic capture for many shapes.

A new batch size or resolution needs new graphs, but not a new export each time: the model is exported once with the
changed dimensions symbolic, and the symbols are replaced by numbers for each form of call. What an export can not keep
symbolic (a branch on the batch size, an attention mask of fixed size) is not covered; the caller then exports again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxmask.ir.calls import BoundCall
from fxmask.ir.symbolic import SymbolicGraph, static_key


def export_symbolic(
    old: BoundCall,
    new: BoundCall,
    wrapper: torch.nn.Module,
    functionalize: Callable[[torch.export.ExportedProgram], fx.GraphModule],
) -> SymbolicGraph | None:
    """Export with every dimension symbolic in which two calls differ; ``None`` if they differ in more than sizes.

    Args:
        old: the call that the model was captured with.
        new: the call that it is to be captured for.
        wrapper: presents the model as a function of a flat list of tensors.
        functionalize: makes the exported program a functional graph.
    """
    if static_key(old) != static_key(new):
        return None
    pairs = list(zip(old.tensors.values(), new.tensors.values(), strict=True))
    if any(a.dim() != b.dim() for a, b in pairs):
        return None
    # A size of 1 would be taken for broadcasting, so it cannot stand for others.
    example = [b if all(n > 1 or m == 1 for n, m in zip(b.shape, a.shape, strict=True)) else a for a, b in pairs]
    example = [x.detach().clone() for x in example]  # an export that fails leaves its marks of dynamic sizes on them
    dynamic = tuple({d: torch.export.Dim.AUTO for d in range(a.dim()) if a.shape[d] != b.shape[d]} for a, b in pairs)
    exported = torch.export.export(wrapper, tuple(example), dynamic_shapes=(dynamic,), strict=False)
    module = functionalize(exported)
    placeholders = module.graph.find_nodes(op="placeholder")
    ranges = {
        name: tuple(_range(size, exported.range_constraints) for size in node.meta["val"].shape)
        for name, node in zip(new.tensors, placeholders, strict=True)
    }
    return SymbolicGraph(module, static_key(new), ranges)


def _range(size: Any, constraints: Any) -> tuple[int, float]:
    if isinstance(size, int):
        return size, size
    found = constraints.get(size.node.expr)
    if found is None:  # a relation between dimensions, e.g. 2 * n
        return 0, float("inf")
    return int(found.lower), float(found.upper)
