"""Block: graph values that are cut together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """A set of graph values that are cut together; skipping it replaces them by cached ones.

    Attributes:
        name: module path of what the block computes, e.g. ``transformer_blocks.3.attn1``.
        kind: ``"branch"`` (residual branches; disjoint from each other), ``"stage"`` (a value of the whole stream,
            e.g. the output of a U-Net level), ``"output"`` (what the denoiser returns) or ``"stream"`` (the stream after a
            branch, the paper's block).
        values: names of the cut values, nodes of the program's graph.
        macs: multiply-accumulates per call, at the captured batch size, that die when the block is skipped; for a branch
            or a stream without those that another one owns, so that their MACs add up.
        bytes: bytes per sample of the cut values.
        operator: what computes the (last) cut value, e.g. ``aten.cat``.
        place: of a stage: ``"out of up_blocks.1"``, ``"into up_blocks.2"`` or ``"inside up_blocks.2"``.
        depth: of a stage: how many stages it is inside of, itself included; 1 is the outermost.
    """

    name: str
    kind: str
    values: tuple[str, ...]
    macs: int
    bytes: int
    operator: str = ""
    place: str = ""
    depth: int = 0
