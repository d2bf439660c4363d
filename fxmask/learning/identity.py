"""What a checkpoint belongs to: everything that decides what is measured."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from fxmask.ir.program import Program
from fxmask.ir.weights import named_tensors
from fxmask.sampling.sampler import Sampler


def identity_of(program: Program, trajectories: Sequence[Sampler], options: Sequence[Any]) -> str:
    """A digest of the model with its weights, of all recorded runs, and of the options of learning.

    Args:
        program: the captured denoiser.
        trajectories: all recorded runs.
        options: whatever else decides what is measured; they are told apart by ``repr``.
    """
    digest = hashlib.sha256()
    digest.update(repr((program.fingerprint, tuple(options))).encode())
    for name, tensor in named_tensors(program.model):
        _add(digest, name, tensor)
    for name, tensor in program.weights.items():
        _add(digest, name, tensor)
    for run in trajectories:
        digest.update(repr((run.timesteps, run.order, run.stochastic)).encode())
        for name, tensor in _tensors_of(run):
            _add(digest, name, tensor)
    return digest.hexdigest()


def _tensors_of(run: Sampler) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything that a run was given and made, each tensor once; plain arguments as text go into the names."""
    yield "initial", run.initial_noise
    yield "final", run.final
    yield from ((f"noise {i}", x) for i, noises in enumerate(getattr(run, "noises", ())) for x in noises)
    yield from ((f"output {i}", x) for i, lanes in enumerate(run.outputs) for x in lanes)
    seen: dict[int, torch.Tensor] = {}  # kept alive, so that no number is used again
    for i, lanes in enumerate(run.calls):
        for call in lanes:
            for name, tensor in _flat(call, f"call {i}"):
                if id(tensor) not in seen:
                    seen[id(tensor)] = tensor
                    yield name, tensor


def _flat(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of nested arguments. Numbers and strings are tensors here, too."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for k, item in enumerate(value):
            yield from _flat(item, f"{name}.{k}")
    elif value is None or isinstance(value, (bool, int, float, str)):
        yield f"{name} = {value!r}", torch.empty(0)


def _add(digest: Any, name: str, tensor: torch.Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    if tensor.device.type != "meta":
        plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy())
