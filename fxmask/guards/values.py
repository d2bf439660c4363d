"""Arguments that are no tensors, compared by value; and objects with tensors inside, opened so that these are inputs.

``repr`` says too little of an object and nothing of a large array. Here a value becomes a key: numbers by type and value,
containers and objects by what is in them, arrays by their bytes, functions and classes by identity.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import types
from collections.abc import Mapping
from typing import Any

import numpy
import torch

from fxmask._torch import pytree, version_of

PLAIN = (type(None), bool, int, str, bytes, torch.dtype, torch.device, torch.Size, enum.Enum, range, type(...))
LONGEST_BYTES = 64  # arrays with more are compared by digest
DEEPEST = 20  # of nested values; what is deeper is compared by identity


class Identity:
    """Equal to nothing but the same object, which it keeps alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        return f"{type(self.value).__name__} at {id(self.value):#x}"


def key_of(value: Any, depth: int = 0) -> Any:
    """A hashable key: equal for values that a model cannot tell apart."""
    if isinstance(value, PLAIN):
        return (type(value), value)
    if isinstance(value, (float, complex)):
        return (type(value), repr(value))  # NaN equals NaN, and 0.0 is not -0.0
    if depth > DEEPEST or isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType, torch.nn.Module)):
        return Identity(value)
    if isinstance(value, (list, tuple)):
        return (type(value), tuple(key_of(x, depth + 1) for x in value))
    if isinstance(value, (set, frozenset)):
        return (type(value), frozenset(key_of(x, depth + 1) for x in value))
    if isinstance(value, Mapping):
        return (type(value), tuple((key_of(k, depth + 1), key_of(v, depth + 1)) for k, v in value.items()))
    if isinstance(value, (numpy.ndarray, numpy.generic)):
        return (type(value), str(value.dtype), value.shape, _digest(value.tobytes()))
    if isinstance(value, torch.Tensor):
        return (type(value), value.dtype, value.device, tuple(value.shape), Identity(value), version_of(value))
    state = state_of(value)
    if state is None:
        return Identity(value)
    return (type(value), tuple((name, key_of(x, depth + 1)) for name, x in state.items()))


def state_of(value: Any) -> dict[str, Any] | None:
    """Attributes of an object that is nothing but its attributes; ``None`` for others."""
    if callable(value) and not dataclasses.is_dataclass(value):
        return None
    state = dict(getattr(value, "__dict__", {}))
    for cls in type(value).__mro__:
        state.update({n: getattr(value, n) for n in slots_of(cls) if hasattr(value, n)})
    return state or None


def slots_of(cls: type) -> tuple[str, ...]:
    """Names of the attributes that a class itself keeps in slots."""
    slots = vars(cls).get("__slots__", ())
    slots = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(n for n in slots if n not in ("__dict__", "__weakref__"))


def text_of(value: Any) -> str:
    """A value for a message, on one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{type(value).__name__} {text[:50]}..."


def _digest(data: bytes) -> bytes:
    return data if len(data) <= LONGEST_BYTES else hashlib.sha256(data).digest()


# Objects with tensors inside


class Opened:
    """An object as a node of a tree of arguments: its class and its attributes are the branches.

    Args:
        cls: of the object.
        state: its attributes by name; what a dict subclass holds is under ``ITEMS``.
    """

    def __init__(self, cls: Any, state: dict[str, Any]) -> None:
        self.cls = cls
        self.state = state

    def rebuilt(self) -> Any:
        """An object of the same class with these attributes. Its ``__init__`` is not called."""
        fresh = self.cls.__new__(self.cls)
        for name, value in self.state.items():
            if name == ITEMS:
                fresh.update(value)
            else:
                object.__setattr__(fresh, name, value)
        return fresh


ITEMS = "items()"


def opened(value: Any, depth: int = 0) -> Any:
    """The value with every object that holds tensors opened, and NumPy's numbers as Python's."""
    if isinstance(value, numpy.generic):
        return value.item()
    if isinstance(value, (torch.Tensor, *PLAIN, float)) or depth > DEEPEST:
        return value
    if type(value) in (list, tuple):
        return type(value)(opened(x, depth + 1) for x in value)
    if type(value) is dict:
        return {k: opened(v, depth + 1) for k, v in value.items()}
    if not holds_tensor(value) or pytree.tree_is_leaf(value) is False:
        return value
    state = state_of(value) or {}
    if isinstance(value, dict):
        state[ITEMS] = dict(value)
    return Opened(type(value), {name: opened(x, depth + 1) for name, x in state.items()})


def closed(value: Any) -> Any:
    """The value with every opened object put together again."""
    if isinstance(value, Opened):
        return Opened(value.cls, {name: closed(x) for name, x in value.state.items()}).rebuilt()
    if type(value) in (list, tuple):
        return type(value)(closed(x) for x in value)
    return {k: closed(v) for k, v in value.items()} if type(value) is dict else value


def holds_tensor(value: Any, depth: int = 0) -> bool:
    """Whether a tensor is somewhere inside."""
    if isinstance(value, torch.Tensor):
        return True
    if isinstance(value, (*PLAIN, torch.nn.Module, type, types.ModuleType, types.FunctionType)) or depth > DEEPEST:
        return False
    if isinstance(value, (list, tuple)):
        return any(holds_tensor(x, depth + 1) for x in value)
    if isinstance(value, Mapping) and any(holds_tensor(x, depth + 1) for x in value.values()):
        return True
    state = state_of(value)
    return state is not None and any(holds_tensor(x, depth + 1) for x in state.values())


def _children(x: Opened) -> tuple[list[Any], tuple[str, ...]]:
    return [x.cls, *x.state.values()], tuple(x.state)


def _children_by_name(x: Opened) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
    named = [(pytree.GetAttrKey("__class__"), x.cls), *((pytree.GetAttrKey(n), v) for n, v in x.state.items())]
    return named, tuple(x.state)


def _from_children(values: Any, names: tuple[str, ...]) -> Opened:
    cls, *rest = values
    return Opened(cls, dict(zip(names, rest, strict=True)))


pytree.register_pytree_node(
    Opened, _children, _from_children, flatten_with_keys_fn=_children_by_name, serialized_type_name="fxmask.Opened"
)
