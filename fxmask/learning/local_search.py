"""Neighbours of a schedule, for local search."""

from __future__ import annotations

import random
from dataclasses import replace

from fxmask.learning.schedule import Origin, Schedule

OFFSETS = (-3, -2, -1, 1, 2, 3)  # how far apart the two steps of an exchange are
WHOLE = 0.5  # how often two steps exchange everything
SOME = 0.85  # how often they exchange everything or a few blocks; else one becomes like the other


def neighbour(schedule: Schedule, rng: random.Random) -> Schedule | None:
    """Two steps close to each other exchange what they form, or some blocks; or a step does as another one does.

    ``None`` if the steps that were drawn form the same.
    """
    steps = len(schedule.loads)
    loads = list(schedule.loads)
    i = rng.randrange(1, steps)
    j = i + rng.choice(OFFSETS)
    if not 1 <= j < steps or loads[i] == loads[j]:
        return None
    drawn = rng.random()
    different = sorted(loads[i] ^ loads[j])
    if drawn < WHOLE or len(different) == 1:
        loads[i], loads[j] = loads[j], loads[i]
    elif drawn < SOME:
        some = frozenset(rng.sample(different, rng.randint(1, max(1, len(different) // 3))))
        loads[i], loads[j] = loads[i] ^ some, loads[j] ^ some
    else:
        loads[i] = loads[j]
    return replace(schedule, loads=tuple(loads), origin=Origin.SEARCHED)
