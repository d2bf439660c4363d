"""Masks and plans as a screenful of text, and as HTML for notebooks."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fxmask.ir.mask import Mask
    from fxmask.ir.plan import Plan

ROWS = 40  # lines that a table has at most
COLUMNS = 100  # steps that a row shows at most; beyond this several share a character
LABEL = 44  # characters of a name
COMPUTED, LOADED, FORMED, SOME = "#", ".", "+", "-"  # SOME: a character for several steps, of which a part computes
REUSED, FORECAST, BLENDED, FULL, ABSENT = range(5)
STATES = ("reused", "forecast", "computed and blended", "computed", "not called")
LETTERS = (LOADED, FORMED, FORMED, COMPUTED, " ")


def columns_of(mask: Mask) -> list[tuple[str, list[int]]]:
    """What each step does with each block: name, and T indices into ``STATES``. Lanes with rows of their own are named."""
    formed, rows = mask.forecast.terms if mask.forecast else {}, mask.compute.tolist()
    found = []
    for b, block in enumerate(mask.blocks):
        for number, lane in enumerate(mask.lanes or ("",)):
            states = []
            for step in range(mask.num_steps):
                on = rows[step][number][b] if lane else rows[step][b]
                named = ((step, lane, block) if lane else (step, block)) in formed
                state = (BLENDED if on else FORECAST) if named else FULL if on else REUSED
                states.append(state if mask.call_of(step, number) is not None else ABSENT)
            found.append((f"{block} [{lane}]" if lane else block, states))
    return found


def mask_text(mask: Mask) -> str:
    """A row for every block (blocks with equal rows share one), a character for every step."""
    steps, blocks = mask.num_steps, len(mask.blocks)
    formed = mask.forecast.terms if mask.forecast else {}
    share = float(mask.by_call.compute.double().mean()) if blocks else 1.0
    lanes = f" and lanes {', '.join(mask.lanes)} with rows of their own" if mask.lanes else ""
    lines = [
        f"Mask: {steps} steps, {blocks} blocks{lanes}, {share:.0%} computed, {len(formed)} forecasts, "
        f"timesteps {mask.timesteps[0]:g} to {mask.timesteps[-1]:g}",
        f"({COMPUTED} computed, {LOADED} reused, {FORMED} forecast or blended"
        + (f", {SOME} some of {-(-steps // COLUMNS)} steps computed)" if steps > COLUMNS else ")"),
    ]
    groups: dict[str, list[str]] = {}
    for name, states in columns_of(mask):
        groups.setdefault(_squeezed([LETTERS[state] for state in states]), []).append(name)
    shown = list(groups.items())
    for pattern, names in shown[:ROWS]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"{_short(names[0], LABEL - len(more)) + more:<{LABEL}} {pattern}")
    if len(shown) > ROWS:
        lines.append(f"... and {len(shown) - ROWS} more rows; mask.compute has all of them")
    return "\n".join(lines)


def plan_text(plan: Plan) -> str:
    """The savings, then what each step does; neighbouring steps that run one graph share a line. With lanes, each call."""
    lanes = plan.mask.lanes
    lines = [
        f"Plan: {plan.mask.num_steps} steps, {plan.mac_ratio:.2f}x fewer MACs, {plan.distinct_graphs} step graphs, "
        f"peak cache {plan.peak_cache_bytes / 2**20:.2f} MiB {'for all lanes' if lanes else 'per lane'}",
        f"{'calls' if lanes else 'steps':<9} {'graph':>5} {'MACs':>6} {'computes':>9} {'loads':>6} {'forecasts':>10} "
        f"{'stores':>7}",
    ]
    runs: list[list[int]] = []
    for i in range(plan.start, len(plan.steps)):
        same = runs and plan.steps[runs[-1][-1]].graph == plan.steps[i].graph
        if same and len(plan.steps[i].store) == len(plan.steps[runs[-1][-1]].store):
            runs[-1].append(i)
        else:
            runs.append([i])
    for run in _ends(runs, ROWS):
        if run is None:
            lines.append("...")
            continue
        step = plan.steps[run[0]]
        named = f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}"
        forecasts = sum(not x.plain for x in step.formed)
        lines.append(
            f"{named:<9} {step.graph:>5} {step.macs / max(1, plan.full_macs):>6.0%} {len(step.compute):>9} "
            f"{len(step.load):>6} {forecasts:>10} {len(step.store):>7}"
        )
    lines.append("plan.explain(step, program) says what one step does, and why")
    return "\n".join(lines)


def as_html(text: str) -> str:
    """Text for a notebook, in its own columns."""
    return f"<pre style='line-height:1.2'>{html.escape(text)}</pre>"


def mask_html(mask: Mask) -> str:
    """A heat map: a row for every block, a column for every step, dark where it is computed."""
    size = max(2, min(12, 900 // max(1, mask.num_steps)))
    columns, cells = columns_of(mask), []
    for b, (name, states) in enumerate(columns):
        for i, state in enumerate(states):
            colour = ("#eff3ff", "#9ecae1", "#9ecae1", "#08519c", "#ffffff")[state]
            cells.append(
                f"<rect x='{i * size}' y='{b * size}' width='{size}' height='{size}' fill='{colour}'>"
                f"<title>step {i}, {html.escape(name)}</title></rect>"
            )
    width, height = mask.num_steps * size, len(columns) * size
    title = html.escape(repr(mask))
    return f"<div>{title}<br><svg width='{width}' height='{height}'>{''.join(cells)}</svg></div>"


def _squeezed(row: Sequence[str]) -> str:
    """A row of at most ``COLUMNS`` characters."""
    size = -(-len(row) // COLUMNS)
    parts = [row[k : k + size] for k in range(0, len(row), size)]
    return "".join(part[0] if len(set(part)) == 1 else SOME for part in parts)


def _short(name: str, width: int) -> str:
    return name if len(name) <= width else f"{name[: width - 3]}..."


def _ends(items: Sequence[list[int]], most: int) -> list[list[int] | None]:
    """The items, with ``None`` for those in the middle where there are too many."""
    if len(items) <= most:
        return list(items)
    return [*items[: most // 2], None, *items[-most // 2 :]]
