"""The calls of a mask with lanes, numbered in their order, and forecasts in terms of lanes and in terms of calls.

row(step, lane)      the number of a call; what comes after a mask knows nothing but these numbers
(step, lane, block)  a forecast's key, with sources  step | (block, step) | (block, step, lane): of their own lane, or of
                     the one that they name, whose call may be one of the same step that comes before
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fxmask.errors import MaskError
from fxmask.ir.forecast import INPUT, Forecast, Source, Term


class Lanes:
    """Numbers of calls.

    Args:
        num_steps: T.
        names: of the L lanes, in the order in which a step calls them; empty if every row is a step.
        called: bool ``[T, L]``, ``None`` if every step calls all lanes.
    """

    def __init__(self, num_steps: int, names: tuple[str, ...], called: torch.Tensor | None) -> None:
        self.num_steps = num_steps
        self.names = names
        lanes = range(max(1, len(names)))
        wanted = called.tolist() if called is not None else [[True] * len(lanes)] * num_steps
        self.order = tuple((step, lane) for step in range(num_steps) for lane in lanes if wanted[step][lane])
        self._rows = {call: row for row, call in enumerate(self.order)}

    def row(self, step: int, lane: int) -> int | None:
        """The number of a call; ``None`` if the step does not make it."""
        return self._rows.get((step, lane))

    @functools.cached_property
    def next_steps(self) -> list[list[int]]:
        """By lane and row, the step of the lane's first call from that row on; T where there is none."""
        found = []
        for lane in range(max(1, len(self.names))):
            steps = [self.num_steps] * (len(self.order) + 1)
            for row in reversed(range(len(self.order))):
                steps[row] = self.order[row][0] if self.order[row][1] == lane else steps[row + 1]
            found.append(steps)
        return found

    def reused(self, row: int, computes: Sequence[bool]) -> int:
        """The call whose value a call loads where no forecast says so: the latest of its own lane, else the latest of all.

        Args:
            row: the call, not the first one.
            computes: by call, whether it computes the block; the first does.
        """
        before = [r for r in range(row) if computes[r]]
        own = [r for r in before if self.order[r][1] == self.order[row][1]]
        return (own or before)[-1]

    def label(self, row: int) -> str:
        """What a call is named in messages: ``step 3``, ``step 3 of lane 'cond'``."""
        if not self.names or not 0 <= row < len(self.order):
            return f"step {row}"
        step, lane = self.order[row]
        return f"step {step} of lane {self.names[lane]!r}"

    def named(self, forecast: Forecast) -> Forecast:
        """A forecast with a lane in every key. An entry of no lane is one of every lane that the step calls.

        Raises:
            MaskError: it names a lane that there is not.
        """
        found: dict[tuple[Any, ...], tuple[Term, ...]] = {}
        for (step, *lane, block), terms in forecast.terms.items():
            for name in lane or [self.names[n] for n in range(len(self.names)) if (step, n) in self._rows]:
                lanes = self._named(name, step, block)
                found[step, lanes, block] = tuple((self._source(source, lanes, step, block), c) for source, c in terms)
        return Forecast(found)

    def _named(self, name: Any, step: int, block: str) -> str:
        """A lane's name, of its name or number."""
        if isinstance(name, int) and 0 <= name < len(self.names):
            return self.names[name]
        if str(name) not in self.names:
            raise MaskError(f"forecast of block {block!r} at step {step} names lane {name!r}; the lanes are {list(self.names)}")
        return str(name)

    def _source(self, source: Source, lane: str, step: int, block: str) -> Source:
        if not isinstance(source, tuple) or len(source) == 2:
            return source
        other = self._named(source[2], step, block)
        if other != lane:
            return source[0], source[1], other
        return source[1] if source[0] == block else (source[0], source[1])

    def by_call(self, forecast: Forecast) -> Forecast:
        """A forecast whose keys have lanes, in numbers of calls.

        Raises:
            MaskError: it names a call that no step makes.
        """
        if not self.names:
            return forecast
        found: dict[tuple[Any, ...], tuple[Term, ...]] = {}
        for (step, lane, block), terms in forecast.terms.items():
            row = self._known(step, lane, block, step)
            found[row, block] = tuple((self._call(source, lane, block, step), c) for source, c in terms)
        return Forecast(found)

    def _call(self, source: Source, lane: str, block: str, step: int) -> Source:
        if not isinstance(source, tuple):
            return self._known(source, lane, block, step)
        of = source[2] if len(source) == 3 else lane
        row = self._known(source[1], of, block, step)
        return row if source[0] == block else (source[0], row)

    def _known(self, at: int, lane: str, block: str, step: int) -> int:
        row = self._rows.get((at, self.names.index(lane)))
        if row is None:
            raise MaskError(
                f"forecast of block {block!r} at step {step} names step {at} of lane {lane!r}, which is not called there"
            )
        return row

    def by_lane(self, calls: Forecast, compute: torch.Tensor, blocks: Sequence[str]) -> Forecast | None:
        """The inverse of ``by_call``, without the entries that say what a lane does of itself: load its latest value.

        Args:
            calls: in numbers of calls.
            compute: bool ``[calls, B]``.
            blocks: the B names.
        """
        found: dict[tuple[Any, ...], tuple[Term, ...]] = {}
        for (row, block), terms in calls.terms.items():
            step, lane = self.order[row]
            column = compute[: row + 1, blocks.index(block)].tolist()
            if column[row] or terms != ((self.reused(row, column), 1.0),):
                found[step, self.names[lane], block] = tuple((self._of_lane(source, lane, block), c) for source, c in terms)
        return Forecast(found) if found else None

    def _of_lane(self, source: Source, lane: int, block: str) -> Source:
        other, row = (source[0], source[1]) if isinstance(source, tuple) else (block, source)
        step, of = self.order[row]
        if of != lane:
            return other, step, self.names[of]
        return step if other == block else (other, step)


def check_rows(
    rows: Sequence[Sequence[bool]], blocks: Sequence[str], terms: Mapping[tuple[Any, ...], tuple[Term, ...]], lanes: Lanes
) -> None:
    """Refuse a load that nothing was stored for.

    Args:
        rows: ``[calls, B]``, whether a call computes a block.
        blocks: the B names.
        terms: of forecasts, in numbers of calls.
        lanes: of the calls.

    Raises:
        MaskError: says which, and what to do.
    """
    seen: set[str] = set()
    for row, values in enumerate(rows):
        for name, computes in zip(blocks, values, strict=True):
            if computes:
                seen.add(name)
            elif name not in seen:
                raise MaskError(
                    f"{lanes.label(row)} loads block {name!r}, but no earlier step computes it; set compute[0, b] = True "
                    "(the first step has nothing cached)"
                )
    column = {name: b for b, name in enumerate(blocks)}
    for (row, name), given in terms.items():
        if name not in column or not 0 <= row < len(rows):
            raise MaskError(f"forecast names (step {row}, block {name!r}), which is not in the mask")
        blend = rows[row][column[name]]
        if blend and row not in [source for source, _ in given]:
            raise MaskError(
                f"forecast names block {name!r} at {lanes.label(row)}, where the mask computes it; remove the entry, or give "
                f"the computed value a share: source {lanes.order[row][0]}"
            )
        for source, _ in given:
            other, at = (source[0], source[1]) if isinstance(source, tuple) else (name, source)
            latest = row if other == INPUT or (blend and other == name) else row - 1
            if not 0 <= at <= latest or (other in column and not rows[at][column[other]]):
                raise MaskError(
                    f"forecast of block {name!r} at {lanes.label(row)} reads {lanes.label(at)} of {other!r}, which is not an "
                    "earlier step that computes it"
                )
