"""Memory for cached values that stays where it is: which buffer each stored value goes to.

    step 0  store f@0 -> buffer 0        step 2  load f@0, g@0; store f@2 -> buffer 2
    step 0  store g@0 -> buffer 1        step 4  load f@2;      store f@4 -> buffer 0      f@0 was dropped after step 2

Steps whose values lie in the same buffers can share one recording, so a value prefers the buffer that the same cut value had
before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fxmask.ir.forecast import Slot
from fxmask.ir.plan import Plan


@dataclass(frozen=True)
class Buffers:
    """Where the cached values of a plan lie.

    Attributes:
        sizes: bytes of each buffer.
        of: slot -> index of its buffer.
    """

    sizes: tuple[int, ...]
    of: Mapping[Slot, int]


def assign_buffers(plan: Plan, bytes_of: Callable[[Slot], int]) -> Buffers:
    """A buffer for every slot that the plan stores.

    A buffer is free once the step that reads its value last has read it: the step itself may store to it, after its reads.

    Args:
        plan: whose slots these are.
        bytes_of: size of a slot's value.
    """
    sizes: list[int] = []
    of: dict[Slot, int] = {}
    free: list[int] = []
    before: dict[tuple[str, int], list[int]] = {}  # buffers that a cut value had, the latest last
    for i, step in enumerate(plan.steps[plan.start :], plan.start):
        free.extend(of[slot] for slot in step.drop if slot in of)
        stored = [Slot(block, value, i) for block, value in step.store]
        # Those whose own buffer is free first: another value could take it.
        for slot in sorted(stored, key=lambda x: not any(b in free for b in before.get(x[:2], ()))):
            size = bytes_of(slot)
            own = [b for b in before.get(slot[:2], ()) if b in free]
            fitting = own or [b for b in free if sizes[b] == size]
            if fitting:
                chosen = fitting[0]
                free.remove(chosen)
            else:
                chosen = len(sizes)
                sizes.append(size)
            of[slot] = chosen
            had = before.setdefault(slot[:2], [])
            if chosen not in had:
                had.append(chosen)
    return Buffers(tuple(sizes), of)
