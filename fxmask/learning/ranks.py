"""Learning on several ranks: each has a share of the trajectories, all come to the same plan.

Partial results are gathered and added in the order of the trajectories, so that the sum, and with it every decision, is
the same on every rank and the same as in one process. A rank that dies ends the others with an error: collectives have a
time limit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fxmask.errors import DistributedError

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """The ranks that learn together.

    Attributes:
        rank: of this process.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def single(cls) -> Group:
        """This process alone."""
        return cls()

    @classmethod
    def current(cls) -> Group:
        """The ranks of ``torch.distributed``, if it is initialised; else this process alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

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
        self._call(lambda: dist.all_gather_object(everything, [part.cpu() for part in parts]))
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
        self._call(lambda: dist.broadcast_object_list(box, src=0))
        return box[0]  # type: ignore[no-any-return]

    def _call(self, collective: Callable[[], None]) -> None:
        try:
            collective()
        except (RuntimeError, ValueError) as error:
            raise DistributedError(
                f"rank {self.rank} of {self.size}: another rank died, or did not answer in time ({_brief(error)}). "
                "Start all ranks again; with checkpoint= learning goes on from its last state"
            ) from error


def _brief(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
