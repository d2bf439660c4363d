"""StepGraph: one specialised graph and how to call it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class StepGraph:
    """One specialised graph and how to call it.

    Attributes:
        graph_module: called as ``graph_module(*inputs, *precomputed, *coefficients, *cached)``; returns
            (outputs..., stores...).
        inputs: positions, in ``Program.inputs``, of the arguments that the graph needs.
        precomputed: names of the precomputed values that the graph needs.
        coefficients: positions, in the step's ``formed`` values, of the forecasts; a coefficient tensor follows for each.
        load: (block, value index, number of cached values) in the order of the cached arguments.
        store: (block, value index) of the extra outputs.
        num_outputs: how many outputs come before them.
        steps: the steps that run this graph.
    """

    graph_module: fx.GraphModule
    inputs: tuple[int, ...]
    precomputed: tuple[str, ...]
    coefficients: tuple[int, ...]
    load: tuple[tuple[str, int, int], ...]
    store: tuple[tuple[str, int], ...]
    num_outputs: int
    steps: tuple[int, ...]

    @property
    def name(self) -> str:
        """For messages: the steps that run it."""
        return "step graph of steps " + ", ".join(map(str, self.steps))
