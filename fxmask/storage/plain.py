"""Nested arguments as JSON, tensors aside."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from fxmask.errors import MaskError

NUMBERS = {str(x): x for x in (math.nan, math.inf, -math.inf)}  # which JSON has no form for


def to_plain(value: Any, tensors: dict[str, torch.Tensor], name: str) -> Any:
    """Nested arguments as JSON; tensors are put into ``tensors``.

    Raises:
        MaskError: an argument is of a type that cannot be saved.
    """
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"mapping": [[str(key), to_plain(item, tensors, f"{name}.{key}")] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [to_plain(item, tensors, f"{name}.{k}") for k, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise MaskError(
        f"argument {name.removeprefix('example.')} of the captured call is a {type(value).__name__}, which cannot be saved"
    )


def from_plain(state: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Nested arguments again from what ``to_plain`` made of them.

    Raises:
        ValueError, KeyError, TypeError: it made no such thing.
    """
    ((kind, value),) = state.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "mapping":
        found = {_text(key): from_plain(item, tensors) for key, item in value}
        if len(found) != len(value):
            raise ValueError("an argument of the example is repeated")
        return found
    if kind in ("tuple", "list"):
        return (tuple if kind == "tuple" else list)(from_plain(item, tensors) for item in value)
    if kind == "float":
        return NUMBERS[value]
    if kind != "value" or not (value is None or isinstance(value, (bool, int, float, str))):
        raise ValueError(f"an argument of the example is a {kind}")
    return value


def _text(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"an argument of the example is named {key!r}")
    return key
