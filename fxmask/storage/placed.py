"""A saved call, put where a model is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fxmask._torch import pytree


def placed_call(example: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The arguments with their tensors on a device."""
    placed: dict[str, Any] = pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), dict(example))
    return placed
