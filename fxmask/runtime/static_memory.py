"""The memory that the recorded steps of one run work in. It stays where it is, so that a recording can be replayed.

    begin:   conditioning --copy--> inputs --replay--> once, table [T, ...]
    step i:  sample --copy--> inputs,  i --> index
             replay: row = table[index];  inputs, row, buffers --> buffers, outputs
             outputs --copy--> the caller's

Caches are buffers that every step's recording reads and writes where they are. What a run precomputes lies side by side in one
table per type, with the coefficients of forecasts behind it, so that one number chooses all that belongs to a step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxmask.guards.watch import WeightsState
from fxmask.ir.forecast import Slot
from fxmask.passes.assign_buffers import Buffers
from fxmask.runtime.coefficients import Coefficients, aligned
from fxmask.runtime.prologues import PrecomputedRow

Recording = tuple[Callable[[], None], Sequence[torch.Tensor], Sequence[torch.Tensor]]
MOST_RUNS = 8  # that have memory of their own at a time, per form of call; others run without recordings


@dataclass(frozen=True)
class _Place:
    """Where in its type's row a value lies."""

    dtype: torch.dtype
    offset: int
    count: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


class Table:
    """Values of every step side by side.

    Args:
        values: by name, a value like one step's.
        num_rows: T.
        coefficients: behind the values.
        device: of all.

    Attributes:
        index: ``[1]``, the step that ``select`` takes the row of.
        steps: every index, to be copied to ``index``.
    """

    def __init__(
        self, values: Mapping[str, torch.Tensor], num_rows: int, coefficients: Coefficients, device: torch.device
    ) -> None:
        self._coefficients = coefficients
        self._places: dict[str, _Place] = {}
        widths: dict[torch.dtype, int] = {}
        for name, value in values.items():
            sizes, strides = dense(value)
            count = value.numel()
            self._places[name] = _Place(value.dtype, widths.get(value.dtype, 0), count, sizes, strides)
            widths[value.dtype] = widths.get(value.dtype, 0) + aligned(count, value.dtype)
        self._behind = {dtype: widths.get(dtype, 0) for dtype in coefficients.tables}
        for dtype, table in coefficients.tables.items():
            widths[dtype] = widths.get(dtype, 0) + aligned(table.shape[1], dtype)
        self._tables = {d: torch.zeros(num_rows, width, dtype=d, device=device) for d, width in widths.items()}
        self._rows = {d: torch.zeros(1, width, dtype=d, device=device) for d, width in widths.items()}
        for dtype, table in coefficients.tables.items():
            self._tables[dtype][:, self._behind[dtype] : self._behind[dtype] + table.shape[1]] = table
        self.steps = torch.arange(num_rows, device=device).unsqueeze(1).unbind(0)
        self.index = torch.zeros(1, dtype=torch.int64, device=device)
        self.row = {name: self._view(self._rows[place.dtype][0], place) for name, place in self._places.items()}

    def __bool__(self) -> bool:
        return bool(self._tables)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All memory that it has."""
        return [*self._tables.values(), *self._rows.values(), self.index]

    def select(self) -> None:
        """Bring the row of step ``index`` to where the steps read it."""
        for dtype, table in self._tables.items():
            torch.index_select(table, 0, self.index, out=self._rows[dtype])

    def row_of(self, step: int) -> dict[str, torch.Tensor]:
        """The values of a step, in the table itself."""
        return {name: self._view(self._tables[place.dtype][step], place) for name, place in self._places.items()}

    def column(self, name: str) -> torch.Tensor:
        """One value for all steps, ``[T, ...]``, in the table itself."""
        place = self._places[name]
        table = self._tables[place.dtype]
        return table.as_strided((table.shape[0], *place.sizes), (table.stride(0), *place.strides), place.offset)

    def coefficients_at(self, step: int) -> list[torch.Tensor]:
        """Where ``select`` puts the coefficients of a step; the same place for all that share a graph."""
        places = self._coefficients.places[step]
        return [self._rows[d][0][self._behind[d] + offset : self._behind[d] + offset + n] for d, offset, n in places]

    def _view(self, row: torch.Tensor, place: _Place) -> torch.Tensor:
        return row[place.offset : place.offset + place.count].as_strided(
            place.sizes, place.strides, row.storage_offset() + place.offset
        )


@dataclass
class StaticMemory:
    """What one run at a time has.

    Attributes:
        inputs: the program's, in order.
        once: what is precomputed for all steps.
        table: what is precomputed for each.
        bytes: of each buffer of ``layout``.
        layout: which buffer a slot is in.
        views: stored values in the buffers.
        outputs: by position and form, where recordings leave results.
        steps: by step, how it is replayed.
        recorded: by what decides it, a recording, where it leaves its results, and the forms of the values that it stores.
        weights: how those were that the recordings read.
        held: these weights' memory, as long as a run may replay.
    """

    inputs: list[torch.Tensor]
    once: dict[str, torch.Tensor]
    table: Table
    layout: Buffers
    bytes: list[torch.Tensor]
    views: dict[Slot, torch.Tensor] = field(default_factory=dict)
    outputs: dict[Hashable, torch.Tensor] = field(default_factory=dict)
    steps: dict[int, Any] = field(default_factory=dict)
    recorded: dict[Hashable, Recording] = field(default_factory=dict)
    weights: WeightsState | None = None
    held: list[torch.UntypedStorage] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Of all of it."""
        tensors = [*self.inputs, *self.once.values(), *self.table.tensors, *self.bytes, *self.outputs.values()]
        return sum(x.numel() * x.element_size() for x in tensors)

    def place(self, slot: Slot, like: torch.Tensor) -> torch.Tensor:
        """Where a slot's value lies, in the layout of ``like``."""
        sizes, strides = dense(like)
        before = self.views.get(slot)
        if before is None or before.stride() != strides:
            with torch.inference_mode(False):  # a view of that mode could not be written to outside of it
                self.views[slot] = self.bytes[self.layout.of[slot]].view(like.dtype).as_strided(sizes, strides)
            if before is not None:
                self.steps.clear()  # what is replayed may read the other layout
        return self.views[slot]

    def output(self, k: int, like: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Where recordings leave result k, in the layout of ``like``."""
        sizes, strides = dense(like)
        key = (k, like.dtype, sizes, strides)
        if key not in self.outputs:
            with torch.inference_mode(False):
                self.outputs[key] = torch.empty_strided(sizes, strides, dtype=like.dtype, device=device)
        return self.outputs[key]

    def forget_recordings(self) -> None:
        """What was recorded reads memory that is no longer the model's."""
        self.steps.clear()
        self.recorded.clear()


class Lease:
    """A run's hold on static memory; it is given back when nobody holds the lease any more. Stands for the run's rows."""

    def __init__(self, memory: StaticMemory, give_back: Callable[[StaticMemory], None]) -> None:
        self.memory = memory
        self._give_back = give_back

    def __getitem__(self, step: int) -> PrecomputedRow:
        """What is precomputed for a step, for one that is not replayed."""
        return {**self.memory.once, **self.memory.table.row_of(step)}

    def __len__(self) -> int:
        return 1

    def __del__(self) -> None:
        self._give_back(self.memory)


class Memories:
    """The static memory of one form of call, lent to runs."""

    def __init__(self) -> None:
        self._free: list[tuple[object, StaticMemory]] = []  # whose it is; the one used last comes last
        self._lent = 0
        self._lock = threading.RLock()  # a lease may be collected, and give its memory back, inside

    def lend(self, owner: object, make: Callable[[], StaticMemory]) -> Lease | None:
        """Memory for a run of the plan that ``owner`` stands for; ``None`` if too many have some."""
        with self._lock:
            if self._lent >= MOST_RUNS:
                return None
            own = [k for k, (other, _) in enumerate(self._free) if other is owner]
            if own:
                memory = self._free.pop(own[-1])[1]
            else:
                if self._lent + len(self._free) >= MOST_RUNS:
                    self._free.pop(0)
                memory = make()
            self._lent += 1

        def give_back(returned: StaticMemory) -> None:
            with self._lock:
                returned.held = []
                self._lent -= 1
                self._free.append((owner, returned))

        return Lease(memory, give_back)


def dense(like: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes, and strides without gaps and overlaps: the tensor's own, if they have none."""
    blank = torch.empty_like(like, device="meta")
    return tuple(map(int, blank.shape)), tuple(map(int, blank.stride()))


def blank_like(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Zeros in dense memory of their own."""
    return [torch.empty_strided(*dense(x), dtype=x.dtype, device=device).zero_() for x in tensors]
