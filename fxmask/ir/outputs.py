"""What a denoiser returns, as a flat list of tensors and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxmask.errors import CaptureError


@dataclass(frozen=True)
class OutputSpec:
    """How the flat tensors of a graph become what the model returns.

    Attributes:
        rebuild: for each value of ``return_dict`` (``None`` if the model has none), a function from the flat list of
            tensors to the model's own return type.
    """

    rebuild: Mapping[Any, Callable[[Sequence[Any]], Any]]

    def __call__(self, tensors: Sequence[Any], return_dict: Any = None) -> Any:
        """What the model would have returned."""
        build = self.rebuild.get(return_dict) or next(iter(self.rebuild.values()))
        return build(tensors)


def flatten_output(output: Any) -> tuple[list[torch.Tensor], Callable[[Sequence[Any]], Any]]:
    """Tensor leaves of a model's output, and the function that puts tensors back in their place.

    Understands tensors, containers, named tuples, and any dataclass (diffusers' ``BaseOutput`` included).

    Raises:
        CaptureError: the output holds something that is neither a tensor nor plain data.
    """
    if isinstance(output, torch.Tensor):
        return [output], lambda tensors: tensors[0]
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        names = [f.name for f in dataclasses.fields(output)]
        if all(type(getattr(output, name)) is torch.Tensor for name in names):  # as most models do: built in the shortest way
            whole: Any = type(output)
            return [getattr(output, name) for name in names], lambda flat: whole(*flat[: len(names)])
        tensors, build = flatten_output({name: getattr(output, name) for name in names})
        cls: Any = type(output)
        return tensors, lambda flat: cls(**build(flat))
    if isinstance(output, Mapping):
        kind: Any = dict if type(output) is dict else type(output)
        return _flatten_items(list(output.values()), lambda values: kind(zip(output.keys(), values, strict=True)))
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        named: Any = type(output)
        return _flatten_items(list(output), lambda values: named(*values))
    if isinstance(output, (tuple, list)):
        sequence: Any = type(output)
        return _flatten_items(list(output), lambda values: sequence(values))
    if output is None or isinstance(output, (bool, int, float, str)):
        return [], lambda tensors: output
    raise CaptureError(
        f"the denoiser returned a {type(output).__name__}, which is neither a tensor, a container nor a dataclass"
    )


def _flatten_items(
    items: list[Any], build: Callable[[list[Any]], Any]
) -> tuple[list[torch.Tensor], Callable[[Sequence[Any]], Any]]:
    parts = [flatten_output(item) for item in items]
    counts = [len(tensors) for tensors, _ in parts]

    def rebuild(flat: Sequence[Any]) -> Any:
        values, start = [], 0
        for (_, part), count in zip(parts, counts, strict=True):
            values.append(part(flat[start : start + count]))
            start += count
        return build(values)

    return [x for tensors, _ in parts for x in tensors], rebuild


def first_tensor(output: Any) -> torch.Tensor:
    """The prediction in a model's output: its first tensor.

    Raises:
        CaptureError: there is no tensor in it.
    """
    tensors, _ = flatten_output(output)
    if not tensors:
        raise CaptureError(f"the denoiser returned no tensor (got {type(output).__name__})")
    return tensors[0]


def sampled_part(output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """The part of a prediction ``[rows, ...]`` that has a sample's shape: models that predict a variance have more channels."""
    wider = output.dim() == sample.dim() > 1 and output.shape[1] > sample.shape[1] and output.shape[2:] == sample.shape[2:]
    return output[:, : sample.shape[1]] if wider else output
