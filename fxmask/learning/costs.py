"""What a step costs, as a share of a step that computes everything."""

from __future__ import annotations

from collections.abc import Mapping

from fxmask.ir.program import Program
from fxmask.passes.cut_graph import live_under


class StepCosts:
    """Costs of steps by the blocks that they form, each found once.

    Args:
        program: the captured denoiser.
        prices: what each node of the graph costs a step, by name; ``None``: its multiply-accumulates.
    """

    def __init__(self, program: Program, prices: Mapping[str, float] | None = None) -> None:
        self._program = program
        self._prices = prices
        self._known: dict[frozenset[str], tuple[frozenset[str], float]] = {}
        self._full = float(program.macs or 1) if prices is None else live_under(program, frozenset(), prices)[1] or 1.0

    def cost(self, loads: frozenset[str]) -> float:
        """What a step spends when it forms ``loads``, as a share of a step that computes everything."""
        return self._of(loads)[1] / self._full

    def computed(self, loads: frozenset[str]) -> frozenset[str]:
        """Blocks that a step computes when it forms ``loads``."""
        return self._of(loads)[0]

    def _of(self, loads: frozenset[str]) -> tuple[frozenset[str], float]:
        if loads not in self._known:
            self._known[loads] = live_under(self._program, loads, self._prices)
        return self._known[loads]
