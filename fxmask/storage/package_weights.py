"""The model's weights by name, and the constants that the graph holds and the model does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fxmask.errors import MaskError
from fxmask.ir.program import Program
from fxmask.ir.weights import attribute_of, named_tensors
from fxmask.storage.folders import differences, digest

CONSTANTS = "package.safetensors"
FOREIGN = "copy the folder as a whole, or export it again"


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
    folder: Path, state: Mapping[str, Any], model: torch.nn.Module, device: torch.device
) -> dict[str, torch.Tensor]:
    """What the graph holds: the model's own tensors, and constants.

    Raises:
        MaskError: the model's tensors are not those that were exported; lists up to ten differences.
    """
    if not (folder / CONSTANTS).is_file() or digest(folder / CONSTANTS) != state["constants"]:
        raise MaskError(f"{folder / CONSTANTS} is not the file that was exported; {FOREIGN}")
    constants = load_file(folder / CONSTANTS)
    tensors = dict(named_tensors(model))
    attributes: dict[str, torch.Tensor] = {}
    lines = []
    for target, expected in state["program"]["weights"].items():
        name = expected["name"]
        if name is None:
            kind = torch.device(expected["device"])
            attributes[target] = _strided(constants[target], expected["stride"]).to(
                device if device.type == kind.type else kind
            )
        elif name not in tensors:
            lines.append(f"{name}: exported {expected['dtype']}{expected['shape']}, now missing")
        else:
            now = {"name": name, **_layout(tensors[name])}
            lines += [line.replace("saved", "exported", 1) for line in differences(expected, now, f"{name}.")]
            attributes[target] = tensors[name]
    if lines:
        more = [f"and {len(lines) - 10} more"] if len(lines) > 10 else []
        raise MaskError(f"the package in {folder} was exported for another model:\n  " + "\n  ".join(lines[:10] + more))
    return attributes


def _layout(tensor: torch.Tensor) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"shape": list(tensor.shape), "dtype": dtype, "stride": list(tensor.stride()), "device": tensor.device.type}


def _strided(tensor: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    """A contiguous tensor in the memory layout that it had; where a stride is 0, one element stands for all."""
    distinct = tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)]
    made = torch.empty_strided(distinct.shape, list(strides), dtype=tensor.dtype).copy_(distinct)
    return made.expand(tensor.shape)
