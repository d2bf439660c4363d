"""A recorded run whose calls hold all lanes in one batch, as a run that calls them one by one.

    call [L * N rows] --> L calls [N rows];  L predictions [N rows] --> prediction [L * N rows]

Guidance usually goes through a denoiser as one batch, the unconditional part and the conditional one. Whether a batch is that
is seen in the recording: its parts have the same sample at every step, and the denoiser makes of each part alone what it makes
of it in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxmask._torch import pytree
from fxmask.ir.calls import moving_part, parts_of_batch, repeats
from fxmask.ir.outputs import first_tensor
from fxmask.sampling.recording import Recording
from fxmask.sampling.sampler import Call, ChangesSteps, Denoiser, Loop, Sampler

MOST_LANES = 4
AGREES = 1e-3  # relative L2 difference of predictions of a part alone and in the batch: other kernels, other sums
HALF = 2e-2  # the same in half precision


@dataclass(frozen=True, eq=False)
class SplitLanes:
    """The view of a run with one call of ``count`` lanes per step as one with ``count`` calls.

    Attributes:
        run: as it was recorded.
        count: L.
        turns: which part of the batch is called first, which next, and so on; () for their own order.
    """

    run: Sampler
    count: int
    turns: tuple[int, ...] = ()

    @property
    def calls(self) -> tuple[tuple[Call, ...], ...]:
        """Per step and lane the call's arguments by parameter name."""
        return tuple(tuple(self.parts(step[0])) for step in self.run.calls)

    @property
    def outputs(self) -> tuple[tuple[torch.Tensor, ...], ...]:
        """Per step and lane the prediction, ``[N, ...]``."""
        return tuple(tuple(step[0].chunk(self.count)[k] for k in self._turns) for step in self.run.outputs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.run, name)

    @property
    def order(self) -> tuple[tuple[int, int], ...]:
        """(step, lane) of every call, in order."""
        return tuple((step, lane) for step in range(self.run.num_steps) for lane in range(self.count))

    @property
    def _turns(self) -> tuple[int, ...]:
        return self.turns or tuple(range(self.count))

    @property
    def lanes(self) -> tuple[tuple[str | None, ...], ...]:
        """Parts of a batch have no names but their numbers."""
        return (tuple(map(str, self._turns)),) * self.run.num_steps

    def parts(self, call: Call) -> list[dict[str, Any]]:
        """The call of each lane, in the order in which they are called."""
        parts = parts_of_batch(dict(call), call[self.run.sample], self.count)
        return [parts[k] for k in self._turns]

    def in_order_of(self, turns: Sequence[int]) -> SplitLanes:
        """The same with the parts of the batch called in another order."""
        return SplitLanes(self.run, self.count, tuple(turns))

    def loop(self) -> Loop:
        """The sampler as a generator: yields the calls of each lane, in order, and is sent the prediction of each."""
        return self._split(self.run.loop())

    def idle_loop(self) -> Loop:
        """The same for whoever sends predictions without reading the calls."""
        return self._split(getattr(self.run, "idle_loop", self.run.loop)())

    def _split(self, inner: Loop) -> Loop:
        try:
            call = next(inner)
            while True:
                predictions: dict[int, torch.Tensor] = {}
                for k, part in zip(self._turns, self.parts(call), strict=True):
                    predictions[k] = yield part
                call = inner.send(torch.cat([predictions[k] for k in sorted(predictions)]))
        except StopIteration as end:
            final: torch.Tensor = end.value
            return final
        finally:
            inner.close()

    def renoised(self, model: torch.nn.Module, seed: int) -> SplitLanes:
        """The same conditioning, recorded with other noise."""
        return SplitLanes(self.run.renoised(model, seed), self.count, self.turns)

    def rollout(self, denoiser: Denoiser) -> torch.Tensor:
        """The final samples with another denoiser, which is called for every lane."""
        return Recording.rollout(self, denoiser)  # type: ignore[arg-type]  # has all that it asks for

    @property
    def can_change_steps(self) -> bool:
        """Whether ``with_steps`` works."""
        return isinstance(self.run, ChangesSteps) and self.run.can_change_steps

    def with_steps(self, model: torch.nn.Module, num_inference_steps: int) -> Sampler:
        """The same start and conditioning with another number of steps."""
        assert isinstance(self.run, ChangesSteps)
        return self.run.with_steps(model, num_inference_steps)


def lanes_in_batch(run: Sampler) -> int:
    """How many lanes the batch of each call holds; 1 if it holds none, or calls are made lane by lane already.

    The parts of the batch have the same sample at every step, as far as the sampler moves it, and something else of them
    differs.
    """
    if any(len(step) != 1 for step in run.calls):
        return 1
    rows = {len(step[0][run.sample]) for step in run.calls if isinstance(step[0][run.sample], torch.Tensor)}
    if len(rows) != 1 or not all(isinstance(step[0][run.sample], torch.Tensor) for step in run.calls):
        return 1
    moving = [moving_part(c[0][run.sample], y[0].shape) for c, y in zip(run.calls, run.outputs, strict=True)]
    for count in range(MOST_LANES, 1, -1):
        if all(repeats(x, count) for x in moving):
            calls = SplitLanes(run, count).parts(run.calls[0][0])
            if not all(_is_same_call(calls[0], other) for other in calls[1:]):
                return count
    return 1


@torch.no_grad()
def split_lanes(run: Sampler, model: torch.nn.Module) -> SplitLanes | None:
    """The view of a run as one whose lanes are called one by one; ``None`` if its batches hold no lanes, or do not come apart.

    Args:
        run: with one call per step.
        model: the denoiser; asked for the parts of two steps.
    """
    count = lanes_in_batch(run)
    if count == 1:
        return None
    view = SplitLanes(run, count)
    for step in (0, run.num_steps // 2):
        for call, wanted in zip(view.calls[step], view.outputs[step], strict=True):
            try:
                got = first_tensor(model(**call))
            except Exception:  # a batch of other sizes may be no batch of the model's
                return None
            bound = HALF if wanted.dtype in (torch.float16, torch.bfloat16) else AGREES
            if got.shape != wanted.shape or bool((got - wanted).float().norm() > bound * wanted.float().norm()):
                return None
    return view


def _is_same_call(a: Call, b: Call) -> bool:
    pairs = zip(pytree.tree_leaves(dict(a)), pytree.tree_leaves(dict(b)), strict=True)
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else True for x, y in pairs)
