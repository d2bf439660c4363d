"""Plans with rows for each lane where the sampler injects noise: some steps compute only the lane that guidance weighs most.

    first lane   # # # . # # # . ...
    others       # + # . # + # . ...        + is the lane's latest value, and what the first has changed by since

What noise was injected since, only a value that is computed knows. The difference between lanes depends on it much less, so a
step that computes one lane may be nearly as good as one that computes all. Where guidance is strong its errors are multiplied,
and such steps are worth little; where they belong, if anywhere, measured errors of runs say (``place_mixed``).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from fxmask.learning.effort import Effort
from fxmask.learning.lane_moments import shares
from fxmask.learning.levels import Level, named_levels
from fxmask.learning.local_search import neighbour
from fxmask.learning.own_rows import Known, OwnRows
from fxmask.learning.place import place_mixed
from fxmask.learning.runs import MAX_RUN
from fxmask.learning.schedule import Schedule

LEVELS = 2  # sets of blocks that one lane may form
SAMPLES = 2  # that a forecast of the output reads


class HeldLanes(OwnRows):
    """Searches such plans; see ``OwnRows``."""

    is_stochastic = True

    @property
    def can_form(self) -> bool:
        """Whether there is something to form."""
        return bool(self._named)

    @property
    def _named(self) -> dict[frozenset[str], str]:
        return named_levels(self.student.program, self.student.cost, self.student.computed)

    def _screened(self, budget: float, alike: Sequence[Schedule], effort: Effort, known: Known) -> Iterator[Schedule]:
        """Where measured errors say, with what plans without lanes form; at quick effort where a guess says."""
        whole = [(replace(level, lanes=(True,) * self.lanes, samples=SAMPLES), errors) for level, errors in known]
        whole = whole or [(x, self._errors(x, effort)) for x in self._levels(alike, known, (True,) * self.lanes)[:1]]
        parts: Known = []
        for rest in range(1, self.lanes):  # the last ones, which come after what they read
            for level in self._levels(alike, known, (False,) * (self.lanes - rest) + (True,) * rest):
                part = level, self._errors(level, effort)
                parts = [*parts, part]
                yield from self._in_places(budget, [*whole, part], [part])
        if len(parts) > 1:
            yield from self._in_places(budget, [*whole, *parts], parts)

    def _in_places(self, budget: float, *choices: Known) -> Iterator[Schedule]:
        for levels in choices:
            found = place_mixed(self.student, levels, budget)
            if found is not None and self._has_part(found):
                yield found

    def _levels(self, alike: Sequence[Schedule], known: Known, lanes: tuple[bool, ...]) -> list[Level]:
        """What some lanes may form: all branches, which are reused as they are, and what plans without lanes form."""
        named, branches = self._named, frozenset(block.name for block in self.student.program.branches)
        used = Counter(blocks for schedule in alike for blocks in schedule.loads)
        found = [Level(named[branches], branches, 1, SAMPLES)] if branches in named else []
        found += [level for level, _ in known]
        found += [Level(named[blocks], blocks, 1, SAMPLES) for blocks, _ in used.most_common() if blocks in named]
        chosen: dict[frozenset[str], Level] = {}
        for level in found:
            chosen.setdefault(level.loads, level)
        rest = "" if all(lanes) else f" of {sum(lanes)} of {self.lanes} lanes"
        levels = list(chosen.values())[:LEVELS]
        return [replace(level, name=level.name + rest, samples=SAMPLES, lanes=lanes) for level in levels]

    def _errors(self, level: Level, effort: Effort) -> torch.Tensor:
        """Errors of runs ``[T, R]``, or a guess up to a factor: with what weight guidance adds what is formed, by length."""
        if effort.starts:
            return self.measured.runs(level)
        weights = shares(self.student.trajectories[0])
        formed = sum(weight for weight, forms in zip(weights, level.lanes, strict=True) if forms)
        lengths = torch.arange(1, MAX_RUN + 1, dtype=torch.float64)
        return (formed * lengths).square().expand(self.student.num_steps, -1)

    def _has_part(self, schedule: Schedule) -> bool:
        """Whether some step computes some lanes and forms others."""
        rows = [schedule.loads[k : k + self.lanes] for k in range(0, len(schedule.loads), self.lanes)]
        return any(len(set(row)) > 1 for row in rows)

    def _neighbour(self, schedule: Schedule, rng: random.Random) -> Schedule | None:
        """Steps exchange what they do, in all lanes."""
        lanes = self.lanes
        steps = [
            frozenset(f"{lane} {name}" for lane in range(lanes) for name in schedule.loads[k + lane])
            for k in range(0, len(schedule.loads), lanes)
        ]
        found = neighbour(replace(schedule, loads=tuple(steps)), rng)
        if found is None:
            return None
        rows = [[x.split(" ", 1)[1] for x in step if x.startswith(f"{k} ")] for step in found.loads for k in range(lanes)]
        return replace(found, loads=tuple(map(frozenset, rows)))
