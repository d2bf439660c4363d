"""Mask, Forecast and Plan: plain frozen data that says what runs at which step.

A ``Mask`` is a decision, ``compute[i, b]``: 1 computes block ``b`` at step ``i`` and stores its value, 0 loads it.
A ``Plan`` is a mask after liveness analysis: what each step really computes, loads, stores and drops.
Nothing here knows how a mask was chosen or how a plan will be compiled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fxmask.errors import MaskError

if TYPE_CHECKING:
    from fxmask.program import Program

INPUT = "input"
"""Name under which a forecast may read the sample that a step is called with; see ``Program.input_block``."""

Source = int | tuple[str, int]
"""What a forecast reads: an earlier step's value of the block itself, or (another block, step)."""

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
    instead, whose values must have the shape of ``b``'s; ``("input", j)`` is the sample that step ``j`` was called with,
    and there ``j`` may be ``i`` itself. A (step, block) without an entry is plain reuse: the latest computed value with
    coefficient 1.

    Where the mask computes ``b`` at step ``i``, an entry is a *blend*: one of its sources must be ``i``, the value that
    ``b`` has just been computed to be, and the sum takes its place (and is what is stored).

    Attributes:
        terms: ``{(step, block name): ((source, coefficient), ...)}``.
    """

    terms: Mapping[tuple[int, str], tuple[Term, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        clean: dict[tuple[int, str], tuple[Term, ...]] = {}
        for (step, block), terms in self.terms.items():
            pairs = terms.items() if isinstance(terms, Mapping) else terms
            clean[int(step), str(block)] = tuple((clean_source(source, str(block)), float(c)) for source, c in pairs)
            sources = [source for source, _ in clean[int(step), str(block)]]
            if not sources or len(set(sources)) != len(sources):
                raise MaskError(
                    f"forecast of block {block!r} at step {step}: sources {sources} are empty or repeated; "
                    "give each source step once"
                )
        object.__setattr__(self, "terms", MappingProxyType(clean))

    def __reduce__(self) -> tuple[Any, ...]:
        return Forecast, (dict(self.terms),)


def clean_source(source: Any, block: str) -> Source:
    """A source in its one form: the step alone for the block itself, else (block, step), which JSON turns into a list."""
    if not isinstance(source, (tuple, list)):
        return int(source)
    other, step = source
    return int(step) if other == block else (str(other), int(step))


def slot_of(source: Source, block: str, value: int) -> Slot:
    """The cached tensor that a source stands for, in the forecast of a cut value of ``block``."""
    other, step = source if isinstance(source, tuple) else (block, source)
    return Slot(other, 0 if other == INPUT else value, step)


@dataclass(frozen=True, eq=False)
class Mask:
    """Which block computes at which step.

    Attributes:
        compute: bool ``[T, B]``; 1 = compute and store, 0 = load.
        timesteps: the T timestep values as the denoiser receives them, in call order (one per step, not per lane).
        blocks: the B block names. A block of the program that is not listed always computes.
        forecast: how loaded values are formed; ``None`` is plain reuse everywhere.
        fingerprint: fingerprint of the program that the mask was made for, or ``None`` if it fits any program
            with blocks of these names.

    Raises:
        MaskError: a wrong shape, an unknown or repeated block, or a load with nothing stored before it.
    """

    compute: torch.Tensor
    timesteps: tuple[float, ...]
    blocks: tuple[str, ...]
    forecast: Forecast | None = None
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        compute = torch.as_tensor(self.compute).detach().cpu().bool().clone()
        timesteps = torch.as_tensor(self.timesteps, dtype=torch.float64).flatten().tolist()
        blocks = tuple(str(name) for name in self.blocks)
        forecast = Forecast(self.forecast) if isinstance(self.forecast, Mapping) else self.forecast
        object.__setattr__(self, "compute", compute)
        object.__setattr__(self, "timesteps", tuple(timesteps))
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
        repeated = sorted({name for name in blocks if blocks.count(name) > 1})
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
        steps = torch.as_tensor(timesteps, dtype=torch.float64).flatten()
        names = tuple(block.name for block in program.blocks)
        ones = torch.ones(len(steps), len(names), dtype=torch.bool)
        return cls(ones, tuple(steps.tolist()), names, fingerprint=program.fingerprint)

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
                    usable = fresh if explicit is None else all(_step_of(source) >= start for source, _ in explicit)
                    if not usable:
                        compute[step, b] = True
                    elif explicit is not None:
                        kept[step, name] = explicit
                elif self.blends(step, name) and all(_step_of(x) >= start for x, _ in self.terms(step, name)):
                    kept[step, name] = self.terms(step, name)
                fresh = fresh or bool(compute[step, b])
        return Mask(compute, self.timesteps, self.blocks, Forecast(kept) if kept else None, self.fingerprint)

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


@dataclass(frozen=True)
class StepPlan:
    """What one step does.

    Attributes:
        compute: names of the blocks that are live and computed.
        load: cut values read from the cache, in graph order.
        blend: cut values that are computed and then combined with others, in graph order.
        store: (block, value index) written to the cache: exactly what some later step reads from this one.
        emit: (block, value index) that the step's graph returns: ``store``, and what other steps that share the graph
            store.
        drop: slots that no later step reads, to be freed after this step.
        graph: index of the step graph that the step runs; steps with equal indices share one.
        macs: multiply-accumulates of the step at the batch size that the program was captured with.
    """

    compute: frozenset[str]
    load: tuple[Load, ...]
    store: tuple[tuple[str, int], ...]
    emit: tuple[tuple[str, int], ...]
    drop: tuple[Slot, ...]
    graph: int
    macs: int
    blend: tuple[Load, ...] = ()

    @property
    def formed(self) -> tuple[Load, ...]:
        """Every cut value that is formed from others: loads, then blends."""
        return self.load + self.blend

    @property
    def key(self) -> tuple[Any, ...]:
        """What decides which graph a step runs: live computes, shape of the loads, stored values."""
        return (self.compute, tuple(x.form for x in self.load), tuple(x.form for x in self.blend), self.emit)


@dataclass(frozen=True)
class Plan:
    """The rectified mask with its load and store sets.

    Attributes:
        mask: the mask with every dead compute turned off.
        steps: one ``StepPlan`` per step.
        start: the first step that runs; 0 unless made for a run that begins in the middle.
        full_macs: MACs of one unmasked step.
        peak_cache_bytes: largest number of bytes cached at once, per lane, at the captured batch size.
        fingerprint: fingerprint of the program.
        source: the mask as it was given; a run that starts elsewhere is rectified from it again.
    """

    mask: Mask
    steps: tuple[StepPlan, ...]
    start: int
    full_macs: int
    peak_cache_bytes: int
    fingerprint: str
    source: Mask = field(compare=False, repr=False)

    @property
    def macs_per_step(self) -> tuple[int, ...]:
        """MACs of each step that runs."""
        return tuple(step.macs for step in self.steps[self.start :])

    @property
    def mac_ratio(self) -> float:
        """Ideal speed-up: MACs of the unmasked run over MACs of this one."""
        return self.full_macs * len(self.macs_per_step) / max(1, sum(self.macs_per_step))

    @property
    def distinct_graphs(self) -> int:
        """How many different step graphs the plan runs."""
        return len({step.graph for step in self.steps[self.start :]})

    @property
    def kept_per_step(self) -> tuple[float, ...]:
        """Share of the full MACs that each step still computes."""
        return tuple(macs / max(1, self.full_macs) for macs in self.macs_per_step)


def _step_of(source: Source) -> int:
    return source[1] if isinstance(source, tuple) else source


def as_names(blocks: Sequence[Any]) -> tuple[str, ...]:
    """Names of blocks given as ``Block`` objects or strings."""
    return tuple(getattr(block, "name", block) for block in blocks)
