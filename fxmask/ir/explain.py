"""What one step of a plan does with every block, and why: computed, loaded, forecast, stored, dead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from fxmask.errors import InputError
from fxmask.ir.forecast import INPUT, Load
from fxmask.ir.liveness import live_nodes
from fxmask.ir.program import Program
from fxmask.ir.summary import human_count

if TYPE_CHECKING:
    from fxmask.ir.plan import Plan


def explain_step(plan: Plan, step: int, program: Program) -> str:
    """A line for every block, beside what the full graph does.

    Args:
        plan: of the program.
        step: from 0.
        program: the captured denoiser.

    Raises:
        InputError: the plan has no such step, or is of another program.
    """
    if not plan.start <= step < len(plan.steps):
        raise InputError(f"step {step} does not run; the plan runs steps {plan.start} to {len(plan.steps) - 1}")
    if plan.fingerprint != program.fingerprint:
        raise InputError("the plan was made for another program; pass the one that it was rectified with")
    row = plan.steps[step]
    given = {program.block(x.block).values[x.value] for x in row.load}
    stored = {program.block(block).values[i] for block, i in row.store}
    live, _ = live_nodes(program.graph_module.graph, given, stored)
    names = {node.name for node in live}
    total = len(program.graph_module.graph.nodes)
    lines = [
        f"{_name(plan, step)} (timestep {plan.timesteps[step]:g}), step graph {row.graph}: {len(live)} of {total} nodes, "
        f"{human_count(row.macs)}MACs of {human_count(plan.full_macs)} ({row.macs / max(1, plan.full_macs):.0%})",
        f"runs as steps {[i for i, other in enumerate(plan.steps) if other.graph == row.graph]}",
    ]
    width = max([len(block.name) for block in program.blocks] + [5])
    for block in program.blocks:
        lines.append(f"{block.name:<{width}}  {_what(plan, step, program, block.name, names, given)}")
    if row.drop:
        lines.append(f"afterwards dropped: {', '.join(f'{x.block}[{x.value}] of {_name(plan, x.step)}' for x in row.drop)}")
    return "\n".join(lines)


def _what(plan: Plan, step: int, program: Program, block: str, live: set[str], given: set[str]) -> str:
    row = plan.steps[step]
    for load in row.load:
        if load.block == block:
            return (
                f"reused: the value of {_name(plan, load.terms[0][0].step)}"
                if load.plain
                else f"forecast: {_terms(plan, load)}"
            )
    values = program.block(block).values
    if not live.issuperset(values):
        return f"dead: {_why(program, values[0], live, given)}"
    blend = next((f", blended: {_terms(plan, x)}" for x in row.blend if x.block == block), "")
    readers = [
        i for i, other in enumerate(plan.steps) if (block, step) in {(s.block, s.step) for x in other.formed for s in x.slots}
    ]
    return "computed" + blend + (f", stored for steps {readers}" if readers else "")


def _name(plan: Plan, call: int) -> str:
    """``step 3``, or ``call 7 (step 3 of lane 'cond')``."""
    if not plan.mask.lanes:
        return f"step {call}"
    step, lane = plan.mask.order[call]
    return f"call {call} (step {step} of lane {plan.mask.lanes[lane]!r})"


def _terms(plan: Plan, load: Load) -> str:
    parts = []
    for slot, c in load.terms:
        what = "the sample" if slot.block == INPUT else "it" if slot.block == load.block else slot.block
        when = "now" if slot.step == load.step else f"of {_name(plan, slot.step)}"
        parts.append(f"{c:+.4g} x {what} {when}")
    return " ".join(parts)


def _why(program: Program, value: str, live: set[str], given: set[str]) -> str:
    """Which loaded values stand between a dead one and the outputs."""
    owner = {v: block.name for block in program.all_blocks for v in block.values}
    found: dict[str, None] = {}
    seen: set[fx.Node] = set()
    stack = [program.node(value)]
    while stack:
        for user in stack.pop().users:
            if user in seen or user.name in live:
                continue
            seen.add(user)
            if user.name in given:
                found[owner.get(user.name, user.name)] = None
            else:
                stack.append(user)
    if not found:
        return "nothing reads it"
    names = list(found)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"only {', '.join(names[:3])}{more} would read it, which this step does not compute"
