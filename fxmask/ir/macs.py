"""Multiply-accumulates of a graph: matrix products, convolutions and attention, from the shapes in ``meta["val"]``.

``torch.utils.flop_counter`` does not count scaled-dot-product attention on a CPU, so attention is counted here:
``B * H * Lq * Lk * (E + Ev)`` for queries ``[B, H, Lq, E]`` and values ``[B, H, Lk, Ev]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def shape_of(node: Any) -> tuple[int, ...]:
    """Shape of a node's tensor value (the first one, if it has several)."""
    value = node.meta["val"]
    value = value[0] if isinstance(value, (tuple, list)) else value
    return tuple(int(size) for size in value.shape)


def _matmul(node: fx.Node) -> int:
    a = shape_of(node.args[0])
    return math.prod(shape_of(node)) * a[-1]


def _addmm(node: fx.Node) -> int:
    return math.prod(shape_of(node)) * shape_of(node.args[1])[-1]


def _convolution(node: fx.Node) -> int:
    weight = shape_of(node.args[1])  # [out, in / groups, *kernel]
    return math.prod(shape_of(node)) * math.prod(weight[1:])


def _transposed_convolution(node: fx.Node) -> int:
    weight = shape_of(node.args[1])  # [in, out / groups, *kernel]
    return math.prod(shape_of(node.args[0])) * math.prod(weight[1:])


def _any_convolution(node: fx.Node) -> int:
    return _transposed_convolution(node) if node.args[6] else _convolution(node)


def _attention(node: fx.Node) -> int:
    query, key, value = (shape_of(node.args[i]) for i in range(3))
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _einsum(node: fx.Node) -> int:
    equation, operands = node.args[0], node.args[1]
    assert isinstance(equation, str)
    assert isinstance(operands, (list, tuple))
    if len(operands) < 2:
        return 0  # a permutation, a trace or a sum
    sizes: dict[str, int] = {}
    for term, operand in zip(equation.replace(" ", "").split("->")[0].split(","), operands, strict=True):
        shape = shape_of(operand)
        letters = term.replace("...", "." * (len(shape) - len(term.replace("...", ""))))
        dots = letters.count(".")
        named = []
        for letter in letters:  # an ellipsis stands for dimensions aligned from the right
            named.append(f".{dots}" if letter == "." else letter)
            dots -= letter == "."
        for letter, size in zip(named, shape, strict=True):
            sizes[letter] = max(sizes.get(letter, 1), size)
    return math.prod(sizes.values()) * (len(operands) - 1)


COUNTERS: dict[Any, Callable[[fx.Node], int]] = {
    aten.linear: _matmul,
    aten.mm: _matmul,
    aten.bmm: _matmul,
    aten.matmul: _matmul,
    aten.mv: _matmul,
    aten.addmm: _addmm,
    aten.baddbmm: _addmm,
    aten.einsum: _einsum,
    aten.conv1d: _convolution,
    aten.conv2d: _convolution,
    aten.conv3d: _convolution,
    aten.conv_transpose1d: _transposed_convolution,
    aten.conv_transpose2d: _transposed_convolution,
    aten.conv_transpose3d: _transposed_convolution,
    aten.convolution: _any_convolution,
}
ATTENTION = (
    aten.scaled_dot_product_attention,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
)
COUNTERS.update(dict.fromkeys(ATTENTION, _attention))
# Products with quantised weights; which of them there are depends on the version of PyTorch.
QUANTISED = (
    "_int_mm _scaled_mm _grouped_mm _scaled_grouped_mm _weight_int8pack_mm _weight_int4pack_mm _weight_int4pack_mm_for_cpu "
    "_dyn_quant_matmul_4bit"
)
COUNTERS.update({getattr(aten, name): _matmul for name in QUANTISED.split() if hasattr(aten, name)})


def count_macs(node: fx.Node) -> int:
    """Multiply-accumulates of one node; 0 for everything that is not a matrix product, convolution or attention."""
    counter = COUNTERS.get(getattr(node.target, "overloadpacket", None)) if node.op == "call_function" else None
    if counter is None and _is_foreign_product(node):
        counter = _matmul
    return counter(node) if counter else 0


def _is_foreign_product(node: fx.Node) -> bool:
    """Whether an operator of another library takes ``[..., K]`` and a matrix of bytes, and gives ``[..., N]``: a layer with
    quantised weights."""
    if getattr(node.target, "namespace", "aten") == "aten" or len(node.args) < 2:
        return False
    values: list[Any] = [n.meta.get("val") if isinstance(n, fx.Node) else None for n in (*node.args[:2], node)]
    x, weight, result = values
    if not all(isinstance(value, torch.Tensor) for value in values):
        return False
    return bool(weight.dim() == 2 and weight.dtype.itemsize == 1 and x.dim() > 1 and x.shape[:-1] == result.shape[:-1])


def count_attention_macs(node: fx.Node) -> int:
    """Multiply-accumulates of one node if it is attention, else 0."""
    return count_macs(node) if getattr(node.target, "overloadpacket", None) in ATTENTION else 0
