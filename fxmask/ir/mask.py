"""Mask, Forecast and Plan: plain frozen data that says what runs at which step.

A ``Mask`` is a decision, ``compute[i, b]``: 1 computes block ``b`` at step ``i`` and stores its value, 0 loads it. Where a step
makes several calls (guidance), they may have rows of their own: ``compute[i, l, b]``, and lanes may read each other's values.
All that comes after a mask works on calls in their order: ``Mask.by_call`` is the mask without lanes that has a row for each.
A ``Plan`` is a mask after liveness analysis: what each step really computes, loads, stores and drops.
Nothing here knows how a mask was chosen or how a plan will be compiled.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from fxmask.errors import MaskError
from fxmask.ir.forecast import Forecast, Load, Term, slot_of, step_of
from fxmask.ir.lanes import Lanes, check_rows
from fxmask.ir.text import mask_html, mask_text

if TYPE_CHECKING:
    from fxmask.ir.program import Program


@dataclass(frozen=True, eq=False, repr=False)
class Mask:
    """Which block computes at which step.

    Attributes:
        compute: bool ``[T, B]``; 1 = compute and store, 0 = load. Or ``[T, L, B]``, with a row for each of the L lanes, in the
            order in which a step calls them. Then a value that is loaded is the latest of its own lane, if that has computed
            one, else the latest of all, unless a forecast says what it is formed from.
        timesteps: the T timestep values as the denoiser receives them, in call order (one per step, not per lane).
        blocks: the B block names. A block of the program that is not listed always computes.
        forecast: how loaded values are formed; ``None`` is plain reuse everywhere.
        fingerprint: fingerprint of the program that the mask was made for, or ``None`` if it fits any program
            with blocks of these names.
        sampler: of what it was made for, as plain data; ``None`` if that is not known. Nothing here reads it: it is for those
            who save the mask.
        lanes: names of the L lanes; those that ``cache_context`` has, where a pipeline calls it. Empty if all lanes follow
            the same rows, each with values of its own.
        called: bool ``[T, L]``, the lanes that each step calls, where that changes (guidance that starts or stops midway);
            ``None`` if every step calls all. What ``compute`` says of the others does not matter.
        batched: whether one call holds all lanes, as equal parts of its batch, and not one call each.
        parts: where ``batched``, which part of the batch each lane is, if that is not their order: parts may be computed in any
            order, and what a lane is formed from has to come before it.

    Raises:
        MaskError: a wrong shape, an unknown or repeated block or lane, or a load with nothing stored before it.
    """

    compute: torch.Tensor
    timesteps: tuple[float, ...]
    blocks: tuple[str, ...]
    forecast: Forecast | None = None
    fingerprint: str | None = None
    sampler: Mapping[str, Any] | None = None
    lanes: tuple[str, ...] = ()
    called: torch.Tensor | None = None
    batched: bool = False
    parts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        compute = torch.as_tensor(self.compute).detach().cpu().bool().clone()
        timesteps = as_timesteps(self.timesteps)
        blocks = tuple(str(name) for name in self.blocks)
        forecast = Forecast(self.forecast) if isinstance(self.forecast, Mapping) else self.forecast
        lanes = tuple(str(name) for name in self.lanes)
        if compute.dim() == 3 and not lanes:
            lanes = tuple(map(str, range(compute.shape[1])))
        object.__setattr__(self, "compute", compute)
        object.__setattr__(self, "timesteps", timesteps)
        object.__setattr__(self, "blocks", blocks)
        object.__setattr__(self, "lanes", lanes)
        expected = (len(timesteps), *([len(lanes)] if lanes else []), len(blocks))
        if tuple(compute.shape) != expected:
            between = f", {len(lanes)} lanes" if lanes else ""
            raise MaskError(
                f"compute has shape {tuple(compute.shape)}, but {len(timesteps)} timesteps{between} and {len(blocks)} blocks "
                f"need {expected}; pass one row per denoising step{' and lane' if lanes else ''} and one column per block name"
            )
        if not timesteps:
            raise MaskError("a mask needs at least one step")
        repeated = sorted(name for names in (blocks, lanes) for name, count in Counter(names).items() if count > 1)
        if repeated:
            raise MaskError(f"names are repeated: {repeated}; list each block and each lane once")
        object.__setattr__(self, "called", self._checked_calls())
        if self.batched and (not lanes or self.called is not None):
            raise MaskError("batched is for masks with lanes of which every step calls all: they come as parts of one batch")
        object.__setattr__(self, "parts", self._checked_parts())
        if forecast is not None and lanes:
            forecast = self._numbering.named(forecast)
        object.__setattr__(self, "forecast", forecast)
        terms = self._numbering.by_call(forecast).terms if forecast else {}
        check_rows(self._rows.tolist(), self.blocks, terms, self._numbering)

    def _checked_calls(self) -> torch.Tensor | None:
        if self.called is None:
            return None
        called = torch.as_tensor(self.called).detach().cpu().bool().clone()
        if not self.lanes or tuple(called.shape) != (self.num_steps, len(self.lanes)):
            raise MaskError(
                f"called has shape {tuple(called.shape)}, but {self.num_steps} steps and {len(self.lanes)} lanes need an entry "
                "for each; it is for masks with lanes"
            )
        if not bool(called.any(dim=1).all()):
            raise MaskError(f"step {int(called.any(dim=1).int().argmin())} calls no lane; leave it out of the mask")
        return None if bool(called.all()) else called

    def _checked_parts(self) -> tuple[int, ...]:
        parts, every = tuple(map(int, self.parts)), tuple(range(len(self.lanes)))
        if parts and (not self.batched or tuple(sorted(parts)) != every):
            raise MaskError(
                f"parts={parts} does not say which part of a batch each of {len(self.lanes)} lanes is; give the numbers "
                f"{list(every)} in some order, with batched=True"
            )
        return () if parts == every else parts

    @classmethod
    def ones(cls, program: Program, timesteps: Iterable[float], lanes: Sequence[str] = ()) -> Mask:
        """The mask that computes every block of ``program`` at every step: ``[T, B]`` of ones, or ``[T, L, B]``."""
        steps = as_timesteps(timesteps)
        names = tuple(block.name for block in program.blocks)
        ones = torch.ones(len(steps), *([len(lanes)] if lanes else []), len(names), dtype=torch.bool)
        return cls(ones, steps, names, fingerprint=program.fingerprint, lanes=tuple(lanes))

    @property
    def num_steps(self) -> int:
        """T, the number of denoising steps."""
        return len(self.timesteps)

    @property
    def part_of_lane(self) -> tuple[int, ...]:
        """Which part of a batch that holds all lanes each of them is."""
        return self.parts or tuple(range(len(self.lanes)))

    @property
    def order(self) -> tuple[tuple[int, int], ...]:
        """(step, lane) of every row, in the order in which they are called. Without lanes every row is a step: lane 0."""
        return self._numbering.order

    def call_of(self, step: int, lane: int) -> int | None:
        """The row of a step's call of a lane; ``None`` if the step does not call it."""
        return self._numbering.row(step, lane)

    def step_after(self, row: int, lane: int) -> int:
        """The step of the first call of a lane that is ``row`` or comes after it; T if there is none."""
        return row if not self.lanes else self._numbering.next_steps[lane][row]

    @functools.cached_property
    def _numbering(self) -> Lanes:
        return Lanes(self.num_steps, self.lanes, self.called)

    @property
    def _rows(self) -> torch.Tensor:
        """bool ``[calls, B]``."""
        if not self.lanes:
            return self.compute
        return torch.stack([self.compute[step, lane] for step, lane in self.order])

    @functools.cached_property
    def by_call(self) -> Mask:
        """The same decisions as a mask without lanes whose rows are the calls, in order.

        Every value that is loaded says from where, because the row before may be another lane's.
        """
        if not self.lanes:
            return self
        rows, terms = self._rows, dict(self._numbering.by_call(self.forecast).terms if self.forecast else {})
        for b, name in enumerate(self.blocks):
            column = rows[:, b].tolist()
            for row, computes in enumerate(column):
                if not computes and (row, name) not in terms:
                    terms[row, name] = ((self._numbering.reused(row, column), 1.0),)
        timesteps = tuple(self.timesteps[step] for step, _ in self.order)
        return Mask(rows, timesteps, self.blocks, Forecast(terms) if terms else None, self.fingerprint, self.sampler)

    def folded(self, calls: Mask) -> Mask:
        """A mask like ``by_call``, with the lanes of this one. The inverse of ``by_call``."""
        if not self.lanes:
            return calls
        compute = torch.ones_like(self.compute)
        for row, (step, lane) in enumerate(self.order):
            compute[step, lane] = calls.compute[row]
        forecast = None if calls.forecast is None else self._numbering.by_lane(calls.forecast, calls.compute, self.blocks)
        return replace(self, compute=compute, forecast=forecast, fingerprint=calls.fingerprint)

    def blends(self, step: int, block: str) -> bool:
        """Whether ``step`` computes ``block`` and then blends it with other values. Of a mask without lanes."""
        named = self.forecast is not None and (step, block) in self.forecast.terms
        return named and bool(self.compute[step, self.blocks.index(block)])

    def loaded_from(self, step: int, block: str, value: int) -> Load:
        """How ``step`` forms a cut value of ``block``, where it is loaded or blended. Of a mask without lanes."""
        return Load(block, value, step, tuple((slot_of(source, block, value), c) for source, c in self.terms(step, block)))

    def terms(self, step: int, block: str) -> tuple[Term, ...]:
        """The (source, coefficient) pairs that form ``block`` at ``step``, where it is loaded. Of a mask without lanes."""
        explicit = self.forecast.terms.get((step, block)) if self.forecast else None
        if explicit is not None:
            return explicit
        column = self.compute[:step, self.blocks.index(block)].nonzero().flatten()
        return ((int(column[-1]), 1.0),)

    def starting_at(self, start: int) -> Mask:
        """The mask for a run that begins at step ``start`` with nothing stored.

        A load at a step ``>= start`` that reads from a step before ``start`` becomes a compute. Rows before
        ``start`` never run; they are kept, as computes, so that steps keep their numbers.
        """
        if self.lanes:
            first = next(row for row, (step, _) in enumerate(self.order) if step == start)
            return self.folded(self.by_call.starting_at(first))
        compute = self.compute.clone()
        compute[:start] = True
        kept: dict[tuple[int, str], tuple[Term, ...]] = {}
        for b, name in enumerate(self.blocks):
            fresh = False  # whether some step >= start has computed the block
            for step in range(start, self.num_steps):
                if not compute[step, b]:
                    explicit = self.forecast.terms.get((step, name)) if self.forecast else None
                    usable = fresh if explicit is None else all(step_of(source) >= start for source, _ in explicit)
                    if not usable:
                        compute[step, b] = True
                    elif explicit is not None:
                        kept[step, name] = explicit
                elif self.blends(step, name) and all(step_of(x) >= start for x, _ in self.terms(step, name)):
                    kept[step, name] = self.terms(step, name)
                fresh = fresh or bool(compute[step, b])
        return Mask(compute, self.timesteps, self.blocks, Forecast(kept) if kept else None, self.fingerprint)

    def __str__(self) -> str:
        return mask_text(self)

    def __repr__(self) -> str:
        share = float(self._rows.double().mean()) if self.blocks else 1.0
        forecasts = len(self.forecast.terms) if self.forecast else 0
        lanes = f"{len(self.lanes)} lanes, " if self.lanes else ""
        return f"Mask({self.num_steps} steps, {lanes}{len(self.blocks)} blocks, {share:.0%} computed, {forecasts} forecasts)"

    def _repr_html_(self) -> str:
        return mask_html(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return (
            (self.timesteps, self.blocks, self.lanes, self.batched, self.parts)
            == (other.timesteps, other.blocks, other.lanes, other.batched, other.parts)
            and self.order == other.order
            and torch.equal(self._rows, other._rows)
            and dict(self.forecast.terms if self.forecast else {}) == dict(other.forecast.terms if other.forecast else {})
        )

    def __hash__(self) -> int:
        return hash((self.timesteps, self.blocks, self.lanes, self._rows.numpy().tobytes()))


def as_timesteps(timesteps: Any) -> tuple[float, ...]:
    """Timesteps given as numbers or as a tensor.

    Raises:
        MaskError: they are something else, e.g. the run that has them.
    """
    try:
        return tuple(torch.as_tensor(timesteps, dtype=torch.float64).flatten().tolist())
    except (TypeError, ValueError, RuntimeError) as error:
        raise MaskError(
            f"timesteps must be numbers, got {type(timesteps).__name__} ({error}); of a recorded run pass run.timesteps"
        ) from None


def as_names(blocks: Sequence[Any]) -> tuple[str, ...]:
    """Names of blocks given as ``Block`` objects or strings."""
    return tuple(getattr(block, "name", block) for block in blocks)
