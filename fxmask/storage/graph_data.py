"""A functional graph as plain data and back, so that a program can be had without capturing a model.

    %y = linear(%x, %w)     ["call_function", "linear", "aten.linear.default", [{"node": "x"}, {"node": "w"}], {}, value]

Operators go by the names under which PyTorch registers them, weights by the names of graph attributes. No pickle: what is
read can call nothing but registered operators.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxmask._torch import OpOverload, shape_only
from fxmask.errors import MaskError

GETITEM = "getitem"
_NAMED = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def graph_to_data(graph: fx.Graph) -> list[Any]:
    """The nodes of a graph in order: ``[op, name, target, args, kwargs, value]`` each, fit for JSON.

    Raises:
        MaskError: an operator or an argument has no name that another process would know.
    """
    return [
        [node.op, node.name, _target(node), _encode(node.args), _encode(node.kwargs), _encode_value(node.meta.get("val"))]
        for node in graph.nodes
    ]


def graph_from_data(data: Sequence[Any], attributes: Mapping[str, torch.Tensor], device: torch.device) -> fx.GraphModule:
    """A graph module whose nodes have their shapes in ``meta["val"]``.

    Args:
        data: from ``graph_to_data``.
        attributes: weights and constants by graph attribute.
        device: in place of every device of its type.

    Raises:
        MaskError: an operator is not registered in this process; names it.
        Exception: whatever damaged data leads to.
    """
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for op, name, target, args, kwargs, value in data:
        made: Any = _operator(target) if op == "call_function" else target
        node = graph.create_node(op, made, _decode(args, nodes, device), _decode(kwargs, nodes, device), name)
        if node.name != name:
            raise ValueError(f"two nodes are named {name!r}")
        nodes[name] = node
        if op != "output":
            node.meta["val"] = _decode_value(value, device)
    graph.lint()
    return fx.GraphModule(dict(attributes), graph, class_name="Program")


def _target(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    if node.target is operator.getitem:
        return GETITEM
    if isinstance(node.target, OpOverload):
        return str(node.target)
    raise MaskError(
        f"operator {node.target} of the program ({node.name}) is not registered with PyTorch and cannot be exported"
    )


def _operator(name: str) -> Any:
    if name == GETITEM:
        return operator.getitem
    namespace, packet, overload = name.split(".")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    except AttributeError:
        raise MaskError(f"operator {name} is not registered in this process; import the library that defines it") from None


def _encode(value: Any) -> Any:
    """Lists are lists; everything else that JSON has no form for is an object of one entry."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item) for item in value]}
    if isinstance(value, (list, fx.immutable_collections.immutable_list)):
        return [_encode(item) for item in value]
    if isinstance(value, Mapping):
        return {"mapping": [[str(key), _encode(item)] for key, item in value.items()]}
    if isinstance(value, torch.device):
        return {"device": value.type}
    for kind, cls in _NAMED.items():
        if isinstance(value, cls):
            return {kind: str(value).removeprefix("torch.")}
    if isinstance(value, complex):
        return {"complex": [_encode(value.real), _encode(value.imag)]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise MaskError(f"an argument of the program's graph is a {type(value).__name__}, which cannot be exported")


def _decode(data: Any, nodes: Mapping[str, fx.Node], device: torch.device) -> Any:
    if isinstance(data, list):
        return [_decode(item, nodes, device) for item in data]
    if not isinstance(data, dict):
        return data
    ((kind, value),) = data.items()
    if kind == "node":
        return nodes[value]
    if kind == "tuple":
        return tuple(_decode(item, nodes, device) for item in value)
    if kind == "mapping":
        return {key: _decode(item, nodes, device) for key, item in value}
    if kind == "device":
        return _placed(value, device)
    if kind == "complex":
        return complex(*(_decode(part, nodes, device) for part in value))
    if kind == "float":
        return float(value)
    found = getattr(torch, value)
    if not isinstance(found, _NAMED[kind]):
        raise ValueError(f"{value} is no {kind}")
    return found


def _encode_value(value: Any) -> Any:
    """Shapes of what a node computes."""
    if isinstance(value, torch.Tensor):
        shape, strides = [int(n) for n in value.shape], [int(n) for n in value.stride()]
        return {
            "shape": shape,
            "stride": strides,
            "dtype": str(value.dtype).removeprefix("torch."),
            "device": value.device.type,
        }
    if isinstance(value, (list, tuple)):
        return [_encode_value(item) for item in value]
    return _encode(value)


def _decode_value(data: Any, device: torch.device) -> Any:
    if isinstance(data, list):
        return tuple(_decode_value(item, device) for item in data)
    if isinstance(data, dict) and "shape" in data:
        dtype = _decode({"dtype": data["dtype"]}, {}, device)
        return _Shaped(data["shape"], data["stride"], dtype, _placed(data["device"], device))
    return _decode(data, {}, device)


class _Shaped(torch.Tensor):
    """Shape, layout, type and device without memory. A FakeTensor too is that, but imports a compiler."""

    @staticmethod
    def __new__(cls, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device) -> _Shaped:
        made: _Shaped = shape_only(cls, shape, strides, dtype, device)
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{self.dtype}{list(self.shape)} on {self.device}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"{func} needs values, and this is only the shape of one")


def _placed(kind: str, device: torch.device) -> torch.device:
    return device if device.type == kind else torch.device(kind)
