"""How long calls take, many of them one after the other: by the host's clock, or by a GPU's without waiting for each call.

To wait for a GPU after each call is to measure the launch, which takes longer than many kernels do. Events that are recorded
around each call are read at the end; they tell the time of the kernels alone as long as launches stay ahead of the device, so
the device is kept busy with nothing first, before every few calls, for longer than launching these takes:

    host     occupy | launch 1 .. 32 | occupy | launch 33 .. 64 | ...                  wait
    device   ........ nothing ........ | e 1 e e 2 e .. e 32 e | nothing | e 33 e ..
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from fxmask._torch import occupy_gpu
from fxmask.timing import timed

AHEAD = 32  # calls that are launched ahead; a GPU's queue takes about a thousand kernels and events
SHORTEST, LONGEST = 0.001, 0.05  # seconds that the device may be kept busy for them


class Stopwatch(Protocol):
    """Times calls."""

    def time(self, run: Callable[..., Any], *arguments: Any) -> Any:
        """What a call returns."""

    def seconds(self) -> list[float]:
        """Of each call since this was asked last, in order."""


class HostStopwatch:
    """By the host's clock, around each call."""

    def __init__(self) -> None:
        self._seconds: list[float] = []

    def time(self, run: Callable[..., Any], *arguments: Any) -> Any:
        """What a call returns; the device is waited for."""
        seconds, result = timed(run, *arguments)
        self._seconds.append(seconds)
        return result

    def seconds(self) -> list[float]:
        """Of each call since this was asked last."""
        found, self._seconds = self._seconds, []
        return found


class Events(Protocol):
    """A device that notes down when it comes to a place in its queue."""

    def record(self) -> Any:
        """A place in the queue."""

    def occupy(self, seconds: float) -> None:
        """Do nothing for so long, when its turn comes."""

    def wait(self) -> None:
        """Until all is done."""

    def between(self, first: Any, second: Any) -> float:
        """Seconds from one place to another that were both reached."""


class CudaEvents:
    """Events of the stream that is current on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def record(self) -> torch.cuda.Event:
        """A place in the stream."""
        event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def occupy(self, seconds: float) -> None:
        """Do nothing for at least so long."""
        occupy_gpu(self._device, seconds)

    def wait(self) -> None:
        """Until all is done."""
        torch.cuda.synchronize(self._device)

    def between(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        """Seconds between two places."""
        return float(first.elapsed_time(second)) / 1000


class EventStopwatch:
    """By a device's events; it is waited for when the seconds are asked for.

    Args:
        events: of the device.
        host: the host's clock, in seconds.
    """

    def __init__(self, events: Events, host: Callable[[], float] = time.perf_counter) -> None:
        self._events = events
        self._host = host
        self._pairs: list[tuple[Any, Any]] = []
        self._launching: list[float] = []  # seconds that launching each few calls took
        self._ahead = LONGEST  # until it is known what launching takes

    def time(self, run: Callable[..., Any], *arguments: Any) -> Any:
        """What a call returns, perhaps before it is done."""
        if len(self._pairs) % AHEAD == 0:
            self._events.occupy(self._ahead)
            self._launching.append(0.0)
        before = self._host()
        first = self._events.record()
        result = run(*arguments)
        self._pairs.append((first, self._events.record()))
        self._launching[-1] += self._host() - before
        return result

    def seconds(self) -> list[float]:
        """Of each call since this was asked last."""
        self._events.wait()
        found = [self._events.between(*pair) for pair in self._pairs]
        self._ahead = min(LONGEST, max(SHORTEST, 2 * max(self._launching, default=0.0)))
        self._pairs, self._launching = [], []
        return found


def stopwatch_for(device: torch.device) -> Stopwatch:
    """The one that tells what a device takes for the work itself."""
    return EventStopwatch(CudaEvents(device)) if device.type == "cuda" else HostStopwatch()
