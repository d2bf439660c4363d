"""Program and Block: a captured denoiser and what was found in it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from fxmask.calls import BoundCall, OutputSpec, Signature
from fxmask.symbolic import SymbolicGraph


@dataclass(frozen=True)
class Block:
    """A set of graph values that are cut together; skipping it replaces them by cached ones.

    Attributes:
        name: module path of what the block computes, e.g. ``transformer_blocks.3.attn1``.
        kind: ``"branch"`` (residual branches; disjoint from each other), ``"stage"`` (a value of the whole stream,
            e.g. the output of a U-Net level) or ``"output"`` (what the denoiser returns).
        values: names of the cut values, nodes of the program's graph.
        macs: multiply-accumulates per call, at the captured batch size, that die when the block is skipped.
        bytes: bytes per sample of the cut values.
    """

    name: str
    kind: str
    values: tuple[str, ...]
    macs: int
    bytes: int


@dataclass(frozen=True, eq=False)
class Program:
    """A denoiser as a functional graph, checked against the model.

    Attributes:
        graph_module: ATen graph. Placeholders are ``inputs``, in order; parameters are ``get_attr`` nodes that hold
            the model's own ``Parameter`` objects; the output is a tuple of tensors.
        inputs: leaf names of the tensor arguments, e.g. ``"sample"``, ``"added_cond_kwargs.text_embeds"``.
        example: the call that the graph was captured with.
        signature: how the model is called.
        outputs: how graph outputs become the model's return value.
        roles: of each input: ``"sample"``, ``"timestep"``, ``"conditioning"`` (constant over a generation) or
            ``"step"`` (changes at every step).
        blocks: what can be skipped, in graph order.
        macs: multiply-accumulates of one call at the captured batch size; ``attention_macs`` of them in attention.
        model: the denoiser.
        rung: the way of capture that worked.
        verified: whether the graph was compared with the model on real inputs.
        fingerprint: digest of the graph's structure and the block names.
        weights: the parameters and buffers that the graph holds, by graph attribute, as they were at capture.
        symbolic: captures with symbolic sizes, made when the model is called with another shape; shared by all captures.
    """

    graph_module: fx.GraphModule
    inputs: tuple[str, ...]
    example: BoundCall = field(repr=False)
    signature: Signature = field(repr=False)
    outputs: OutputSpec = field(repr=False)
    roles: Mapping[str, str]
    blocks: tuple[Block, ...]
    macs: int
    attention_macs: int
    model: torch.nn.Module = field(repr=False)
    rung: str
    verified: bool
    fingerprint: str
    weights: Mapping[str, torch.Tensor] = field(repr=False)
    symbolic: list[SymbolicGraph] = field(repr=False, default_factory=list)

    @property
    def batch_size(self) -> int:
        """Batch size of the captured call."""
        return int(self.example.tensors[self.signature.sample].shape[0])

    @property
    def branches(self) -> tuple[Block, ...]:
        """The disjoint residual branches."""
        return tuple(block for block in self.blocks if block.kind == "branch")

    def block(self, name: str) -> Block:
        """The block of that name; ``KeyError`` if there is none."""
        return self._blocks_by_name[name]

    def node(self, name: str) -> fx.Node:
        """The graph node of that name; ``KeyError`` if there is none."""
        return self._nodes_by_name[name]

    @functools.cached_property
    def _blocks_by_name(self) -> dict[str, Block]:
        return {block.name: block for block in self.blocks}

    @functools.cached_property
    def _nodes_by_name(self) -> dict[str, fx.Node]:
        return {node.name: node for node in self.graph_module.graph.nodes}

    def summary(self) -> str:
        """The blocks as a table: name, kind, MACs and share of all MACs, bytes per sample."""
        width = max([len(block.name) for block in self.blocks] + [5])
        lines = [
            f"{type(self.model).__name__}: {_count(self.macs)}MACs per call at batch {self.batch_size} "
            f"({_count(self.attention_macs)} in attention), {len(self.graph_module.graph.nodes)} nodes, "
            f"{len(self.blocks)} blocks, captured by {self.rung}",
            f"{'block':<{width}}  {'kind':<7} {'MACs':>8} {'share':>7} {'bytes/sample':>13}",
        ]
        for b in self.blocks:
            share = b.macs / max(1, self.macs)
            lines.append(f"{b.name:<{width}}  {b.kind:<7} {_count(b.macs):>8} {share:>7.1%} {b.bytes:>13,}")
        owned = sum(b.macs for b in self.branches) / max(1, self.macs)
        lines.append(f"branch blocks own {owned:.1%} of the MACs")
        return "\n".join(lines)


def _count(number: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} P"
