"""Mask, Forecast and Plan: plain frozen data that says what runs at which step.

A ``Mask`` is a decision, ``compute[i, b]``: 1 computes block ``b`` at step ``i`` and stores its value, 0 loads it.
A ``Plan`` is a mask after liveness analysis: what each step really computes, loads, stores and drops.
Nothing here knows how a mask was chosen or how a plan will be compiled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fxmask.errors import MaskError
from fxmask.ir.forecast import INPUT, Forecast, Load, Term, slot_of, step_of
from fxmask.ir.text import mask_html, mask_text

if TYPE_CHECKING:
    from fxmask.ir.program import Program


@dataclass(frozen=True, eq=False, repr=False)
class Mask:
    """Which block computes at which step.

    Attributes:
        compute: bool ``[T, B]``; 1 = compute and store, 0 = load.
        timesteps: the T timestep values as the denoiser receives them, in call order (one per step, not per lane).
        blocks: the B block names. A block of the program that is not listed always computes.
        forecast: how loaded values are formed; ``None`` is plain reuse everywhere.
        fingerprint: fingerprint of the program that the mask was made for, or ``None`` if it fits any program
            with blocks of these names.
        sampler: of what it was made for, as plain data; ``None`` if that is not known. Nothing here reads it: it is for those
            who save the mask.

    Raises:
        MaskError: a wrong shape, an unknown or repeated block, or a load with nothing stored before it.
    """

    compute: torch.Tensor
    timesteps: tuple[float, ...]
    blocks: tuple[str, ...]
    forecast: Forecast | None = None
    fingerprint: str | None = None
    sampler: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        compute = torch.as_tensor(self.compute).detach().cpu().bool().clone()
        timesteps = as_timesteps(self.timesteps)
        blocks = tuple(str(name) for name in self.blocks)
        forecast = Forecast(self.forecast) if isinstance(self.forecast, Mapping) else self.forecast
        object.__setattr__(self, "compute", compute)
        object.__setattr__(self, "timesteps", timesteps)
        object.__setattr__(self, "blocks", blocks)
        object.__setattr__(self, "forecast", forecast)
        expected = (len(timesteps), len(blocks))
        if tuple(compute.shape) != expected:
            raise MaskError(
                f"compute has shape {tuple(compute.shape)}, but {len(timesteps)} timesteps and {len(blocks)} blocks "
                f"need {expected}; pass one row per denoising step and one column per block name"
            )
        if not timesteps:
            raise MaskError("a mask needs at least one step")
        repeated = sorted(name for name, count in Counter(blocks).items() if count > 1)
        if repeated:
            raise MaskError(f"block names are repeated: {repeated}; list each block once")
        self._check_sources()

    def _check_sources(self) -> None:
        rows = self.compute.tolist()
        seen: set[str] = set()
        for step, row in enumerate(rows):
            for name, computes in zip(self.blocks, row, strict=True):
                if computes:
                    seen.add(name)
                elif name not in seen:
                    raise MaskError(
                        f"step {step} loads block {name!r}, but no earlier step computes it; set compute[0, b] = True "
                        "(the first step has nothing cached)"
                    )
        column = {name: b for b, name in enumerate(self.blocks)}
        for (step, name), terms in (self.forecast.terms if self.forecast else {}).items():
            if name not in column or not 0 <= step < len(rows):
                raise MaskError(f"forecast names (step {step}, block {name!r}), which is not in the mask")
            blend = rows[step][column[name]]
            if blend and step not in [source for source, _ in terms]:
                raise MaskError(
                    f"forecast names block {name!r} at step {step}, where the mask computes it; remove the entry, or give "
                    f"the computed value a share: source {step}"
                )
            for source, _ in terms:
                other, at = source if isinstance(source, tuple) else (name, source)
                latest = step if other == INPUT or (blend and other == name) else step - 1
                if not 0 <= at <= latest or (other in column and not rows[at][column[other]]):
                    raise MaskError(
                        f"forecast of block {name!r} at step {step} reads step {at} of {other!r}, which is not an "
                        "earlier step that computes it"
                    )

    @classmethod
    def ones(cls, program: Program, timesteps: Iterable[float]) -> Mask:
        """The mask that computes every block of ``program`` at every step: ``[T, B]`` of ones."""
        steps = as_timesteps(timesteps)
        names = tuple(block.name for block in program.blocks)
        ones = torch.ones(len(steps), len(names), dtype=torch.bool)
        return cls(ones, steps, names, fingerprint=program.fingerprint)

    @property
    def num_steps(self) -> int:
        """T, the number of denoising steps."""
        return len(self.timesteps)

    def blends(self, step: int, block: str) -> bool:
        """Whether ``step`` computes ``block`` and then blends it with other values."""
        named = self.forecast is not None and (step, block) in self.forecast.terms
        return named and bool(self.compute[step, self.blocks.index(block)])

    def loaded_from(self, step: int, block: str, value: int) -> Load:
        """How ``step`` forms a cut value of ``block``, where it is loaded or blended."""
        return Load(block, value, step, tuple((slot_of(source, block, value), c) for source, c in self.terms(step, block)))

    def terms(self, step: int, block: str) -> tuple[Term, ...]:
        """The (source, coefficient) pairs that form ``block`` at ``step``, where it is loaded."""
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
        share = float(self.compute.double().mean()) if self.blocks else 1.0
        forecasts = len(self.forecast.terms) if self.forecast else 0
        return f"Mask({self.num_steps} steps, {len(self.blocks)} blocks, {share:.0%} computed, {forecasts} forecasts)"

    def _repr_html_(self) -> str:
        return mask_html(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return (
            torch.equal(self.compute, other.compute)
            and self.timesteps == other.timesteps
            and self.blocks == other.blocks
            and dict(self.forecast.terms if self.forecast else {}) == dict(other.forecast.terms if other.forecast else {})
        )

    def __hash__(self) -> int:
        return hash((self.timesteps, self.blocks, self.compute.numpy().tobytes()))


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
