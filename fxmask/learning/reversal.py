"""Going through a run backwards with few of its states in memory: the rest are computed again (binomial checkpointing).

states kept besides the one at hand:   T     every step is computed once
                                       c     about T^(1/c) times, by the best splits (Griewank and Walther's revolve)
                                       0     T / 2 times
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TypeVar

S = TypeVar("S")


def backwards(state: S, steps: int, kept: int, advance: Callable[[S, int], S]) -> Iterator[tuple[int, S]]:
    """The state before every step, from the last one to the first.

    Args:
        state: before step 0; is not changed.
        steps: how many there are.
        kept: how many states may be kept besides that one.
        advance: ``(state, step) -> state after the step``; must leave the given state as it is.
    """
    yield from _backwards(state, 0, steps, max(0, kept), advance)


def _backwards(state: S, first: int, end: int, kept: int, advance: Callable[[S, int], S]) -> Iterator[tuple[int, S]]:
    while end - first > 1:
        middle = first + (_split(end - first, kept) if kept else end - first - 1)
        later = state
        for step in range(first, middle):
            later = advance(later, step)
        if not kept:
            yield middle, later
        else:
            yield from _backwards(later, middle, end, kept - 1, advance)
        del later
        end = middle
    if end > first:
        yield first, state


def advances(steps: int, kept: int) -> int:
    """How often ``backwards`` advances a state."""
    return _cost(steps, min(max(0, kept), steps))


@functools.lru_cache(maxsize=1 << 16)
def _cost(steps: int, kept: int) -> int:
    if steps <= 1:
        return 0
    if not kept:
        return steps * (steps - 1) // 2
    m = _split(steps, kept)
    return m + _cost(steps - m, min(kept - 1, steps - m)) + _cost(m, min(kept, m))


@functools.lru_cache(maxsize=1 << 16)
def _split(steps: int, kept: int) -> int:
    """Where the first kept state is best put, among ``1 .. steps - 1``."""
    if kept >= steps - 1:
        return 1
    return min(range(1, steps), key=lambda m: m + _cost(steps - m, min(kept - 1, steps - m)) + _cost(m, min(kept, m)))
