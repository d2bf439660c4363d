"""The coefficients of all of a plan's forecasts in one tensor per type, put on the device once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxmask.ir.combine import coefficient_dtype
from fxmask.ir.forecast import Load
from fxmask.ir.plan import Plan
from fxmask.ir.program import Program

ALIGNMENT = 64  # bytes: generated kernels read aligned memory in larger pieces, and expect what they were compiled for


@dataclass(frozen=True)
class Coefficients:
    """The coefficients of a plan.

    Attributes:
        tables: by type, ``[T, n]``: row i has the coefficients of step i, those of each forecast at an aligned place.
        places: for each step, for each of its forecasts, type, offset in the row, and number of terms. Steps that share a graph
            have equal places.
    """

    tables: dict[torch.dtype, torch.Tensor]
    places: tuple[tuple[tuple[torch.dtype, int, int], ...], ...]

    @classmethod
    def of(cls, plan: Plan, program: Program) -> Coefficients:
        """Those of a plan, on the program's device."""
        rows: list[dict[torch.dtype, list[float]]] = []
        places = []
        device = torch.device("cpu")
        for step in plan.steps:
            row: dict[torch.dtype, list[float]] = {}
            own = []
            for load in (x for x in step.formed if not x.plain):
                like = _value_of(load, program)
                device, dtype = like.device, coefficient_dtype(like.dtype)
                values = row.setdefault(dtype, [])
                own.append((dtype, len(values), len(load.terms)))
                values += [c for _, c in load.terms] + [0.0] * (aligned(len(load.terms), dtype) - len(load.terms))
            rows.append(row)
            places.append(tuple(own))
        tables = {}
        for dtype in dict.fromkeys(dtype for row in rows for dtype in row):
            width = max(len(row.get(dtype, ())) for row in rows)
            table = torch.zeros(len(rows), width, dtype=dtype)
            for i, row in enumerate(rows):
                if dtype in row:
                    table[i, : len(row[dtype])] = torch.tensor(row[dtype], dtype=dtype)
            tables[dtype] = table.to(device)
        return cls(tables, tuple(places))

    def at(self, step: int) -> tuple[torch.Tensor, ...]:
        """Those of a step, one tensor ``[number of terms]`` per forecast."""
        return tuple(self.tables[dtype][step, offset : offset + n] for dtype, offset, n in self.places[step])


def aligned(count: int, dtype: torch.dtype) -> int:
    """At least ``count`` elements, so that what follows is aligned."""
    each = max(1, ALIGNMENT // dtype.itemsize)
    return -(-count // each) * each


def _value_of(load: Load, program: Program) -> torch.Tensor:
    value: torch.Tensor = program.node(program.block(load.block).values[load.value]).meta["val"]
    return value
