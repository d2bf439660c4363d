"""Nested arguments as JSON, tensors aside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fxmask.errors import MaskError


def to_plain(value: Any, tensors: dict[str, torch.Tensor], name: str) -> Any:
    """Nested arguments as PLAN, tensors aside."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"mapping": [[str(key), to_plain(item, tensors, f"{name}.{key}")] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [to_plain(item, tensors, f"{name}.{k}") for k, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise MaskError(
        f"argument {name.removeprefix('example.')} of the captured call is a {type(value).__name__}, which cannot be saved"
    )


def from_plain(state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    """Nested arguments again from what ``to_plain`` made of them."""
    ((kind, value),) = state.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "mapping":
        return {key: from_plain(item, tensors) for key, item in value}
    if kind in ("tuple", "list"):
        return (tuple if kind == "tuple" else list)(from_plain(item, tensors) for item in value)
    return value
