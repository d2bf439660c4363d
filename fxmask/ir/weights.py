"""Parameters and buffers by name."""

from __future__ import annotations

import keyword

import torch
from torch import fx


def named_tensors(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name, shared ones under each of their names."""
    parameters = list(model.named_parameters(remove_duplicate=False))
    return parameters + list(model.named_buffers(remove_duplicate=False))


def attribute_of(path: str) -> str:
    """The path with names that generated code cannot spell (``layers.in``) changed a little."""
    return ".".join(f"{part}_" if keyword.iskeyword(part) else part for part in path.split("."))


def detach_weights(module: fx.GraphModule) -> None:
    """Let a graph module hold its weights, which stay the same memory, without asking for their gradients.

    The module must hold its attributes alone, as one that was made from a graph does.
    """
    for node in module.graph.find_nodes(op="get_attr"):
        path, _, name = str(node.target).rpartition(".")
        owner = module.get_submodule(path)
        value = getattr(owner, name)
        if isinstance(value, torch.Tensor) and value.requires_grad:
            delattr(owner, name)
            owner.register_buffer(name, value.detach(), persistent=False)
