"""The meaning of a mask: a slow interpreter of (program, mask, forecast) over the steps, with a dictionary as cache.

Every node of the graph is computed at every step; only then a cut value is replaced by its cached one. Nothing is
removed, nothing is shared. Every other form of a program is tested against this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import fx

from fxmask.errors import MaskError
from fxmask.ir.calls import RETURN_DICT
from fxmask.ir.combine import form
from fxmask.ir.forecast import INPUT, Cache, Slot
from fxmask.ir.interpret import interpret
from fxmask.ir.mask import Mask
from fxmask.ir.program import Program

Steps = Sequence[Mapping[str, Any] | Sequence[Mapping[str, Any]]]
"""T steps, each one call (the denoiser's arguments by name) or a sequence of them, one per lane."""


class _Recorded(Protocol):
    """A recorded trajectory, as far as it matters here."""

    @property
    def calls(self) -> Sequence[Sequence[Mapping[str, Any]]]: ...

    @property
    def order(self) -> tuple[tuple[int, int], ...]: ...

    def rollout(self, denoiser: Callable[..., Any]) -> torch.Tensor: ...


def run(program: Program, mask: Mask, calls: _Recorded | Steps) -> list[Any]:
    """Run the masked program over given calls.

    Args:
        program: the captured denoiser; the calls must have the shapes that it was captured with.
        mask: ``[T, B]``, or ``[T, L, B]`` with a row for each of a step's calls.
        calls: a trajectory, or T steps, each a dict of the denoiser's arguments or a list of them, one per lane.

    Returns:
        T results in the model's own return type; a list of them per step where a step has several lanes.

    Raises:
        MaskError: the number of calls is not T.
    """
    steps = steps_of(calls)
    if len(steps) != mask.num_steps:
        raise MaskError(f"the mask has {mask.num_steps} steps, but {len(steps)} calls were given; one per step is needed")
    results: list[Any] = []
    runner = Runner(program, mask)
    for i, step in enumerate(steps):
        outputs = [runner.call(i, k, call) for k, call in enumerate(step)]
        results.append(outputs[0] if len(outputs) == 1 else outputs)
    return results


class Runner:
    """Calls of a masked program, each given with its step and which of the step's calls it is.

    Args:
        program: the captured denoiser.
        mask: ``[T, B]``, where every lane has a cache of its own, or ``[T, L, B]``, where all have one.
    """

    def __init__(self, program: Program, mask: Mask) -> None:
        self._program, self._mask, self._calls = program, mask, mask.by_call
        self._caches: dict[int, Cache] = {}
        self._first = {step: row for row, (step, _) in reversed(list(enumerate(mask.order)))}

    def call(self, step: int, number: int, call: Mapping[str, Any]) -> Any:
        """One call, in order.

        Raises:
            MaskError: the step has more calls than the mask has lanes.
        """
        if not self._mask.lanes:
            return run_step(self._program, self._mask, step, call, self._caches.setdefault(number, {}))
        row = self._first[step] + number
        if row >= self._first.get(step + 1, len(self._mask.order)):
            raise MaskError(
                f"step {step} makes call {number + 1}, but the mask has {len(self._mask.lanes)} lanes there at most"
            )
        return run_step(self._program, self._calls, row, call, self._caches.setdefault(0, {}))


def rollout(program: Program, mask: Mask, trajectory: _Recorded) -> torch.Tensor:
    """Sample with the masked program: the recorded noise, and at each step the sample that its own predictions led to.

    Returns:
        The final samples, ``[B, ...]``.

    Raises:
        MaskError: the number of recorded steps is not T.
    """
    if len(trajectory.calls) != mask.num_steps:
        raise MaskError(f"the mask has {mask.num_steps} steps, the trajectory {len(trajectory.calls)}; record one of as many")
    order, runner = iter(trajectory.order), Runner(program, mask)

    def denoiser(**call: Any) -> Any:
        return runner.call(*next(order), call)

    return trajectory.rollout(denoiser)


def steps_of(calls: _Recorded | Steps) -> list[list[Mapping[str, Any]]]:
    """The calls of each step, one per lane, whichever form they were given in."""
    given: Any = calls
    steps: Steps = getattr(given, "calls", given)
    return [[step] if isinstance(step, Mapping) else list(step) for step in steps]


@torch.no_grad()
def run_step(program: Program, mask: Mask, step: int, call: Mapping[str, Any], cache: Cache) -> Any:
    """One call of a program masked without lanes. Reads and writes ``cache``; returns the model's own return type."""
    bound = program.signature.bind((), dict(call))
    program.require_assumed(bound, f"step {step}")
    cut = {
        name: (block.name, i)
        for block in program.all_blocks
        if block.name in mask.blocks
        for i, name in enumerate(block.values)
    }
    computes = dict(zip(mask.blocks, mask.compute[step].tolist(), strict=True))

    def cached(node: fx.Node, value: Any) -> Any:
        if node.name in program.input_block.values:
            cache[Slot(INPUT, 0, step)] = value.clone()
        if node.name not in cut:
            return value
        block, i = cut[node.name]
        blends = mask.blends(step, block)
        if computes[block]:
            cache[Slot(block, i, step)] = value.clone()
        if not computes[block] or blends:
            value = _formed(mask, step, block, i, cache)
        if blends:
            cache[Slot(block, i, step)] = value.clone()
        return value

    outputs = interpret(program.graph_module, list(bound.tensors.values()), cached)
    return program.outputs(outputs, dict(bound.static).get(RETURN_DICT))


def _formed(mask: Mask, step: int, block: str, i: int, cache: Cache) -> torch.Tensor:
    load = mask.loaded_from(step, block, i)
    stored = [cache[slot] for slot, _ in load.terms]
    return stored[0].clone() if load.plain else form(stored, [c for _, c in load.terms])
