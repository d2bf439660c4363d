"""Capture again, for a call of another shape or type, with the blocks of the first capture."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection
from dataclasses import replace

import torch

from fxmask._torch import tracing
from fxmask.errors import CaptureError
from fxmask.frontend.assemble import assemble_program
from fxmask.frontend.capture import capture_bound
from fxmask.frontend.fake import quiet_torch
from fxmask.frontend.subject import Subject
from fxmask.frontend.symbolic_export import export_symbolic
from fxmask.frontend.verify import find_difference, is_looked_up, output_spec_of, usual_inputs
from fxmask.frontend.wrapper import MODEL, Wrapper
from fxmask.guards.ambient import Ambient
from fxmask.ir.block import Block
from fxmask.ir.calls import BoundCall
from fxmask.ir.program import Program
from fxmask.passes.find_blocks import describe_blocks
from fxmask.passes.functionalize import functionalize

logger = logging.getLogger(__name__)


def recapture(program: Program, bound: BoundCall, needed: Collection[str] | None = None) -> Program:
    """Capture the program's model again for a call of another shape or type, with the same blocks.

    Where both graphs have the same operators in the same order, blocks keep their places; else they are found again and
    must have the same names.

    Args:
        program: the first capture.
        bound: the other call.
        needed: names of the blocks that a mask lists: others may be missing, as where a call leaves layers out. All, if not
            given.

    Raises:
        CaptureError: the new graph has other blocks, so that a mask for the old one cannot be used.
    """
    roles = dict(program.given_roles)
    with tracing(), quiet_torch(), torch.no_grad():
        symbolic = _from_symbolic(program, bound, roles) if _as_captured(program) else None
    if symbolic is not None:
        with contextlib.suppress(CaptureError):  # symbolic sizes can lead through other operators
            return _carry_blocks(program, symbolic, needed)
    return _carry_blocks(program, capture_bound(program.model, program.signature, bound, roles), needed)


def _carry_blocks(program: Program, fresh: Program, needed: Collection[str] | None) -> Program:
    """A new capture with the blocks of an old one."""
    old = [node for node in program.graph_module.graph.nodes if node.op == "call_function"]
    new = [node for node in fresh.graph_module.graph.nodes if node.op == "call_function"]
    if [str(node.target) for node in old] == [str(node.target) for node in new]:
        twins = {a.name: b.name for a, b in zip(old, new, strict=True)}
        values = {block.name: tuple(twins[v] for v in block.values) for block in program.all_blocks}
        described = describe_blocks(fresh.graph_module.graph, program.all_blocks, values, fresh.batch_size)
        blocks, streams = described[: len(program.blocks)], described[len(program.blocks) :]
    else:
        by_name = {block.name: block for block in fresh.all_blocks}
        gone = [block for block in program.all_blocks if not _same_kind(block, by_name.get(block.name))]
        missing = [block.name for block in gone if block.kind != "stream" or block.name in (needed or ())]
        if missing and (needed is None or not set(missing).isdisjoint(needed)):
            raise CaptureError(
                f"captured again, {type(program.model).__name__} has no blocks {missing[:5]}, so its mask does not fit; "
                "accelerate the model again for this form of call"
            )
        blocks = tuple(by_name[block.name] for block in program.blocks if block not in gone)
        streams = tuple(by_name[block.name] for block in program.streams if block not in gone)
    return replace(fresh, blocks=blocks, streams=streams, fingerprint=program.fingerprint, symbolic=program.symbolic)


def _as_captured(program: Program) -> bool:
    """Whether the model and the modes around it are what the symbolic captures were made for."""
    device = program.example.sample.device.type
    unchanged = program.state is None or program.state.held.same()
    return unchanged and program.ambient in (None, Ambient.now(device))


def _same_kind(old: Block, new: Block | None) -> bool:
    """Whether a block is the other one again; of a list of samples the output has as many values as the list."""
    same = new is not None and new.kind == old.kind
    return same and new is not None and (old.kind == "output" or len(new.values) == len(old.values))


def _from_symbolic(program: Program, bound: BoundCall, roles: dict[str, str]) -> Program | None:
    """The program for another shape from one symbolic capture, compared with the model; ``None`` if it cannot be had."""
    subject = Subject(program.model, bound.sample.device.type)
    outputs = output_spec_of(subject, bound)  # first of all: a call that the model itself does not take ends here
    model = subject.model
    try:
        if not any(graph.covers(bound) for graph in program.symbolic):
            wrapper = Wrapper(model, program.example).eval()
            with subject.untouched():
                made = export_symbolic(program.example, bound, wrapper, lambda exported: functionalize(exported, model, MODEL))
            if made is None or not made.covers(bound):
                return None
            program.symbolic.append(made)
        graph = next(graph for graph in program.symbolic if graph.covers(bound))
        module = graph.at(bound)
        timestep = program.signature.timestep
        inputs = usual_inputs(bound, timestep, is_looked_up(module, bound, timestep))
        difference = find_difference(module, subject, bound, inputs)
    except Exception:  # an export fails in many ways; another capture follows
        logger.debug("no symbolic capture", exc_info=True)
        return None
    if difference is not None:
        logger.debug("the symbolic capture is refused: %s", difference)
        return None
    fresh = assemble_program(module, program.model, program.signature, bound, outputs, roles, "torch.export (symbolic sizes)")
    return replace(fresh, state=subject.snapshot, ambient=subject.ambient)
