"""Emitting cached values, and what is formed from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from fxmask._torch import FakeTensorMode
from fxmask.ir.combine import coefficient_dtype, combine
from fxmask.ir.forecast import Load
from fxmask.ir.graph import MARK
from fxmask.ir.program import Program

aten = torch.ops.aten


class ValueFormer:
    """Emits cache placeholders, and the values that are formed from them.

    Args:
        program: the program.
        graph: the step graph, with the program's placeholders in it and nothing else.
        load: cut values that are not computed.
        blend: cut values that are computed first.
        inputs: the program's placeholders -> the step graph's.
    """

    def __init__(
        self,
        program: Program,
        graph: fx.Graph,
        load: tuple[Load, ...],
        blend: tuple[Load, ...],
        inputs: Mapping[fx.Node, fx.Node],
    ) -> None:
        names = {x: program.block(x.block).values[x.value] for x in load + blend}
        self.graph = graph
        self.loads = {names[x]: x for x in load}
        self.blends = {names[x]: x for x in blend}
        self._present = inputs[program.node(program.input_block.values[0])]
        self._like = {x: program.node(names[x]) for x in load + blend}
        self._coefficients = {x: self._coefficient_input(x) for x in load + blend if not x.plain}
        self._stored: dict[Load, list[fx.Node]] = {}
        for x in load + blend:
            self._stored[x] = [graph.placeholder(f"cache_{names[x]}_{k}") for k in range(len(x.slots))]
            for node in self._stored[x]:
                node.meta = dict(self._like[x].meta)

    def _coefficient_input(self, x: Load) -> fx.Node:
        node = self.graph.placeholder(f"coefficients_{self._like[x].name}")
        like = self._like[x].meta["val"]
        with FakeTensorMode():
            node.meta = {"val": torch.empty(len(x.terms), dtype=coefficient_dtype(like.dtype), device=like.device)}
        return node

    @property
    def cached(self) -> list[fx.Node]:
        """Every cache placeholder."""
        return [node for nodes in self._stored.values() for node in nodes]

    def loaded(self, name: str) -> fx.Node:
        """The value of a loaded node."""
        x = self.loads[name]
        return self._stored[x][0] if x.plain else self._combine(x, None)

    def blended(self, name: str, computed: fx.Node) -> fx.Node:
        """What takes the place of a node that has just been computed."""
        return self._combine(self.blends[name], computed)

    def _combine(self, x: Load, computed: fx.Node | None) -> fx.Node:
        ahead = iter(self._stored[x])
        sources = []
        for slot, _ in x.terms:
            present = computed if slot.block == x.block else self._present
            sources.append(next(ahead) if slot.step < x.step else present)
        result = combine(self._call, sources, self._coefficients[x], self._like[x].meta["val"].dtype)
        assert isinstance(result, fx.Node)
        marks = {key: value for key, value in (computed.meta if computed else {}).items() if key.startswith(MARK)}
        result.meta = {**self._like[x].meta, **marks}
        return result

    def _call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta = {"val": _value_of(target, args, kwargs)}
        return node


def _value_of(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Shape and type of what ``combine`` emits: a coefficient, or a value like its first argument."""
    like: torch.Tensor = args[0].meta["val"]
    if target is aten.select.int:
        return like[args[2]]
    dtype = kwargs.get("dtype", like.dtype)
    if dtype == like.dtype:
        return like
    with FakeTensorMode():
        return torch.empty_strided(tuple(like.shape), tuple(like.stride()), dtype=dtype, device=like.device)
