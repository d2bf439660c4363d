"""Which blocks each step forms, and with what coefficients."""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fxmask.ir.forecast import INPUT, Source, clean_source

Terms = tuple[tuple[Source, float], ...]
Coefficients = Mapping[tuple[int, str], Terms]


class Origin(enum.Enum):
    """How the steps that compute everything were chosen."""

    EVEN = "even"
    BENT = "bent"  # denser at the beginning or at the end
    PLACED = "placed"  # by dynamic programming over measured runs
    MIXED = "mixed"  # the same, with levels of different cost
    PER_BLOCK = "per block"  # a column of its own for every block
    SEARCHED = "searched"  # a neighbour of another schedule
    INSTANT = "instant"  # on recorded runs alone
    EVERYTHING = "everything"  # nothing is formed


@dataclass(frozen=True)
class Schedule:
    """Which blocks each step forms instead of computing them.

    Attributes:
        loads: T sets of block names; the first is empty. With several lanes T * L, one for each call in their order.
        history: K, how many fresh values a forecast may read.
        samples: how many noisy samples (the present one first) a forecast of the whole output may read besides. If any, and
            the sampler is stochastic, blocks that cannot read samples are reused as they are.
        blend: if not 0, these blocks may read so many fresh values more, and where a step computes its output from formed
            blocks, that is blended with so many outputs before it and with the samples. Nothing of this is fitted along
            the way; it starts as plain reuse, for ``refine_all``.
        lanes: L, if the lanes have rows of their own; 1 if all follow the same rows. With rows of their own a forecast may read
            the other lanes too.
        origin: how it was made.
        family: what it forms: a level's name, or several. Finalists are taken from different families first.
    """

    loads: tuple[frozenset[str], ...]
    history: int = 3
    samples: int = 0
    blend: int = 0
    lanes: int = 1
    origin: Origin = field(default=Origin.EVERYTHING, compare=False)
    family: str = field(default="", compare=False)

    @property
    def description(self) -> str:
        """For reports: ``output, even``."""
        return ", ".join(dict.fromkeys(part for part in (self.family, self.origin.value) if part))

    @functools.cached_property
    def formed(self) -> frozenset[str]:
        """Every block that some step forms."""
        return frozenset().union(*self.loads)


def lane_sources(computed: Sequence[bool], row: int, lanes: int, history: int, samples: int) -> list[Source]:
    """What a forecast at a row of several lanes reads, the latest first.

    The latest values of the lane itself, then the latest of every lane that has computed one since; of these also the values
    where this one was fresh: what the two differed by there says more than either.

    Args:
        computed: by row before this one, whether it computes the block.
        row: the call.
        lanes: L.
        history: values of the lane itself, at most.
        samples: noisy samples, the present one first, at most.
    """
    fresh = [r for r in reversed(range(row)) if computed[r]]
    own = [r for r in fresh if r % lanes == row % lanes][:history]
    sources: list[Source] = [*own]
    since = own[0] // lanes if own else -1
    for lane in range(lanes):
        now = next((r for r in fresh if r % lanes == lane), None)
        if lane != row % lanes and now is not None and now // lanes > since:
            then = [r - r % lanes + lane for r in own[:2]]
            sources += [now, *(r for r in then if computed[r])]
    return [*sources, *((INPUT, r) for r in [row, *own][:samples])]


def difference_held(sources: Sequence[Source], row: int, lanes: int) -> Terms:
    """A lane's latest value, and what the others have changed by since: their difference stays as it was.

    Args:
        sources: what ``lane_sources`` says that it may read.
        row: the call.
        lanes: L.
    """
    calls = [source for source in sources if isinstance(source, int)]
    own = calls[0]
    found: dict[Source, float] = {source: float(source == own) for source in sources}
    pairs = []
    for lane in range(lanes):
        now = next((r for r in calls if r % lanes == lane and r // lanes > own // lanes), None)
        then = own - own % lanes + lane
        if lane != row % lanes and now is not None and own % lanes == row % lanes and then in calls:
            pairs.append((now, then))
    for now, then in pairs:
        found[now] += 1 / len(pairs)
        found[then] -= 1 / len(pairs)
    return tuple(found.items())


def is_plain_reuse(schedule: Schedule, key: tuple[int, str], terms: Terms) -> bool:
    """Whether a formed value is what the mask takes without a forecast: the latest value, or the computed one itself."""
    step, block = key
    if any(source == step for source, _ in terms):
        return all(c == float(source == step) for source, c in terms)
    before = [j for j in reversed(range(step)) if block not in schedule.loads[j]]  # as the mask has it
    own = [j for j in before if j % schedule.lanes == step % schedule.lanes]
    return terms == (((own or before)[0], 1.0),)


def free_directions(coefficients: Coefficients) -> list[tuple[int, tuple[str, ...], int]]:
    """(step, blocks, term) of every degree of freedom."""
    names: dict[int, list[str]] = {}
    for (step, block), terms in coefficients.items():
        if len(terms) > 1:  # what is reused as it is stays so
            names.setdefault(step, []).append(block)
    return [
        (step, tuple(sorted(blocks)), k)
        for step, blocks in sorted(names.items())
        for k in range(max(len(coefficients[step, block]) for block in blocks))
    ]


def moved_by(
    coefficients: Coefficients, step: int, blocks: Iterable[str], k: int, amount: float
) -> dict[tuple[int, str], Terms]:
    """The coefficients with term ``k`` of some blocks at a step changed by ``amount``."""
    result = dict(coefficients)
    for block in blocks:
        terms = list(result[step, block])
        if k < len(terms):
            terms[k] = (terms[k][0], terms[k][1] + amount)
        result[step, block] = tuple(terms)
    return result


def schedule_key(schedule: Schedule) -> str:
    """What a schedule computes, as a key of the journal."""
    rows = [sorted(loads) for loads in schedule.loads]
    blend = f", blended with {schedule.blend}" if schedule.blend else ""
    lanes = f", {schedule.lanes} lanes" if schedule.lanes > 1 else ""
    return repr((rows, schedule.history, schedule.samples)) + blend + lanes


def coefficients_to_data(coefficients: Coefficients) -> list[Any]:
    """Coefficients as JSON."""
    return [[i, block, terms] for (i, block), terms in coefficients.items()]


def coefficients_from_data(rows: Iterable[Any]) -> dict[tuple[int, str], Any]:
    """Coefficients from what ``coefficients_to_data`` made of them."""
    return {(i, block): tuple((clean_source(s, block), c) for s, c in terms) for i, block, terms in rows}
