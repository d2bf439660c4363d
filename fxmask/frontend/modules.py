"""Facts about modules."""

from __future__ import annotations

import itertools

import torch


def module_device(model: torch.nn.Module) -> torch.device:
    """Device of the first parameter or buffer; CPU if there is none."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def module_dtype(model: torch.nn.Module) -> torch.dtype:
    """Type of the first floating-point parameter; the default type if there is none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
