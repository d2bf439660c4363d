"""Every step graph of a package once against the same graph run operator by operator, on made-up cached values.

The cached values are random: zeros would hide a value that is read in the wrong order or left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fxmask.errors import MaskError
from fxmask.ir.forecast import Cache, Slot
from fxmask.runtime.executor import Executor
from fxmask.runtime.graph_store import GraphStore
from fxmask.runtime.prologues import Rows

Values = Mapping[Any, torch.Tensor]
Agrees = Callable[[torch.Tensor, torch.Tensor], bool]


def compare_steps(executor: Executor, agrees: Agrees) -> None:
    """Run what is compiled of each distinct step, and what runs before the first.

    Args:
        executor: with the compiled graphs.
        agrees: whether a tensor is what another one is, but for rounding.

    Raises:
        MaskError: a step computes something else; names it.
    """
    eager = Executor(executor.plan, GraphStore(executor.program, "eager"))
    example = list(executor.program.example.tensors.values())
    rows, eager_rows = executor.begin(example), eager.begin(example)
    for step in sorted(executor.plan.first_steps.values()):
        cache = {slot: _made_up(executor, slot, k) for k, slot in enumerate(executor.slots(step))}
        tensors = _at_step(executor, step)
        got = _run(executor, step, tensors, cache, rows)
        wanted = _run(eager, step, tensors, cache, eager_rows)
        _expect(step, got, wanted, agrees)
    for step in range(executor.plan.start, len(rows)):
        tensors = _at_step(executor, step)
        wanted = eager.prologues.complete(eager_rows[step] if eager_rows else {}, tensors)
        _expect(step, executor.prologues.complete(rows[step], tensors), wanted, agrees)


def _expect(step: int, got: Values, wanted: Values, agrees: Agrees) -> None:
    if got.keys() != wanted.keys() or not all(agrees(got[name], wanted[name]) for name in wanted):
        raise MaskError(
            f"the package computes something else than its own graph: step {step} differs by more than rounding, so a file "
            "of it is damaged; copy the folder as a whole, or export it again"
        )


def _at_step(executor: Executor, step: int) -> list[torch.Tensor]:
    """The example's tensors with the timestep of that step."""
    name, timesteps = executor.program.signature.timestep, executor.plan.timesteps
    tensors = executor.program.example.tensors
    return [torch.full_like(x, timesteps[step]) if key == name else x for key, x in tensors.items()]


def _made_up(executor: Executor, slot: Slot, seed: int) -> torch.Tensor:
    blank = executor.blank(slot)
    values = torch.randn(blank.shape, generator=torch.Generator().manual_seed(seed))
    return blank.copy_(values)


def _run(executor: Executor, step: int, tensors: list[torch.Tensor], cache: Cache, rows: Rows) -> Values:
    """Outputs and stored values of a step, by place."""
    own: Cache = {slot: x.clone(memory_format=torch.preserve_format) for slot, x in cache.items()}
    outputs = executor.run_step(step, tensors, own, rows)
    return {**dict(enumerate(outputs)), **own}
