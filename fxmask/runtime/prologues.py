"""What a run computes before its first step, for all steps at once."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from fxmask.backends.package import NotExportedError
from fxmask.backends.protocol import PrologueCompiler
from fxmask.guards.watch import WeightWatch
from fxmask.ir.graph import attribute
from fxmask.ir.program import Program
from fxmask.passes.batch_steps import batch_steps
from fxmask.passes.precompute import Prologue, Prologues, make_prologues

logger = logging.getLogger(__name__)
PrecomputedRow = Mapping[str, torch.Tensor]  # precomputed values of one step, by name


class Rows(Protocol):
    """What is precomputed for each step of a run; false if nothing is."""

    def __len__(self) -> int:
        """0 if nothing is precomputed."""

    def __getitem__(self, step: int, /) -> PrecomputedRow:
        """The precomputed values of a step."""


class PrologueRunner:
    """Computes the precomputed values of a generation.

    Args:
        program: the captured denoiser.
        timesteps: of the plan.
        batched: compute the table's rows for all steps in one go, which differs from the program by rounding.
        compiler: of what runs once per generation; without one it runs operator by operator.
    """

    def __init__(
        self, program: Program, timesteps: Sequence[float], batched: bool, compiler: PrologueCompiler | None = None
    ) -> None:
        self.program = program
        self.prologues: Prologues = make_prologues(program, len(timesteps))
        self._compiler = compiler
        if compiler and self.prologues.once and self.prologues.once.inputs:  # what needs only weights is too little
            once = replace(self.prologues.once, compiled=compiler.compile_once(self.prologues.once.graph_module))
            self.prologues = replace(self.prologues, once=once)
        self._timesteps = timesteps
        self._wanted = batched
        self._batched: Callable[..., list[torch.Tensor]] | None = None
        self._steps: torch.Tensor | None = None
        self._values: list[float] | None = None  # the timesteps that the table is for, in the type that the program takes

    @property
    def is_batched(self) -> bool:
        """Whether the table's rows are computed for all steps at once; known for good after the first time."""
        return self.prologues.table is not None and self._wanted

    @property
    def completes(self) -> bool:
        """Whether each step computes its own values of the timestep."""
        return self.prologues.table is not None and not self._wanted

    def begin(self, tensors: Sequence[torch.Tensor]) -> list[PrecomputedRow]:
        """The precomputed values that can be had before the first step: one row per step, or none if there are none.

        Args:
            tensors: the program's inputs; which timestep is in them does not matter.
        """
        once, columns = self.compute(tensors)
        if not columns:
            return [once] * len(self._timesteps) if once else []
        separate = [column.unbind(0) for column in columns.values()]
        return [{**once, **dict(zip(columns, row, strict=True))} for row in zip(*separate, strict=True)]

    def compute(self, tensors: Sequence[torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """What depends on no timestep, and values ``[T, ...]`` for all timesteps; none of these without a batched table."""
        prologues = self.prologues
        once = prologues.once(tensors, {}) if prologues.once else {}
        if prologues.table is None or not self._wanted:
            return once, {}
        try:
            return once, dict(zip(prologues.table.values, self._columns(prologues.table, tensors, once), strict=True))
        except Exception as error:  # an operator that has no batched form
            if getattr(self._compiler, "closed", False) and not isinstance(error, NotExportedError):
                raise  # a table that was exported, and is broken
            logger.warning("the timestep's values are computed at each step", exc_info=True)
            self._wanted = False
            return once, {}

    @functools.cached_property
    def weights(self) -> WeightWatch:
        """What precomputed values are made of, besides the program's inputs."""
        modules = [part.graph_module for part in (self.prologues.once, self.prologues.table) if part is not None]
        found = [attribute(module, node) for module in modules for node in module.graph.find_nodes(op="get_attr")]
        return WeightWatch([x for x in found if isinstance(x, torch.Tensor)])

    def is_exact(self, step: int, timestep: float) -> bool:
        """Whether the table's row of a step was computed at this very timestep, not at one that counts as the same."""
        return self._values is None or self._values[step] == timestep

    def complete(self, row: PrecomputedRow, tensors: Sequence[torch.Tensor]) -> PrecomputedRow:
        """The row with what was not had before this step."""
        table = self.prologues.table
        missing = table is not None and table.values[0] not in row
        return {**row, **table(tensors, dict(row))} if table is not None and missing else row

    def at(self, tensors: Sequence[torch.Tensor]) -> PrecomputedRow:
        """The precomputed values of a call that stands alone."""
        return self.prologues.at(tensors)

    def _columns(self, table: Prologue, tensors: Sequence[torch.Tensor], once: dict[str, torch.Tensor]) -> list[Any]:
        """One tensor ``[T, ...]`` per value of the table."""
        name = self.program.signature.timestep
        assert name is not None
        position = self.program.inputs.index(name)
        if self._steps is None:
            like = tensors[position]
            steps = torch.tensor(self._timesteps, dtype=torch.float64).to(like.dtype)
            self._values = [float(value) for value in steps.tolist()]
            steps = steps.to(like.device)
            self._steps = steps.reshape(-1, *(1,) * like.dim()).expand(-1, *like.shape).contiguous()
        if self._batched is None:
            compiler = self._compiler.compile_batched if self._compiler else None
            self._batched = batch_steps(table, position, self._steps, tensors, once, compiler)
        values = self._batched(self._steps, tensors, once)
        wanted = [self.program.node(node).meta["val"] for node in table.values]
        return [_like(value, meta) for value, meta in zip(values, wanted, strict=True)]


def _like(rows: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
    """Rows in memory as the program would have each of them."""
    sizes, strides = tuple(map(int, meta.shape)), tuple(map(int, meta.stride()))
    if tuple(rows.shape[1:]) == sizes and tuple(rows.stride()[1:]) == strides:
        return rows
    return torch.stack([torch.empty_strided(sizes, strides, dtype=x.dtype, device=x.device).copy_(x) for x in rows])
