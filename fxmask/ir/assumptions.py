"""Conditions on values that a captured graph takes for granted: it holds one side of each branch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx


@dataclass(frozen=True)
class Condition:
    """``test`` of some values must be as it was.

    Attributes:
        values: positions of its arguments in what ``Assumptions.module`` returns.
        test: of these, as Python numbers.
        expected: what it gave at capture.
        pinned: whether the value itself counts, rather than the outcome of a comparison.
        inputs: positions of the program's inputs that the values are made of.
        place: in the model's code.
    """

    values: tuple[int, ...]
    test: Callable[..., Any]
    expected: Any
    pinned: bool
    inputs: tuple[int, ...]
    place: str


@dataclass(frozen=True)
class Assumptions:
    """What must be true of a call's tensors for a graph to be what the model computes.

    Attributes:
        module: from the program's inputs to the tensors that the conditions are about, one element each.
        conditions: all of them.
    """

    module: fx.GraphModule
    conditions: tuple[Condition, ...]

    def broken(self, tensors: Sequence[torch.Tensor]) -> str | None:
        """Where the model would take another way for these tensors; ``None`` if nowhere. Waits for the device."""
        values = [x.item() for x in self.module(*tensors)]
        for condition in self.conditions:
            if condition.test(*(values[k] for k in condition.values)) != condition.expected:
                return condition.place
        return None

    def of_inputs(self, positions: set[int]) -> Assumptions | None:
        """The conditions that depend on some of these inputs; ``None`` if there are none."""
        kept = tuple(condition for condition in self.conditions if positions.intersection(condition.inputs))
        return Assumptions(self.module, kept) if kept else None
