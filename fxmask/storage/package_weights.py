"""The model's weights by name, and the constants that the graph holds and the model does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fxmask.errors import MaskError
from fxmask.ir.program import Program
from fxmask.ir.weights import attribute_of, named_tensors
from fxmask.storage.differences import differences
from fxmask.storage.schema import WeightData

PADDING = 16  # a constant's memory is at most so many times its values', and a mebibyte


def weights_to_data(program: Program) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Per graph attribute the name, shape, type and layout of the model's tensor; and the attributes that are constants.

    Raises:
        MaskError: the model's weights are no longer those that were captured.
    """
    named = named_tensors(program.model)
    names = {id(tensor): name for name, tensor in reversed(named)}
    own = {attribute_of(name) for name, _ in named}
    weights: dict[str, Any] = {}
    constants = {}
    for node in program.graph_module.graph.find_nodes(op="get_attr"):
        target, tensor, seen = str(node.target), program.weights[str(node.target)], node.meta["val"]
        name = names.get(id(tensor))
        moved = (tensor.shape, tensor.dtype, tensor.device) != (seen.shape, seen.dtype, seen.device)
        if moved or (name is None and (target in own or isinstance(tensor, torch.nn.Parameter))):
            raise MaskError(
                f"weight {target} was replaced, moved or converted after the model was captured; accelerate the model as it "
                "is now, and export that"
            )
        if name is None:
            constants[target] = tensor
        weights[target] = {"name": name, **_layout(tensor)}
    return weights, constants


def read_attributes(
    folder: Path,
    weights: Mapping[str, WeightData],
    constants: Mapping[str, torch.Tensor],
    model: torch.nn.Module,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """What the graph holds: the model's own tensors, and constants.

    Raises:
        MaskError: the model's tensors are not those that were exported; lists up to ten differences.
        ValueError, KeyError: a constant is missing, or not what is said of it.
    """
    tensors = dict(named_tensors(model))
    attributes: dict[str, torch.Tensor] = {}
    lines = []
    for target, expected in weights.items():
        name = expected.name
        if name is None:
            attributes[target] = _constant(target, constants[target], expected, device)
        elif name not in tensors:
            lines.append(f"{name}: exported {expected.dtype}{expected.shape}, now missing")
        else:
            found = differences(_expected_layout(expected), _layout(tensors[name]), f"{name}.")
            lines += [line.replace("saved", "exported", 1) for line in found]
            attributes[target] = tensors[name]
    if lines:
        more = [f"and {len(lines) - 10} more"] if len(lines) > 10 else []
        raise MaskError(f"the package in {folder} was exported for another model:\n  " + "\n  ".join(lines[:10] + more))
    return attributes


def _constant(target: str, tensor: torch.Tensor, expected: WeightData, device: torch.device) -> torch.Tensor:
    """A constant where it was and in the memory layout that it had."""
    if {**_layout(tensor), "stride": 0, "device": 0} != {**_expected_layout(expected), "stride": 0, "device": 0}:
        raise ValueError(f"constant {target} is {tensor.dtype}{list(tensor.shape)}, not {expected.dtype}{expected.shape}")
    kind = torch.device(expected.device)
    made = _strided(tensor, expected.stride).to(device if device.type == kind.type else kind)
    if list(made.stride()) != expected.stride:
        raise ValueError(f"constant {target} cannot have the strides {expected.stride}")
    return made


def _expected_layout(expected: WeightData) -> dict[str, Any]:
    return {
        "shape": list(expected.shape),
        "dtype": expected.dtype,
        "stride": list(expected.stride),
        "device": expected.device,
    }


def _layout(tensor: torch.Tensor) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"shape": list(tensor.shape), "dtype": dtype, "stride": list(tensor.stride()), "device": tensor.device.type}


def _strided(tensor: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    """A contiguous tensor in the memory layout that it had; where a stride is 0, one element stands for all."""
    if len(strides) != tensor.dim():
        raise ValueError(f"{len(strides)} strides for {tensor.dim()} dimensions")
    distinct = tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)]
    extent = 1 + sum((n - 1) * stride for n, stride in zip(distinct.shape, strides, strict=True) if n > 0)
    if extent * tensor.element_size() > PADDING * distinct.numel() * tensor.element_size() + 2**20:
        raise ValueError(f"strides {list(strides)} are more memory than the values of {list(tensor.shape)}")
    made = torch.empty_strided(distinct.shape, list(strides), dtype=tensor.dtype).copy_(distinct)
    return made.expand(tensor.shape)
