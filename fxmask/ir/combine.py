"""The value of a loaded block: a linear combination of stored ones, as graph nodes or on tensors.

    plain reuse:  x = stored
    forecast:     x = stored_0 * c[0] + stored_1 * c[1] + ...     (in float32 where the value has less precision)

The coefficients are a small tensor, an input of the step graph, so that steps with other coefficients share the graph.
The reference interpreter and the student call the same function on tensors: all round alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

aten = torch.ops.aten
LOW_PRECISION = (torch.float16, torch.bfloat16)


def combine(call: Callable[..., Any], stored: Sequence[Any], coefficients: Any, dtype: torch.dtype) -> Any:
    """Emit ``sum(stored[k] * coefficients[k])``.

    Args:
        call: ``call(operator, *arguments)``: emits a node, or runs the operator.
        stored: K stored values of one shape.
        coefficients: 1-D tensor of type ``coefficient_dtype(dtype)``.
        dtype: of the stored values.
    """
    wide = wide_dtype(dtype)
    total = None
    for k, value in enumerate(stored):
        if wide is not dtype:
            value = call(aten._to_copy.default, value, dtype=wide)
        term = call(aten.mul.Tensor, value, call(aten.select.int, coefficients, 0, k))
        total = term if total is None else call(aten.add.Tensor, total, term)
    return total if wide is dtype else call(aten._to_copy.default, total, dtype=dtype)


def form(stored: Sequence[torch.Tensor], coefficients: Sequence[float]) -> torch.Tensor:
    """The same on tensors: ``sum(stored[k] * coefficients[k])``."""
    dtype = stored[0].dtype
    flat = torch.tensor(coefficients, dtype=coefficient_dtype(dtype), device=stored[0].device)
    result: torch.Tensor = combine(lambda op, *args, **kwargs: op(*args, **kwargs), stored, flat, dtype)
    return result


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of sums of values of type ``dtype``: float32 where it has less."""
    return torch.float32 if dtype in LOW_PRECISION else dtype


def coefficient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of the coefficients of values of type ``dtype``: float32, or float64 for float64 values."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def root_mean_square(difference: torch.Tensor, lanes: Sequence[float]) -> torch.Tensor:
    """Root mean square of a difference of predictions ``[rows, ...]`` for every image, float32 ``[N]``, on its device.

    Args:
        difference: of one call.
        lanes: how the rows of an image are combined, lane by lane: guidance at 4 has -3 and 4, up to a factor.
    """
    scale = 1.0
    if len(lanes) > 1 and difference.shape[0] % len(lanes) == 0:
        parts = difference.reshape(len(lanes), -1, *difference.shape[1:])
        total = parts[0] * lanes[0]
        for part, c in zip(parts[1:], lanes[1:], strict=True):
            total = torch.add(total, part, alpha=c)
        difference = total
    else:
        scale = math.hypot(*lanes)
    flat = difference.flatten(1) if difference.dim() > 1 else difference.reshape(-1, 1)
    found: torch.Tensor = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float32) * (scale / math.sqrt(flat.shape[1]))
    return found
