"""Program: a captured denoiser and what was found in it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from fxmask.errors import CaptureError, InputError
from fxmask.guards.ambient import Ambient
from fxmask.guards.state import Snapshot
from fxmask.ir.assumptions import Assumptions
from fxmask.ir.block import Block
from fxmask.ir.calls import BoundCall, Signature, moving_part
from fxmask.ir.fingerprint import fingerprint_1
from fxmask.ir.forecast import INPUT
from fxmask.ir.liveness import live_nodes
from fxmask.ir.macs import count_macs
from fxmask.ir.outputs import OutputSpec
from fxmask.ir.summary import block_table, human_count
from fxmask.ir.symbolic import SymbolicGraph
from fxmask.ir.text import as_html


@dataclass(frozen=True, eq=False, repr=False)
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
        streams: the paper's blocks, values after a residual addition, which a mask may list in place of the branches.
        macs: multiply-accumulates of one call at the captured batch size; ``attention_macs`` of them in attention.
        model: the denoiser.
        rung: the way of capture that worked.
        verified: whether the graph was compared with the model on real inputs.
        fingerprint: digest of what the graph computes with weights of what shapes, and of the blocks; see ``fingerprint``.
        weights: the parameters and buffers that the graph holds, by graph attribute, as they were at capture.
        state: the model's Python state at capture: what the graph froze of it.
        ambient: the modes around the capture: autocast, default dtype and so on.
        assumptions: conditions on the values of a call that the graph takes for granted.
        given_roles: the roles that the user gave, also of arguments that the captured call did not have.
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
    state: Snapshot | None = field(repr=False, default=None)
    ambient: Ambient | None = field(repr=False, default=None)
    assumptions: Assumptions | None = field(repr=False, default=None)
    given_roles: Mapping[str, str] = field(repr=False, default_factory=dict)
    streams: tuple[Block, ...] = field(repr=False, default=())

    @property
    def batch_size(self) -> int:
        """Batch size of the captured call."""
        return self.example.batch_size

    @property
    def all_blocks(self) -> tuple[Block, ...]:
        """Everything that a mask may list: the blocks, then the streams."""
        return self.blocks + self.streams

    @property
    def branches(self) -> tuple[Block, ...]:
        """The disjoint residual branches."""
        return tuple(block for block in self.blocks if block.kind == "branch")

    @property
    def stages(self) -> tuple[Block, ...]:
        """Values of the whole stream, e.g. the outputs of U-Net levels; they enclose each other."""
        return tuple(block for block in self.blocks if block.kind == "stage")

    @property
    def deepest_stage(self) -> Block | None:
        """The stage inside of most others, e.g. the middle of a U-Net; ``None`` if there are no stages."""
        return max(self.stages, key=lambda block: block.depth, default=None)

    @functools.cached_property
    def input_block(self) -> Block:
        """The noisy sample as a block of no cost, never skipped, which forecasts may read; the first one of a list."""
        placeholders = list(self.graph_module.graph.find_nodes(op="placeholder"))
        node, value = placeholders[self.inputs.index(self.example.samples[0])], self.example.sample
        batch = 1 if self.example.is_list else max(1, self.batch_size)
        return Block(INPUT, "input", (node.name,), 0, value.numel() * value.element_size() // batch)

    def moving_part(self, sample: torch.Tensor) -> torch.Tensor:
        """What the sampler moves of a sample: as much as the model predicts."""
        results = next(iter(self.graph_module.graph.find_nodes(op="output"))).args[0]
        return moving_part(sample, results[0].meta["val"].shape)

    def block(self, name: str) -> Block:
        """The block of that name; ``KeyError`` if there is none."""
        return self.input_block if name == INPUT else self._blocks_by_name[name]

    def node(self, name: str) -> fx.Node:
        """The graph node of that name; ``KeyError`` if there is none."""
        return self._nodes_by_name[name]

    def fits(self, fingerprint: str) -> bool:
        """Whether a mask or plan of that fingerprint is one of this program; it may be of an older version."""
        return fingerprint in (self.fingerprint, self._old_fingerprint)

    @functools.cached_property
    def _old_fingerprint(self) -> str:
        return fingerprint_1(self.graph_module, self.blocks)

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

    def require_one_sample(self) -> None:
        """Refuse a denoiser whose sample is a list of tensors, for what follows one sample through a sampler.

        Raises:
            InputError: names the argument.
        """
        if self.example.is_list:
            raise InputError(
                f"{type(self.model).__name__} takes its sample ({self.signature.sample!r}) as a list of tensors, and a mask is "
                "learned from samples that are one tensor; give a mask instead, e.g. fxmask.policies.interval(2)(program, "
                "timesteps)"
            )

    def require_assumed(self, bound: BoundCall, where: str) -> None:
        """Refuse a call for which the model would take another way than the graph.

        Raises:
            CaptureError: names the line of the model's code.
        """
        place = self.assumptions and self.assumptions.broken(tuple(bound.tensors.values()))
        if place:
            raise CaptureError(
                f"the model branches on the values of its arguments at {place}, and {where} takes the other way than the "
                "captured call: one graph cannot hold both. Let the branch choose between values (torch.where), or learn from "
                "calls that take the same way"
            )

    def coverage(self, kinds: Iterable[str] = ("branch", "stage")) -> float:
        """Share of all MACs that a step is spared when it loads every block of these kinds."""
        chosen = set(kinds)
        given = {value for block in self.blocks if block.kind in chosen for value in block.values}
        live, _ = live_nodes(self.graph_module.graph, given)
        return 1 - sum(map(count_macs, live)) / max(1, self.macs)

    @functools.cached_property
    def _blocks_by_name(self) -> dict[str, Block]:
        return {block.name: block for block in self.all_blocks}

    @functools.cached_property
    def _nodes_by_name(self) -> dict[str, fx.Node]:
        return {node.name: node for node in self.graph_module.graph.nodes}

    def summary(self) -> str:
        """The blocks in the order in which they are computed: kind, MACs and share of all MACs, bytes per sample.

        A line without a kind is a module; its share is that of the branches inside it.
        """
        shape = f"{type(self.model).__name__}: {human_count(self.macs)}MACs per call at batch {self.batch_size} "
        shape += f"({human_count(self.attention_macs)} in attention), {len(self.graph_module.graph.nodes)} nodes, "
        shape += f"{len(self.blocks)} blocks, captured by {self.rung}" + ("" if self.verified else "; NOT VERIFIED")
        covered = f"branch blocks own {self.coverage(('branch',)):.1%} of the MACs, with stages {self.coverage():.1%}"
        return "\n".join([shape, *block_table(self.blocks, self.macs), covered])

    __str__ = summary

    def __repr__(self) -> str:
        return (
            f"Program({type(self.model).__name__}, {human_count(self.macs)}MACs per call at batch {self.batch_size}, "
            f"{len(self.blocks)} blocks, {len(self.graph_module.graph.nodes)} nodes)"
        )

    def _repr_html_(self) -> str:
        return as_html(self.summary())
