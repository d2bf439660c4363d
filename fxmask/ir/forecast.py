"""Forecast: how values that are not computed are formed from stored ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from fxmask.errors import MaskError

INPUT = "input"
"""Name under which a forecast may read the sample that a step is called with; see ``Program.input_block``."""


Source = int | tuple[str, int] | tuple[str, int, str]
"""What a forecast reads: an earlier step's value of the block itself, (another block, step), or (a block, step, lane)."""


Term = tuple[Source, float]
"""One term of a forecast: (source, coefficient)."""


class Slot(NamedTuple):
    """One cached tensor: value ``value`` (index into ``Block.values``) of block ``block``, stored at ``step``."""

    block: str
    value: int
    step: int


@dataclass(frozen=True)
class Forecast:
    """How loaded values are formed from stored ones.

    The value of block ``b`` loaded at step ``i`` is ``sum(c * stored[b, j] for j, c in terms[i, b])``, where
    ``stored[b, j]`` is the value that ``b`` computed at the earlier step ``j``. A source ``(a, j)`` reads block ``a``
    instead, which the mask must list and whose values must have the shape of ``b``'s; ``("input", j)`` is the sample that
    step ``j`` was called with, and there ``j`` may be ``i`` itself. A (step, block) without an entry is plain reuse: the
    latest computed value with coefficient 1.

    Where the mask computes ``b`` at step ``i``, an entry is a *blend*: one of its sources must be ``i``, the value that
    ``b`` has just been computed to be, and the sum takes its place (and is what is stored).

    In a mask with lanes the key may be ``(step, lane, block)``, by the lane's name or number, and a source
    ``(block, step, lane)`` reads another lane, of the same step too where that lane is called before. What names no lane is of
    its own.

    Attributes:
        terms: ``{(step, block name): ((source, coefficient), ...)}``.
    """

    terms: Mapping[tuple[Any, ...], tuple[Term, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        clean: dict[tuple[Any, ...], tuple[Term, ...]] = {}
        for (step, *lane, block), terms in self.terms.items():
            pairs = terms.items() if isinstance(terms, Mapping) else terms
            key = (int(step), *lane, str(block))
            clean[key] = tuple((clean_source(source, str(block)), float(c)) for source, c in pairs)
            sources = [source for source, _ in clean[key]]
            if not sources or len(set(sources)) != len(sources):
                raise MaskError(
                    f"forecast of block {block!r} at step {step}: sources {sources} are empty or repeated; "
                    "give each source step once"
                )
            if not all(math.isfinite(c) for _, c in clean[key]):
                raise MaskError(f"forecast of block {block!r} at step {step}: a coefficient is no finite number")
        object.__setattr__(self, "terms", MappingProxyType(clean))

    def __reduce__(self) -> tuple[Any, ...]:
        return Forecast, (dict(self.terms),)


Cache = MutableMapping[Slot, torch.Tensor]
"""Stored values of one lane."""


def clean_source(source: Any, block: str) -> Source:
    """A source in its one form: the step alone for the block itself, else (block, step), which JSON turns into a list."""
    if not isinstance(source, (tuple, list)):
        return int(source)
    other, step, *lane = source
    if lane:
        return str(other), int(step), lane[0]
    return int(step) if other == block else (str(other), int(step))


def slot_of(source: Source, block: str, value: int) -> Slot:
    """The cached tensor that a source stands for, in the forecast of a cut value of ``block``."""
    other, step = (source[0], source[1]) if isinstance(source, tuple) else (block, source)
    return Slot(other, 0 if other == INPUT else value, step)


class Load(NamedTuple):
    """A cut value that a step reads from the cache, and what it is formed from."""

    block: str
    value: int
    step: int
    terms: tuple[tuple[Slot, float], ...]

    @property
    def plain(self) -> bool:
        """Whether the value is one stored value, unchanged."""
        return len(self.terms) == 1 and self.terms[0][1] == 1.0 and self.terms[0][0].step < self.step

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The cached tensors that are read. A term of the present step is no cached tensor."""
        return tuple(slot for slot, _ in self.terms if slot.step < self.step)

    @property
    def form(self) -> tuple[Any, ...]:
        """What decides which graph forms the value: everything but which steps are read, and the coefficients."""
        sources = tuple((slot.block if slot.block != self.block else None, slot.step == self.step) for slot, _ in self.terms)
        return (self.block, self.value, self.plain, sources)


def step_of(source: Source) -> int:
    """The step that a source was stored at."""
    return source[1] if isinstance(source, tuple) else source
