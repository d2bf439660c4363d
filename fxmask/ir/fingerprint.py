"""Fingerprints of programs: equal for what computes the same, whatever its type, device, layout, batch or resolution.

layers of width 8           and of width 12              differ: the weights have other shapes
norm with eps 1e-5          and with 1e-6                differ: a number that is computed with
captured in bfloat16, on a GPU, at batch 4               equal: casts, copies, views and sizes are not in it
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxmask.ir.block import Block
from fxmask.ir.graph import attribute, is_assert, operator_of

NEW = "2."  # what a fingerprint begins with; those of the first version have no such beginning
LARGE = 60_000.0  # beyond it a number stands for infinity, in whatever type

# Operators that change type, place, shape or layout, and compute nothing.
TRANSPARENT = frozenset(
    "_assert_tensor_metadata _reshape_alias _to_copy _unsafe_view alias clone contiguous convert_element_type detach expand "
    "expand_as flatten lift_fresh_copy movedim permute reshape squeeze swapaxes t to transpose type_as unflatten unsqueeze "
    "view".split()
)
# Operators that make tensors of sizes that follow from the call's.
FACTORIES = frozenset(
    "arange empty full full_like linspace new_full new_ones new_zeros ones ones_like zeros zeros_like".split()
)
# Whole numbers that are the model's, not the call's.
COUNTS = frozenset(
    "correction diagonal dilation dim dims group groups kernel_size normalized_shape num_groups output_padding padding stride "
    "transposed".split()
)


def fingerprint_of(module: fx.GraphModule, blocks: Sequence[Block]) -> str:
    """Digest of operators, how they are wired, the numbers they take, shapes of weights, and blocks."""
    digest = hashlib.sha256()
    for line in _lines(module):
        digest.update(line.encode())
    _add_blocks(digest, blocks)
    return NEW + digest.hexdigest()[:16]


def fingerprint_1(module: fx.GraphModule, blocks: Sequence[Block]) -> str:
    """The same in the first version: names of operators, and blocks."""
    digest = hashlib.sha256()
    for node in module.graph.nodes:
        if node.op == "call_function":
            digest.update(str(operator_of(node)).encode())
    _add_blocks(digest, blocks)
    return digest.hexdigest()[:16]


def _add_blocks(digest: Any, blocks: Sequence[Block]) -> None:
    for block in blocks:
        digest.update(f"{block.kind} {block.name} {len(block.values)}".encode())


def _lines(module: fx.GraphModule) -> Iterator[str]:
    """One line per operator that computes; values are known by their number."""
    known: dict[fx.Node, str] = {}
    count = 0
    for node in module.graph.nodes:
        if node.op == "placeholder":
            known[node] = f"input {len(known)}"
        elif node.op == "get_attr":
            known[node] = _weight(attribute(module, node))
        elif node.op == "call_function" and not is_assert(node):
            source = _looked_through(node)
            known[node] = known[source] if source is not None else f"%{count}"
            if source is None:
                count += 1
                yield f"{known[node]} = {operator_of(node)}({', '.join(_arguments(node, known))})\n"


def _weight(value: Any) -> str:
    return f"weight {tuple(value.shape)}" if isinstance(value, torch.Tensor) else "subgraph"


def _looked_through(node: fx.Node) -> fx.Node | None:
    """What a node that computes nothing is a form of."""
    inputs = node.all_input_nodes
    return inputs[0] if inputs and _packet(node) in TRANSPARENT else None


def _packet(node: fx.Node) -> str:
    schema = getattr(operator_of(node), "_schema", None)
    return "" if schema is None else str(schema.name).split("::")[-1]


def _arguments(node: fx.Node, known: Mapping[fx.Node, str]) -> Iterator[str]:
    if node.target is operator.getitem:
        yield f"{known[node.args[0]]}, {node.args[1]}"  # type: ignore[index]
        return
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    scalars = (
        {argument.name for argument in schema.arguments if str(argument.type) == "number"} if schema is not None else set()
    )
    given = {**dict(zip(names or map(str, range(len(node.args))), node.args, strict=False)), **node.kwargs}
    for name, value in given.items():
        whole = name in COUNTS or (name in scalars and _packet(node) not in FACTORIES)
        yield from (f"{name}={text}" for text in _texts(value, whole, known))


def _texts(value: Any, whole: bool, known: Mapping[fx.Node, str]) -> Iterator[str]:
    """Values and numbers of an argument; whole numbers only where they are the model's."""
    if isinstance(value, fx.Node):
        yield known.get(value, "?")
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item, whole, known)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item, whole, known)
    elif isinstance(value, (bool, str)):
        yield repr(value)
    elif isinstance(value, float) or (whole and isinstance(value, int)):
        yield f"{min(max(float(value), -LARGE), LARGE):.6g}"
