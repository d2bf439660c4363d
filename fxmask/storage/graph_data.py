"""A functional graph as plain data and back, so that a program can be had without capturing a model.

    %y = linear(%x, %w)     ["call_function", "linear", "aten.linear.default", [{"node": "x"}, {"node": "w"}], {}, value]

Operators go by the names under which PyTorch registers them, weights by the names of graph attributes. No pickle: what is
read can call nothing but registered operators that compute (``operators``), and whatever name becomes part of the code that fx
generates is an identifier.
"""

from __future__ import annotations

import keyword
import math
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxmask._torch import OpOverload, shape_only
from fxmask.errors import MaskError
from fxmask.storage.operators import operator_named

GETITEM = "getitem"
MOST_NODES = 500_000
_NAMED = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
_TORCH_NAMES = {
    kind: {str(x).removeprefix("torch."): x for x in vars(torch).values() if isinstance(x, cls)} for kind, cls in _NAMED.items()
}
_ATTRIBUTE = re.compile(r"\w+(\.\w+)*", re.ASCII)
_OWN = frozenset({"forward", "graph", "code", "training"})  # attributes of a graph module that a weight may not replace


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
        MaskError: an operator is not registered in this process, or is none that a captured program can have; names it.
        Exception: whatever damaged data leads to.
    """
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    if len(data) > MOST_NODES:
        raise ValueError(f"its graph has {len(data)} nodes")
    for op, name, target, args, kwargs, value in data:
        made = _checked_target(op, name, target)
        decoded = _decode(args, nodes, device), _decode(kwargs, nodes, device)
        _check_arguments(op, name, *decoded)
        node = graph.create_node(op, made, *decoded, name)
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


def _checked_target(op: str, name: str, target: Any) -> Any:
    """What a node calls or reads."""
    if not _is_identifier(name):
        raise ValueError(f"a node is named {name!r}")
    if op == "call_function":
        return operator.getitem if target == GETITEM else operator_named(target)
    if op == "get_attr":
        atoms = str(target).split(".")
        if not _ATTRIBUTE.fullmatch(target) or atoms[0] in _OWN or any(atom.startswith("__") for atom in atoms):
            raise ValueError(f"node {name} reads the attribute {target!r}")
    elif op not in ("placeholder", "output") or not _is_identifier(target):
        raise ValueError(f"node {name} is a {op} of {target!r}")
    return target


def _check_arguments(op: str, name: str, args: Any, kwargs: Any) -> None:
    wanted = op in ("call_function", "output")
    if not isinstance(args, tuple) or not isinstance(kwargs, dict) or (not wanted and (args or kwargs)):
        raise ValueError(f"node {name} has arguments of another kind")
    if not all(map(_is_identifier, kwargs)):
        raise ValueError(f"node {name} has arguments named {list(kwargs)}")


def _is_identifier(name: Any) -> bool:
    return isinstance(name, str) and name.isascii() and name.isidentifier() and not keyword.iskeyword(name)


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
        if isinstance(data, int) and not -(2**63) <= data < 2**63:
            raise ValueError(f"an argument is {data}")
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
    return _TORCH_NAMES[kind][value]


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
    """The device of that type that is meant; ``kind`` names no number."""
    if not isinstance(kind, str) or ":" in kind:
        raise ValueError(f"{kind!r} is no kind of device")
    return device if device.type == kind else torch.device(kind)
