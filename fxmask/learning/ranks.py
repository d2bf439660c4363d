"""Learning on several ranks: each has a share of the trajectories, all come to the same plan.

Partial results are gathered and added in the order of the trajectories, so that the sum, and with it every decision, is
the same on every rank and the same as in one process. A rank that dies ends the others with an error at once, one that stops
ends them after a time limit: ``FXMASK_RANK_TIMEOUT`` seconds, half an hour if it is not set. What is gathered is small and
comes from host memory, so it goes through Gloo, whatever the ranks use otherwise: NCCL's time limit would end the process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fxmask.errors import DistributedError, InputError

logger = logging.getLogger(__name__)
T = TypeVar("T")
TIME_LIMIT = "FXMASK_RANK_TIMEOUT"
_channels: dict[tuple[Any, float], Any] = {}


@dataclass(frozen=True)
class Group:
    """The ranks that learn together.

    Attributes:
        rank: of this process.
        size: how many there are.
        channel: process group that they talk through; ``None`` for the default one.
    """

    rank: int = 0
    size: int = 1
    channel: Any = None

    @classmethod
    def single(cls) -> Group:
        """This process alone."""
        return cls()

    @classmethod
    def current(cls) -> Group:
        """The ranks of ``torch.distributed``, if it is initialised; else this process alone.

        Raises:
            InputError: the time limit is no positive number.
            DistributedError: another rank died or did not answer in time.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        rank, size, limit = dist.get_rank(), dist.get_world_size(), time_limit()
        if size == 1:
            return cls(rank, size)
        world = dist.group.WORLD
        if (world, limit) not in _channels:
            _channels.clear()
            made: list[Any] = []
            made_by = cls(rank, size)
            made_by._call(lambda: made.append(dist.new_group(backend="gloo", timeout=timedelta(seconds=limit))))
            _channels[world, limit] = made[0]
        return cls(rank, size, _channels[world, limit])

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's part: contiguous, so that gathered parts are in order; sizes differ by one at most."""
        count = len(items)
        return list(items[self.rank * count // self.size : (self.rank + 1) * count // self.size])

    def gather(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The parts of every rank, in the order of ranks.

        Raises:
            DistributedError: another rank died or did not answer in time.
        """
        if self.size == 1:
            return list(parts)
        everything: list[Any] = [None] * self.size
        self._call(lambda: dist.all_gather_object(everything, [x.cpu() for x in parts], group=self.channel))
        return [part for rank in everything for part in rank]

    def sum(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The sum of the parts of every rank, added in order."""
        total: torch.Tensor | None = None
        for part in self.gather(parts):
            total = part if total is None else total + part
        assert total is not None
        return total

    def agree(self, value: T) -> T:
        """The first rank's value, on every rank."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        self._call(lambda: dist.broadcast_object_list(box, src=0, group=self.channel))
        return box[0]  # type: ignore[no-any-return]

    def _call(self, collective: Callable[[], None]) -> None:
        try:
            collective()
        except Exception as error:  # connections fail in many ways
            raise DistributedError(
                f"rank {self.rank} of {self.size}: another rank died, or did not answer within {time_limit():g} seconds "
                f"({TIME_LIMIT}): {_brief(error)}. Start all ranks again; with checkpoint= learning goes on from its last state"
            ) from error


def time_limit() -> float:
    """Seconds that ranks wait for each other.

    Raises:
        InputError: the environment variable is no positive number.
    """
    text = os.environ.get(TIME_LIMIT, "1800")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise InputError(f"{TIME_LIMIT}={text!r} must be a number of seconds, the time that ranks wait for each other")
    return seconds


def _brief(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
