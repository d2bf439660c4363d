"""Parameters and buffers by name."""

from __future__ import annotations

import keyword

import torch


def named_tensors(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name, shared ones under each of their names."""
    parameters = list(model.named_parameters(remove_duplicate=False))
    return parameters + list(model.named_buffers(remove_duplicate=False))


def attribute_of(path: str) -> str:
    """The path with names that generated code cannot spell (``layers.in``) changed a little."""
    return ".".join(f"{part}_" if keyword.iskeyword(part) else part for part in path.split("."))
