"""A second, slow opinion on what a mask makes each step do, to check the plans of ``rectify`` against.

    demand = what the outputs of all steps ask for, followed value by value: a computed value asks for what it is computed
             from, a loaded one for what some earlier step computed.

It walks over (step, node) forwards in no particular order and shares no code with ``rectify``, which goes backwards from
step to step, nor with the methods of ``Mask`` that ``rectify`` asks for sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from fxmask.ir.forecast import INPUT, Load, Slot
from fxmask.ir.mask import Mask
from fxmask.ir.plan import Plan, StepPlan
from fxmask.ir.program import Program

At = tuple[int, str, int]  # step, block, index of the cut value
Terms = tuple[tuple[Slot, float], ...]


@dataclass
class Demand:
    """What the results of all steps need.

    Attributes:
        computed: cut values that a step must compute, whether or not it blends them afterwards.
        loads: cut values that a step must form from stored ones, with what they are formed from.
        blends: cut values that a step must compute and then combine with others, with what is combined.
    """

    computed: set[At] = field(default_factory=set)
    loads: dict[At, Terms] = field(default_factory=dict)
    blends: dict[At, Terms] = field(default_factory=dict)


def demand_of(program: Program, mask: Mask) -> Demand:
    """What each step of a masked run must compute, load and blend, found by following every value to its sources."""
    values = {(block.name, i): name for block in program.all_blocks for i, name in enumerate(block.values)}
    cut = {name: at for at, name in values.items() if at[0] in mask.blocks}
    values[INPUT, 0] = program.input_block.values[0]
    nodes = {node.name: node for node in program.graph_module.graph.nodes}
    outputs = [node for end in nodes.values() if end.op == "output" for node in end.all_input_nodes]
    rows = mask.compute.tolist()
    found = Demand()
    seen: set[tuple[int, fx.Node]] = set()
    waiting = [(step, node) for step in range(len(rows)) for node in outputs]
    while waiting:
        step, node = waiting.pop()
        if (step, node) in seen:
            continue
        seen.add((step, node))
        loaded = False
        if node.name in cut:
            block, value = cut[node.name]
            loaded = not rows[step][mask.blocks.index(block)]
            terms = _terms(mask, rows, step, block, value)
            if loaded:
                found.loads[step, block, value] = terms
            else:
                found.computed.add((step, block, value))
                if terms:
                    found.blends[step, block, value] = terms
            waiting.extend((slot.step, nodes[values[slot.block, slot.value]]) for slot, _ in terms)
        if not loaded:
            waiting.extend((step, before) for before in node.all_input_nodes)
    return found


def _terms(mask: Mask, rows: list[list[bool]], step: int, block: str, value: int) -> Terms:
    """What forms a cut value at a step; nothing if it is just computed."""
    explicit = mask.forecast.terms.get((step, block)) if mask.forecast else None
    if explicit is not None:
        pairs = [((source[0], source[1]) if isinstance(source, tuple) else (block, source), c) for source, c in explicit]
        return tuple((Slot(other, 0 if other == INPUT else value, at), c) for (other, at), c in pairs)
    column = mask.blocks.index(block)
    if rows[step][column]:
        return ()
    latest = step - 1
    while not rows[latest][column]:
        latest -= 1
    return ((Slot(block, value, latest), 1.0),)


def plan_faults(program: Program, mask: Mask, plan: Plan) -> tuple[str, ...]:
    """Every way in which a plan would give results other than the mask's, one sentence each.

    What is merely wasteful (a dead block that computes, a value that nobody reads) is no fault.

    Args:
        program: the captured denoiser.
        mask: of the program.
        plan: what a pass made of the mask, for a run from step 0.
    """
    mask = mask.by_call
    if len(plan.steps) != mask.num_steps or plan.start:
        return (f"the plan runs steps {plan.start} to {len(plan.steps) - 1}, the mask has {mask.num_steps} from 0",)
    wanted = demand_of(program, mask)
    faults: dict[str, None] = {}  # ordered, each once
    trusted: list[list[Load]] = []  # what each step forms as it should, so that its sources must be stored
    for step, given in enumerate(plan.steps):
        faults.update(dict.fromkeys(_compute_faults(wanted, mask, plan, step)))
        right: list[Load] = []
        for kind, have, expected, other in (
            ("load", given.load, wanted.loads, wanted.computed),
            ("blend", given.blend, wanted.blends, wanted.computed | set(wanted.loads)),
        ):
            faults.update(dict.fromkeys(_form_faults(kind, step, have, expected, other, right)))
        trusted.append(right)
    faults.update(dict.fromkeys(_cache_faults(plan, trusted)))
    return tuple(faults)


def _compute_faults(wanted: Demand, mask: Mask, plan: Plan, step: int) -> list[str]:
    """Blocks that must compute at a step and do not."""
    given = plan.steps[step]
    needed = sorted({block for at, block, _ in wanted.computed if at == step})
    loaded = {x.block for x in given.load}
    on = dict(zip(plan.mask.blocks, plan.mask.by_call.compute[step].tolist(), strict=True))
    missing = [b for b in needed if b not in given.compute or b in loaded or not on.get(b, True)]
    faults = [f"step {step} does not compute block {b}, although the mask computes it and its value is needed" for b in missing]
    return faults + ([f"step {step} has no graph"] if given.graph < 0 else [])


def _form_faults(
    kind: str, step: int, have: tuple[Load, ...], expected: Mapping[At, Terms], other: set[At], right: list[Load]
) -> list[str]:
    """Cut values that a step does not load (or blend) as the mask says. Those that it does are added to ``right``."""
    faults = []
    given = {(step, x.block, x.value): x for x in have}
    for at, terms in sorted(expected.items()):
        if at[0] == step and at not in given:
            faults.append(f"step {step} does not {kind} {_name(at)}, although the mask {kind}s it and its value is needed")
        elif at[0] == step and [s for s, _ in given[at].terms] != [s for s, _ in terms]:
            found, meant = _sources(at, given[at].terms), _sources(at, terms)
            faults.append(f"{kind} of {_name(at)} at step {step} reads {found}, the mask says {meant}")
        elif at[0] == step and given[at].terms != terms:
            ours, theirs = ([c for _, c in pairs] for pairs in (given[at].terms, terms))
            faults.append(f"{kind} of {_name(at)} at step {step} has the coefficients {ours}, the mask says {theirs}")
        elif at[0] == step:
            right.append(given[at])
    for at, load in given.items():
        if at not in expected and at not in other:
            right.append(load)  # nobody needs it, but it is read all the same
        elif at not in expected and kind == "blend":
            faults.append(f"step {step} blends {_name(at)}, which the mask does not blend there")
    return faults


def _cache_faults(plan: Plan, trusted: list[list[Load]]) -> list[str]:
    """Reads of what is not there, found by going through the steps with the cache as a set of slots."""
    faults = []
    held: set[Slot] = set()
    dropped: dict[Slot, int] = {}
    lost: set[Slot] = set()  # slots that a fault was found with; what follows from it is not repeated
    for step, given in enumerate(plan.steps):
        for slot in sorted({slot for load in trusted[step] for slot in load.slots} - held - lost):
            lost.add(slot)
            faults.append(_why_missing(plan.steps[slot.step], slot, dropped.get(slot), step))
        held |= {Slot(block, value, step) for block, value in given.store if (block, value) in given.live_out}
        for slot in given.drop:
            if slot not in held and slot not in lost:
                faults.append(f"step {step} drops {_slot(slot)}, which is not stored then")
            held.discard(slot)
            dropped[slot] = step
    return faults


def _why_missing(source: StepPlan, slot: Slot, dropped: int | None, reader: int) -> str:
    name = f"{slot.block}[{slot.value}]"
    if dropped is not None:
        return f"step {dropped} drops {_slot(slot)}, which step {reader} loads"
    if (slot.block, slot.value) in source.store:
        return f"the graph of step {slot.step} does not return {name}, which the step must store for step {reader}"
    return f"step {slot.step} does not store {name}, which step {reader} loads"


def _name(at: At) -> str:
    return f"{at[1]}[{at[2]}]"


def _slot(slot: Slot) -> str:
    return f"{slot.block}[{slot.value}] of step {slot.step}"


def _sources(at: At, terms: Terms) -> str:
    """The steps, with a block's name where it is another one's value."""
    return ", ".join(f"step {s.step}" if (s.block, s.value) == at[1:] else _slot(s) for s, _ in terms)
