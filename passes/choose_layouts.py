"""Choose layouts: on a GPU, whose convolutions run channels-last, which values are channels-last in memory.

    before:  %w = get_attr[conv.weight] [O, C, 3, 3] contiguous; %y = conv2d(%x, %w); %z = add(%x, %y)
    after:   %w marked channels-last;  %y, %z marked channels-last, as PyTorch would have them with such a weight

Inductor runs convolutions channels-last and makes of everything else what the graph says: a weight that is contiguous is
transposed at every call, and so is each cached value, and each value at a cut, on its way out and in again. The marks say what
the layouts would be if the weights were laid out; a compiler that lays weights out goes by them, and others pass over them.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import fx

from fxmask._torch import FakeTensorMode
from fxmask.ir.graph import MARK, attribute, returned
from fxmask.ir.macs import count_macs
from fxmask.passes.conditions import functional, has_shapes
from fxmask.passes.observer import graph_pass

logger = logging.getLogger(__name__)
aten = torch.ops.aten
GPU = "cuda"
LAYOUT = f"{MARK}layout"  # node.meta: strides in elements, where they are others than those of ``val``
CONVOLUTIONS = (aten.conv2d, aten.convolution, aten.conv_transpose2d)
ATTENTION = aten.scaled_dot_product_attention.default
VIEWS = (aten.view.default, aten._unsafe_view.default)

# Inductor leaves graphs with more than 300 operators per convolution as they are; it has taken operators apart by then, which
# makes about three of one. Grouped convolutions are slower channels-last, by what it measured on the models of torchbench.
MOST_NODES = 100
SLOWER_GROUPED, FASTER = 1.358, 0.823


@graph_pass(requires=(functional, has_shapes), otherwise=lambda graph_module: 0)
def choose_layouts(graph_module: fx.GraphModule) -> int:
    """Mark the nodes of a program whose values are to be channels-last; returns how many these are.

    What the program returns keeps its layout.
    """
    if not prefers_channels_last(graph_module):
        return 0
    weights = set(conv_weights(graph_module))
    try:
        found, _ = propagate(graph_module, {node: channels_last(node.meta["val"]) for node in weights})
    except Exception:  # an operator that cannot be tried without memory, or not with other strides
        logger.debug("layouts are left as they are", exc_info=True)
        return 0
    kept = set(returned(graph_module.graph))
    marked = 0
    for node, value in found.items():
        old = node.meta.get("val")
        if isinstance(old, torch.Tensor) and node not in kept and tuple(old.stride()) != value.stride():
            node.meta[LAYOUT] = tuple(value.stride())
            marked += 1
    return marked


def prefers_channels_last(graph_module: fx.GraphModule) -> bool:
    """Whether Inductor would run the convolutions of a graph on a GPU channels-last."""
    found = [node for node in graph_module.graph.nodes if is_convolution(node)]
    if not found or len(graph_module.graph.nodes) >= MOST_NODES * len(found):
        return False
    if any(node.meta["val"].device.type != GPU for node in found):
        return False
    work = {node: count_macs(node) for node in found}
    weighted = sum(macs * (SLOWER_GROUPED if _is_grouped(node) else FASTER) for node, macs in work.items())
    return weighted <= sum(work.values())


def is_convolution(node: fx.Node) -> bool:
    """Whether a node is a convolution over images, [B, C, H, W]."""
    kind = getattr(node.target, "overloadpacket", None)
    value = node.meta.get("val")
    return kind in CONVOLUTIONS and isinstance(value, torch.Tensor) and value.dim() == 4


def _is_grouped(node: fx.Node) -> bool:
    image, weight = (n.meta["val"].shape for n in node.args[:2])  # type: ignore[union-attr]
    return int(weight[1]) > 1 and int(weight[1]) < int(image[1])


def conv_weights(graph_module: fx.GraphModule) -> list[fx.Node]:
    """The weights that nothing but convolutions read and that a layout makes a difference to: those of more than a point."""
    found = []
    for node in graph_module.graph.find_nodes(op="get_attr"):
        value = attribute(graph_module, node)
        if not isinstance(value, torch.Tensor) or value.dim() != 4 or value.shape[2:].numel() == 1 or value.shape[1] == 1:
            continue
        if node.users and all(is_convolution(user) and user.args[1] is node for user in node.users):
            found.append(node)
    return found


def channels_last(value: torch.Tensor) -> tuple[int, ...]:
    """Strides of a tensor of this shape, [B, C, H, W], with the memory of [B, H, W, C]."""
    _, c, h, w = map(int, value.shape)
    return h * w * c, 1, w * c, c


def propagate(
    graph_module: fx.GraphModule, given: dict[fx.Node, tuple[int, ...]]
) -> tuple[dict[fx.Node, torch.Tensor], list[fx.Node]]:
    """Shapes and layouts of all values, without memory, if some weights and arguments have other strides.

    Returns:
        The values, and the views among them that do not exist with these strides: ``reshape`` makes copies there.

    Args:
        graph_module: functional, of fixed shapes.
        given: strides of weights and arguments; others are as they are.

    Raises:
        Exception: whatever an operator raises that does not run without memory.
    """
    values: dict[fx.Node, Any] = {}
    impossible = []
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for node in graph_module.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                like = attribute(graph_module, node) if node.op == "get_attr" else node.meta["val"]
                values[node] = _like(like, given.get(node)) if isinstance(like, torch.Tensor) else like
            elif node.target is ATTENTION:  # which kernel it is depends on the device; its layout, on the kernel alone
                values[node] = _like(node.meta["val"], None)
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                try:
                    values[node] = node.target(*args, **kwargs)
                except (RuntimeError, ValueError):
                    if node.target not in VIEWS:
                        raise
                    values[node] = aten.reshape.default(*args, **kwargs)
                    impossible.append(node)
    return {node: value for node, value in values.items() if isinstance(value, torch.Tensor)}, impossible


def _like(value: torch.Tensor, strides: tuple[int, ...] | None) -> torch.Tensor:
    sizes = tuple(map(int, value.shape))
    return torch.empty_strided(sizes, strides or tuple(map(int, value.stride())), dtype=value.dtype, device=value.device)
