"""The blocks of a program as a table, in the order in which they are computed."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fxmask.ir.block import Block


def block_table(blocks: Sequence[Block], macs: int) -> list[str]:
    """Lines: modules, and under each the blocks inside, with kind, MACs and share of all MACs, bytes per sample.

    A module has a line wherever the computation enters it; its MACs are those of the branches until it is left.

    Args:
        blocks: in graph order.
        macs: of the whole program.
    """
    rows = _rows(blocks)
    width = max([len(label) for label, _, _ in rows] + [5])
    lines = [f"{'block':<{width}}  {'kind':<7} {'MACs':>8} {'share':>7} {'bytes/sample':>13}"]
    for label, block, cost in rows:
        kind, size = (block.kind, f"{block.bytes:,}") if block is not None else ("", "")
        line = f"{label:<{width}}  {kind:<7} {human_count(cost):>8} {cost / max(1, macs):>7.1%} {size:>13}"
        lines.append((line + _remark(block)).rstrip())
    return lines


def _remark(block: Block | None) -> str:
    if block is None:
        return ""
    words = [block.place] if block.place else []
    words += [f"depth {block.depth}"] if block.kind == "stage" else []
    words += [f"{len(block.values)} values"] if len(block.values) > 1 else []
    return f"  ({', '.join(words)})" if words else ""


def _rows(blocks: Sequence[Block]) -> list[tuple[str, Block | None, int]]:
    """(label, block or ``None`` for a module, MACs)."""
    rows: list[tuple[str, Block | None, int]] = []
    open_modules: list[tuple[str, int]] = []  # the modules that the present block is in, with the places of their lines
    for block in blocks:
        path = _modules_of(block)
        kept = 0
        while kept < min(len(path), len(open_modules)) and path[kept] == open_modules[kept][0]:
            kept += 1
        del open_modules[kept:]
        for depth in range(kept, len(path)):
            open_modules.append((path[depth], len(rows)))
            rows.append(("  " * depth + ".".join(path[: depth + 1]), None, 0))
        rows.append(("  " * len(path) + block.name, block, block.macs))
        if block.kind == "branch":
            for _, at in open_modules:
                label, _, cost = rows[at]
                rows[at] = (label, None, cost + block.macs)
    return rows


def _modules_of(block: Block) -> list[str]:
    return re.split("[:#+]", block.name)[0].split(".")[:-1]


def human_count(number: float) -> str:
    """A number with a unit: ``6.05 G``."""
    for unit in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} P"
