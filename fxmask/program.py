"""Program and Block: a captured denoiser and what was found in it."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxmask.calls import BoundCall, OutputSpec, Signature
from fxmask.errors import CaptureError
from fxmask.mask import INPUT
from fxmask.symbolic import SymbolicGraph


@dataclass(frozen=True)
class Block:
    """A set of graph values that are cut together; skipping it replaces them by cached ones.

    Attributes:
        name: module path of what the block computes, e.g. ``transformer_blocks.3.attn1``.
        kind: ``"branch"`` (residual branches; disjoint from each other), ``"stage"`` (a value of the whole stream,
            e.g. the output of a U-Net level) or ``"output"`` (what the denoiser returns).
        values: names of the cut values, nodes of the program's graph.
        macs: multiply-accumulates per call, at the captured batch size, that die when the block is skipped; for a branch
            without those that another branch owns, so that the branches' MACs add up.
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

    @functools.cached_property
    def input_block(self) -> Block:
        """The noisy sample as a block of no cost, never skipped, which forecasts may read."""
        placeholders = list(self.graph_module.graph.find_nodes(op="placeholder"))
        node = placeholders[self.inputs.index(self.signature.sample)]
        value = self.example.tensors[self.signature.sample]
        return Block(INPUT, "input", (node.name,), 0, value.numel() * value.element_size() // max(1, self.batch_size))

    def block(self, name: str) -> Block:
        """The block of that name; ``KeyError`` if there is none."""
        return self.input_block if name == INPUT else self._blocks_by_name[name]

    def node(self, name: str) -> fx.Node:
        """The graph node of that name; ``KeyError`` if there is none."""
        return self._nodes_by_name[name]

    def require_verified(self) -> None:
        """Refuse a program that was never compared with its model.

        Raises:
            CaptureError: the model was captured without weights.
        """
        if not self.verified:
            raise CaptureError(
                f"{type(self.model).__name__} was captured without weights, on fake tensors: its blocks and MACs can be read, "
                "but it cannot run. Load the weights and capture it again"
            )

    def coverage(self, kinds: Iterable[str] = ("branch", "stage")) -> float:
        """Share of all MACs that a step is spared when it loads every block of these kinds."""
        from fxmask.passes.specialize import live_under  # which needs Program

        chosen = set(kinds)
        _, spent = live_under(self, frozenset(block.name for block in self.blocks if block.kind in chosen))
        return 1 - spent / max(1, self.macs)

    @functools.cached_property
    def _blocks_by_name(self) -> dict[str, Block]:
        return {block.name: block for block in self.blocks}

    @functools.cached_property
    def _nodes_by_name(self) -> dict[str, fx.Node]:
        return {node.name: node for node in self.graph_module.graph.nodes}

    def summary(self) -> str:
        """The blocks as a tree of module paths: kind, MACs and share of all MACs, bytes per sample.

        A line without a kind is a module; its share is that of the branches inside it.
        """
        rows: list[tuple[str, Block | None, int]] = []
        _walk(_tree(self.blocks), 0, "", rows)
        width = max([len(label) for label, _, _ in rows] + [5])
        lines = [
            f"{type(self.model).__name__}: {_count(self.macs)}MACs per call at batch {self.batch_size} "
            f"({_count(self.attention_macs)} in attention), {len(self.graph_module.graph.nodes)} nodes, "
            f"{len(self.blocks)} blocks, captured by {self.rung}" + ("" if self.verified else "; NOT VERIFIED"),
            f"{'block':<{width}}  {'kind':<7} {'MACs':>8} {'share':>7} {'bytes/sample':>13}",
        ]
        for label, block, macs in rows:
            share = f"{macs / max(1, self.macs):.1%}"
            kind, size = (block.kind, f"{block.bytes:,}") if block is not None else ("", "")
            sets = f"  ({len(block.values)} values)" if block is not None and len(block.values) > 1 else ""
            lines.append(f"{label:<{width}}  {kind:<7} {_count(macs):>8} {share:>7} {size:>13}{sets}".rstrip())
        lines.append(f"branch blocks own {self.coverage(('branch',)):.1%} of the MACs, with stages {self.coverage():.1%}")
        return "\n".join(lines)


def _tree(blocks: Iterable[Block]) -> dict[str, Any]:
    """Blocks by module path, nested; those of one module under its path."""
    root: dict[str, Any] = {}
    for block in blocks:
        place = root
        for part in re.split("[:#+]", block.name)[0].split(".")[:-1]:
            place = place.setdefault(part, {})
        place.setdefault("", []).append(block)  # a path has no empty part
    return root


def _walk(place: dict[str, Any], depth: int, path: str, rows: list[tuple[str, Block | None, int]]) -> int:
    """Lines of a subtree, appended to ``rows``; returns the MACs of its branches."""
    total = 0
    for part, inside in place.items():
        if part == "":
            for block in inside:
                rows.append(("  " * depth + block.name, block, block.macs))
                total += block.macs if block.kind == "branch" else 0
            continue
        at = len(rows)
        macs = _walk(inside, depth + 1, f"{path}{part}.", rows)
        rows.insert(at, ("  " * depth + path + part, None, macs))
        total += macs
    return total


def _count(number: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} P"
