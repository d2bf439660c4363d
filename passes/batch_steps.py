"""The table's graph with a leading dimension for steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import fx

from fxmask._torch import make_fx
from fxmask.passes.lift_weights import lift_weights
from fxmask.passes.merge_common import merge_common
from fxmask.passes.precompute import Prologue
from fxmask.passes.remove_dead import remove_dead


class BatchCompiler(Protocol):
    """Compiles a graph that works on all steps at once."""

    def __call__(self, row: fx.GraphModule, num_steps: int, trace: Callable[[], fx.GraphModule]) -> Callable[..., Any]:
        """What computes ``trace()``, which is ``row`` for ``num_steps`` steps; it need not be traced to be known."""


def batch_steps(
    table: Prologue,
    timestep: int,
    timesteps: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    precomputed: dict[str, torch.Tensor],
    compiler: BatchCompiler | None = None,
) -> Callable[..., list[torch.Tensor]]:
    """The table's graph with a leading dimension for steps.

    Args:
        table: computes one row.
        timestep: position of the timestep in ``Program.inputs``.
        timesteps: ``[T, *shape of the timestep]``.
        tensors: the program's inputs; the timestep in them is not used.
        precomputed: what is precomputed already.
        compiler: if its operators are not to run one after the other.

    Returns:
        A function of ``(timesteps, tensors, precomputed)`` that returns one tensor ``[T, ...]`` per value. Operators work on
        all steps at once, so their number does not grow with them.
    """
    lifted, weights = lift_weights(table.graph_module)

    def arguments(steps: torch.Tensor, tensors: Sequence[torch.Tensor], precomputed: dict[str, torch.Tensor]) -> list[Any]:
        inputs = [steps if k == timestep else tensors[k] for k in table.inputs]
        return [*weights, *inputs, *(precomputed[name] for name in table.given)]

    dims = (*(None for _ in weights), *(0 if k == timestep else None for k in table.inputs), *(None for _ in table.given))

    def rows(*given: torch.Tensor) -> Any:
        return torch.vmap(lifted, in_dims=dims)(*given)

    def trace() -> fx.GraphModule:
        with torch.no_grad():
            batched = make_fx(torch.func.functionalize(rows))(*arguments(timesteps, tensors, precomputed))
        remove_dead(batched.graph)
        merge_common(batched.graph)
        batched.recompile()
        return batched

    run = compiler(lifted, len(timesteps), trace) if compiler else trace()
    return lambda steps, tensors, precomputed: run(*arguments(steps, tensors, precomputed))
