"""Reading timesteps without waiting for the device.

Reading a number off a GPU waits until everything before it has run. Samplers hand out views of one tensor of timesteps,
so its values are read once and a view is then recognised by where it points. A tensor that was made for one call is read
with a wait, unless the caller vouches for the sequence (a marked generation): then the step is predicted, and the value
is copied to the host in the background and checked at a later call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxmask._torch import version_of

MOST_VALUES = 65536  # a base larger than this is no list of timesteps


def on_host(tensor: torch.Tensor) -> bool:
    """Whether reading the tensor waits for nothing."""
    return tensor.device.type == "cpu"


@dataclass
class _Base:
    """Memory with timesteps whose values are known. Held by a tensor, so that it cannot become another tensor's."""

    tensor: torch.Tensor
    version: int
    values: list[float]

    @classmethod
    def of(cls, timestep: torch.Tensor) -> _Base:
        """Everything in the memory that ``timestep`` is a part of. Waits for the device."""
        whole = timestep.new_empty(0).set_(timestep.untyped_storage())
        return cls(timestep, version_of(timestep), whole.tolist())

    def holds(self, timestep: torch.Tensor) -> bool:
        """Whether ``timestep`` is one of the values, unchanged since they were read."""
        return (
            timestep.untyped_storage().data_ptr() == self.tensor.untyped_storage().data_ptr()
            and timestep.dtype == self.tensor.dtype
            and version_of(timestep) == self.version
        )


@dataclass
class _Pending:
    """A number on its way to the host, and what it was taken for: a timestep, or whether conditioning is what it was."""

    expected: float
    copy: torch.Tensor
    event: Any
    is_timestep: bool = True

    def arrived(self) -> bool:
        return self.event is None or bool(self.event.query())


@dataclass
class Clock:
    """Reads timesteps for one generation."""

    base: _Base | None = None
    pending: list[_Pending] = field(default_factory=list)

    def read(self, timestep: Any) -> float | None:
        """The value of a timestep, or ``None`` if the samples of a batch are at different ones.

        Args:
            timestep: as the denoiser was given it: a number, or a tensor ``[]``, ``[1]`` or ``[B]``.
        """
        if not isinstance(timestep, torch.Tensor) or on_host(timestep):
            return self.read_host(timestep)
        known = self._look_up(timestep)
        if known is not None:
            return known
        size = timestep.untyped_storage().nbytes() // timestep.element_size()
        if _steps_of(timestep) == 0 and size <= MOST_VALUES:
            self.base = _Base.of(timestep)
            return self._look_up(timestep)
        return _read(timestep)

    def read_host(self, timestep: Any) -> float | None:
        """The value of one that is a number, or lies on the host."""
        return _read(timestep) if isinstance(timestep, torch.Tensor) else float(timestep)

    def knows(self, timestep: Any) -> bool:
        """Whether ``read`` would not wait for the device."""
        return not isinstance(timestep, torch.Tensor) or on_host(timestep) or self._look_up(timestep) is not None

    def _look_up(self, timestep: torch.Tensor) -> float | None:
        """The value of a view of the known base."""
        if self.base is None or _steps_of(timestep) != 0 or not self.base.holds(timestep):
            return None
        return float(self.base.values[timestep.storage_offset()])

    def predict(self, timestep: torch.Tensor, expected: float) -> None:
        """Take ``timestep`` for ``expected`` now, and check it when its value has arrived on the host."""
        self.pending.append(_Pending(expected, *on_its_way(timestep.detach().reshape(-1)[:1])))

    def vouch(self, given: Sequence[torch.Tensor], held: Sequence[torch.Tensor]) -> None:
        """Take tensors for equal to others now, and check it when that has arrived on the host."""
        equal = torch.stack([(a == b).all() for a, b in zip(given, held, strict=True)]).all().reshape(1)
        self.pending.append(_Pending(1.0, *on_its_way(equal), is_timestep=False))

    def wrong_prediction(self, tolerance: float) -> str | None:
        """What a call was taken for and was not, in words, or ``None``; never waits."""
        while self.pending and self.pending[0].arrived():
            past = self.pending.pop(0)
            real = _host_value(past.copy)
            if abs(real - past.expected) > tolerance * max(abs(past.expected), 1e-3):
                self.pending.clear()
                if past.is_timestep:
                    return f"timestep {past.expected:g}, but it was at {real:g}"
                return "the next one of a sequence with other conditioning"
        return None


def on_its_way(values: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """A copy on the host, and when it will be there; ``None`` if it is already."""
    if not values.is_cuda:
        return values.to("cpu"), None
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(values.device))
    return copy, event


def _host_value(copy: torch.Tensor) -> float:
    """Number in a tensor that has arrived on the host."""
    return float(copy.tolist()[0])


def _steps_of(timestep: torch.Tensor) -> int:
    """Largest stride between elements; 0 if the tensor is one element, repeated or not."""
    if timestep.dim() < 2:
        return timestep.stride(0) if timestep.dim() and timestep.shape[0] > 1 else 0
    return max((s for s, n in zip(timestep.stride(), timestep.shape, strict=True) if n > 1), default=0)


def _read(timestep: torch.Tensor) -> float | None:
    if not _steps_of(timestep):
        while timestep.dim():
            timestep = timestep[0]
        return float(timestep.item())
    values = timestep.flatten().tolist()
    return float(values[0]) if all(value == values[0] for value in values) else None
