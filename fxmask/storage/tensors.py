"""Tensors as bytes in the safetensors format, and back, bounded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors.torch import load, save

from fxmask.files.sealed import short_digest

HEADER_BYTES = 8 * 2**20  # names, types and shapes of all tensors


def tensors_to_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """A safetensors file."""
    return save({name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()})


def tensor_digests(name: str, content: bytes) -> dict[str, str]:
    """Digests of each tensor of a file, by ``file: tensor``; none where the file is damaged beyond that."""
    try:
        tensors = tensors_from_bytes(content)
    except Exception:  # whatever damage leads to
        return {}
    return {f"{name}: {key}": short_digest(_bytes_of(x)) for key, x in sorted(tensors.items())}


def _bytes_of(x: torch.Tensor) -> bytes:
    head = f"{x.dtype} {tuple(x.shape)} ".encode()
    return head + bytes(x.contiguous().flatten().view(torch.uint8).numpy())


def tensors_from_bytes(content: bytes) -> dict[str, torch.Tensor]:
    """Its tensors.

    Raises:
        ValueError: the header is longer than any of ours, or a truth value is neither 0 nor 1.
        Exception: whatever damage leads to.
    """
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or size > min(HEADER_BYTES, len(content) - 8):
        raise ValueError(f"its header has {size} bytes")
    tensors: dict[str, torch.Tensor] = load(content)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
            raise ValueError(f"{name} holds what is neither true nor false")
    return tensors
