"""Rectify a mask: backward liveness over (step, block), or (step, lane, block), on the real graph.

    live(step i) = what the outputs of step i, and the values that later steps read from step i, are computed from,
                   walking backwards and stopping at every cut value that step i loads.

A loaded cut value makes (source step, block) a read of that earlier step; a computed block that nothing reaches is dead
and is turned off. This is exact on any graph. On a chain of blocks whose cached value is the whole stream it is the
paper's Eq. 12 (arXiv 2603.19939): drop ``m[t, b]`` when the next block loads and ``b`` itself recomputes at the next
step.

With lanes every call is a step of its own here (``Mask.by_call``), whichever lane it is of: one cache is for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

from fxmask.errors import MaskError
from fxmask.ir.block import Block
from fxmask.ir.forecast import INPUT, Forecast, Load, Slot
from fxmask.ir.graph import value_bytes
from fxmask.ir.liveness import live_nodes
from fxmask.ir.macs import count_macs
from fxmask.ir.mask import Mask
from fxmask.ir.plan import Plan, StepPlan
from fxmask.ir.program import Program
from fxmask.passes.conditions import functional, has_shapes, one_output_tuple
from fxmask.passes.observer import graph_pass


def _rectify_nothing(program: Program, mask: Mask, *, start: int = 0) -> Plan:
    """The plan of a mask taken at its word: every block computes or loads as the mask says, needed or not."""
    return _plan(program, mask, start, keep=True)


@graph_pass(requires=(functional, has_shapes, one_output_tuple), otherwise=_rectify_nothing)
def rectify(program: Program, mask: Mask, *, start: int = 0) -> Plan:
    """Exact plan of a mask.

    Args:
        program: the captured denoiser.
        mask: which block computes at which step. Blocks of the program that it does not list always compute.
        start: first step that runs; loads that would read from before it become computes. Of a mask with lanes the first
            call, counted over all lanes.

    Returns:
        The plan. ``rectify(program, plan.mask, start)`` returns the same plan.

    Raises:
        MaskError: the mask names a block that the program does not have, or was made for another program; or a forecast
            reads a block that the mask does not list, or one whose values have another shape or type.
    """
    return _plan(program, mask, start, keep=False)


def _plan(program: Program, mask: Mask, start: int, keep: bool) -> Plan:
    if not isinstance(mask, Mask):
        hint = "; a plan is rectified already" if isinstance(mask, Plan) else ""
        raise MaskError(f"mask must be a fxmask.Mask, got {type(mask).__name__}{hint}; call fxmask.rectify(program, mask)")
    given, mask = mask, mask.by_call
    blocks = _listed_blocks(program, mask)
    _check_sources_are_listed(program, mask)
    if not 0 <= start < mask.num_steps:
        raise MaskError(f"start={start} is not a step of this mask, which has {mask.num_steps}")
    if mask.fingerprint is not None:  # of an older version it may have been
        mask, given = (replace(x, fingerprint=program.fingerprint) for x in (mask, given))
    if start:
        mask = mask.starting_at(start)
    cut = _cut_values(program, blocks)
    weights = {node: count_macs(node) for node in program.graph_module.graph.nodes}
    reads: list[dict[tuple[str, int], None]] = [{} for _ in range(mask.num_steps)]  # values that later steps read
    rows = [StepLiveness()] * mask.num_steps
    for step in reversed(range(start, mask.num_steps)):
        roots = set(cut) if keep else {program.block(block).values[i] for block, i in reads[step]}
        rows[step] = _live_row(program, mask, step, cut, roots, weights)
        for load in rows[step].formed:
            for slot in load.slots:
                reads[slot.step][slot.block, slot.value] = None
    return _assemble(program, mask, given, start, rows, reads)


@dataclass(frozen=True)
class StepLiveness:
    """What is live in one step.

    Attributes:
        compute: names of the live blocks that are computed.
        load: cut values that are read from the cache.
        blend: cut values that are computed, then combined with others.
        live: every live node.
        macs: multiply-accumulates of the live nodes.
    """

    compute: frozenset[str] = frozenset()
    load: tuple[Load, ...] = ()
    blend: tuple[Load, ...] = ()
    live: frozenset[fx.Node] = frozenset()
    macs: int = 0

    @property
    def formed(self) -> tuple[Load, ...]:
        """Every cut value that is formed from others: loads, then blends."""
        return self.load + self.blend

    @property
    def shape(self) -> object:
        """Equal for steps that can share a graph: the same live nodes, and loads of the same form."""
        return (self.live, tuple(load.form for load in self.load), tuple(load.form for load in self.blend))


def _listed_blocks(program: Program, mask: Mask) -> list[Block]:
    known = {block.name: block for block in program.all_blocks}
    missing = [name for name in mask.blocks if name not in known]
    if missing:
        raise MaskError(f"the mask names blocks that the program does not have: {missing[:5]}; its blocks are {list(known)}")
    if mask.fingerprint is not None and not program.fits(mask.fingerprint):
        raise MaskError(
            f"the mask was made for a program with fingerprint {mask.fingerprint}, this one has {program.fingerprint}; "
            "capture the same model, or pass fingerprint=None if the block names are all that matters"
        )
    return [known[name] for name in mask.blocks]


def _check_sources_are_listed(program: Program, mask: Mask) -> None:
    """Blocks that are not listed are never cut, so nothing is stored of them; the sample always may be read."""
    known = {block.name for block in program.all_blocks}
    for (step, name), terms in (mask.forecast.terms if mask.forecast else {}).items():
        for source, _ in terms:
            other, at = (source[0], source[1]) if isinstance(source, tuple) else (name, source)
            if other == INPUT and program.example.is_list:
                raise MaskError(f"forecast of block {name!r} at step {step} reads the sample, which is a list of tensors")
            if other != INPUT and other not in mask.blocks:
                why = "which the mask does not list; give it a column" if other in known else "which is no block of the program"
                raise MaskError(f"forecast of block {name!r} at step {step} reads step {at} of {other!r}, {why}")


def _cut_values(program: Program, blocks: Sequence[Block]) -> dict[str, tuple[str, int]]:
    """{node name: (block, value index)}. Two blocks may share a value only if one of them is not in the mask."""
    cut: dict[str, tuple[str, int]] = {}
    for block in (program.input_block, *blocks):
        for i, value in enumerate(block.values):
            if value in cut:
                raise MaskError(f"blocks {cut[value][0]!r} and {block.name!r} both cut {value}; list only one of them")
            cut[value] = (block.name, i)
    return cut


def _live_row(
    program: Program,
    mask: Mask,
    step: int,
    cut: dict[str, tuple[str, int]],
    roots: set[str],
    weights: dict[fx.Node, int],
) -> StepLiveness:
    computes = dict(zip(mask.blocks, mask.compute[step].tolist(), strict=True))
    loaded = {name for name, (block, _) in cut.items() if not computes.get(block, True)}
    live, read = live_nodes(program.graph_module.graph, loaded, roots)
    load = [_checked(program, mask.loaded_from(step, *cut[node.name])) for node in read]
    computed = [cut[node.name] for node in live if node.name in cut and cut[node.name][0] != INPUT]
    blend = [_checked(program, mask.loaded_from(step, b, i)) for b, i in computed if mask.blends(step, b)]
    macs = sum(weights[node] for node in live)
    return StepLiveness(frozenset(b for b, _ in computed), tuple(load), tuple(blend), frozenset(live), macs)


def _checked(program: Program, load: Load) -> Load:
    """The load, if every value that it reads is there and has the shape and type of the one that is formed."""
    wanted = program.node(program.block(load.block).values[load.value]).meta["val"]
    for slot, _ in load.terms:
        if slot.block == load.block:
            continue
        where = f"forecast of block {load.block!r} at step {load.step} reads {slot.block!r}"
        values = program.block(slot.block).values
        source = program.node(values[slot.value]).meta["val"] if slot.value < len(values) else None
        if source is None or source.shape != wanted.shape or source.dtype != wanted.dtype:
            found = "no such value" if source is None else f"{source.dtype}{list(source.shape)}"
            raise MaskError(f"{where}: {found}, but {wanted.dtype}{list(wanted.shape)} is needed")
    return load


def _assemble(
    program: Program,
    mask: Mask,
    source: Mask,
    start: int,
    rows: Sequence[StepLiveness],
    reads: Sequence[dict[tuple[str, int], None]],
) -> Plan:
    """Number the graphs, find the last reader of every slot, simulate the cache."""
    live_outs = _shared_live_outs(program, start, rows, reads)
    last: dict[Slot, int] = {}
    for step, row in enumerate(rows):
        for load in row.formed:
            last.update(dict.fromkeys(load.slots, step))
    graphs: dict[object, int] = {}
    steps = []
    held: set[Slot] = set()
    peak = 0
    for step, row in enumerate(rows):
        if step < start:
            steps.append(StepPlan(frozenset(), (), (), (), (), -1, 0))
            continue
        live_out = live_outs[row.shape]
        store = tuple(value for value in live_out if value in reads[step])
        held |= {Slot(block, value, step) for block, value in store}
        peak = max(peak, sum(value_bytes(program.node(program.block(slot.block).values[slot.value])) for slot in held))
        drop = tuple(sorted(slot for slot in held if last[slot] <= step))
        held -= set(drop)
        graph = graphs.setdefault(row.shape, len(graphs))
        steps.append(StepPlan(row.compute, row.load, store, live_out, drop, graph, row.macs, row.blend))
    total = sum(count_macs(node) for node in program.graph_module.graph.nodes)
    rectified = source.folded(_rectified(mask, rows, start))
    return Plan(rectified, tuple(steps), start, total, peak, program.fingerprint, source)


def _shared_live_outs(
    program: Program, start: int, rows: Sequence[StepLiveness], reads: Sequence[dict[tuple[str, int], None]]
) -> dict[object, tuple[tuple[str, int], ...]]:
    """What the graph of each shape returns besides its outputs, in graph order.

    Steps that compute and load alike share a graph, so it returns what any of them stores. The graph that computes
    everything returns every value that any step loads: one graph then serves the first step of a run, a run that
    starts in the middle, and calls that no plan covers.
    """
    order = [(b.name, i) for b in (program.input_block, *program.all_blocks) for i in range(len(b.values))]
    loaded = {value for read in reads for value in read}
    wanted: dict[object, set[tuple[str, int]]] = {}
    for step in range(start, len(rows)):
        values = wanted.setdefault(rows[step].shape, set(reads[step]))
        values |= set(reads[step])
        if not rows[step].formed:
            values |= loaded
    return {shape: tuple(value for value in order if value in values) for shape, values in wanted.items()}


def _rectified(mask: Mask, rows: Sequence[StepLiveness], start: int) -> Mask:
    """The mask without dead computes, and without forecasts of loads that nobody needs."""
    compute = mask.compute.clone()
    kept = {}
    for step in range(start, mask.num_steps):
        formed = {load.block for load in rows[step].formed}
        for b, name in enumerate(mask.blocks):
            if compute[step, b]:
                compute[step, b] = name in rows[step].compute  # never off in the first row: all of it is live there
            if mask.forecast and (step, name) in mask.forecast.terms and name in formed:
                kept[step, name] = mask.forecast.terms[step, name]
    return Mask(compute, mask.timesteps, mask.blocks, Forecast(kept) if kept else None, mask.fingerprint)
