"""Which values may share memory, and copies where they must not."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten


# Operators that always return memory of their own. Anything else is cloned before it is cached: views, operators that
# may return their input (contiguous, dropout, to), and composite ones that are not known here.
FRESH = frozenset(
    getattr(aten, name)
    for name in (
        "linear mm bmm addmm baddbmm conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution "
        "scaled_dot_product_attention add sub mul div neg addcmul addcdiv silu gelu relu leaky_relu elu mish tanh sigmoid "
        "softmax _softmax layer_norm group_norm rms_norm native_layer_norm native_group_norm cat stack clone exp sin cos "
        "rsqrt pow _to_copy upsample_nearest2d upsample_bilinear2d avg_pool2d max_pool2d embedding sum mean"
    ).split()
)


def owns_memory(node: fx.Node) -> bool:
    """Whether a node's operator always returns memory of its own."""
    return node.op == "call_function" and getattr(node.target, "overloadpacket", None) in FRESH


def _root(node: fx.Node) -> fx.Node:
    """The node whose memory ``node`` may share, following everything that is not known to be fresh."""
    while node.op == "call_function" and not owns_memory(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def unalias_outputs(graph: fx.Graph, results: list[fx.Node], cached: set[fx.Node]) -> list[fx.Node]:
    """Clone outputs that may share memory with a cached value, read or written."""
    roots = {_root(node) for node in cached} | cached
    return [clone_of(graph, node) if _root(node) in roots or node in roots else node for node in results]


def clone_of(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A new node that copies a value."""
    copy = graph.call_function(aten.clone.default, (node,))
    copy.meta = dict(node.meta)
    return copy
