"""A checked graph and what is known of it, put together as a Program."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from fxmask.frontend.value_reads import ASSUMPTIONS
from fxmask.ir.calls import BoundCall, Signature
from fxmask.ir.fingerprint import fingerprint_of
from fxmask.ir.graph import attribute
from fxmask.ir.macs import count_attention_macs, count_macs
from fxmask.ir.outputs import OutputSpec
from fxmask.ir.program import Program
from fxmask.passes.choose_layouts import choose_layouts
from fxmask.passes.find_blocks import describe_streams, find_blocks

UNVERIFIED = "torch.export (fake tensors, not verified)"


def assemble_program(
    module: fx.GraphModule,
    model: torch.nn.Module,
    signature: Signature,
    bound: BoundCall,
    outputs: OutputSpec,
    roles: dict[str, str],
    rung: str,
) -> Program:
    """The program of a checked graph: its blocks, MACs, roles and fingerprint."""
    inputs = tuple(bound.tensors)
    placeholders = list(module.graph.find_nodes(op="placeholder"))
    samples = [placeholders[inputs.index(name)] for name in bound.samples]
    blocks = find_blocks(module.graph, samples, bound.batch_size)
    streams = describe_streams(module.graph, blocks, bound.batch_size)
    choose_layouts(module)
    weights = {str(node.target): attribute(module, node) for node in module.graph.nodes if node.op == "get_attr"}
    return Program(
        graph_module=module,
        inputs=inputs,
        example=bound,
        signature=signature,
        outputs=outputs,
        roles={name: role_of(name, signature, roles) for name in inputs},
        blocks=blocks,
        streams=streams,
        macs=sum(count_macs(node) for node in module.graph.nodes),
        attention_macs=sum(count_attention_macs(node) for node in module.graph.nodes),
        model=model,
        rung=rung,
        verified=rung != UNVERIFIED,
        fingerprint=fingerprint_of(module, blocks),
        weights=weights,
        given_roles=dict(roles),
        assumptions=module.meta.get(ASSUMPTIONS),
    )


def role_of(name: str, signature: Signature, roles: Mapping[str, str]) -> str:
    """Role of an input: as given, else by its place in the signature."""
    root = name.split(".")[0]
    if name in roles or root in roles:
        return roles.get(name, roles.get(root, ""))
    if signature.is_sample(name):
        return "sample"
    return "timestep" if name == signature.timestep else "conditioning"
