"""What blocks compute along a recorded run: what a policy that is calibrated on values needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from fxmask.errors import InputError
from fxmask.ir.interpret import interpret
from fxmask.ir.program import Program
from fxmask.sampling.sampler import Sampler

Reduce = Callable[[torch.Tensor], torch.Tensor]


@torch.no_grad()
def block_values(
    program: Program,
    trajectory: Sampler,
    *,
    blocks: Iterable[str] | None = None,
    lane: int = 0,
    reduce: Reduce | None = None,
) -> dict[str, list[torch.Tensor]]:
    """The values of blocks at every recorded step, with the unaccelerated denoiser.

    Args:
        program: the captured denoiser.
        trajectory: a recorded run, of the shapes that the program was captured with.
        blocks: names; all of them if not given. The sample itself is ``"input"``.
        lane: which of the calls of a step.
        reduce: applied to every value before it is kept, e.g. ``lambda x: x.flatten(1).norm(dim=1)``: T values of every
            block can be more than memory holds.

    Returns:
        ``{block: [value at step 0, ..., value at step T - 1]}``; of a block of several cut values the first one.

    Raises:
        InputError: a block is unknown, or the trajectory has other shapes than the program.
    """
    named = [block.name for block in program.blocks] if blocks is None else list(blocks)
    unknown = [name for name in named if name not in {"input", *(block.name for block in program.all_blocks)}]
    if unknown:
        raise InputError(f"the program has no blocks {unknown[:5]}; print(program) lists them")
    wanted: dict[str, list[str]] = {}
    for name in named:
        wanted.setdefault(program.block(name).values[0], []).append(name)
    keep = reduce or torch.clone
    found: dict[str, list[torch.Tensor]] = {name: [] for name in named}

    def kept(node: fx.Node, value: Any) -> Any:
        for name in wanted.get(node.name, ()):
            found[name].append(keep(value))
        return value

    for i, step in enumerate(trajectory.calls):
        bound = program.signature.bind((), dict(step[lane]))
        if bound.key != program.example.key:
            raise InputError(f"the call of step {i} has other shapes or types than the program; capture it for this trajectory")
        interpret(program.graph_module, list(bound.tensors.values()), kept)
    return found
