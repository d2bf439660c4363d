"""Models and calls without memory: fake tensors have shapes only."""

from __future__ import annotations

import contextlib
import copy
import itertools
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fxmask._torch import FAKE_TENSOR_LOGGERS, FakeTensor, FakeTensorMode, own_attributes, own_tensors, pytree, quiet_loggers


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """Failures that are expected are not logged by torch, and its warnings about its own internals are not shown."""
    with quiet_loggers(*FAKE_TENSOR_LOGGERS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch(\.|$)")
        warnings.filterwarnings("ignore", message="The tensor attribute")  # is set by forward: undone, and compared
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def is_abstract(model: torch.nn.Module) -> bool:
    """Whether the model has shapes but no weights: built on the meta device or under a fake tensor mode."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return any(x.is_meta or isinstance(x, FakeTensor) for x in tensors)


def fake_copy(model: torch.nn.Module, mode: FakeTensorMode) -> torch.nn.Module:
    """A copy of the model whose tensors have shapes but no memory; nothing that is done to it reaches the model."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        loose = pytree.tree_leaves(own_attributes(module)) if is_abstract(model) else []  # e.g. a list of tables
        for value in itertools.chain(own_tensors(module), loose):
            if isinstance(value, torch.Tensor) and id(value) not in memo:
                fake: torch.Tensor = _fake(value, mode)
                if isinstance(value, torch.nn.Parameter):
                    fake = torch.nn.Parameter(fake, requires_grad=False)
                memo[id(value)] = fake
    return copy.deepcopy(model, memo)


def _fake(x: torch.Tensor, mode: FakeTensorMode, device: torch.device | None = None) -> torch.Tensor:
    if device is None:
        device = torch.device("cpu") if x.device.type == "meta" else x.device
    with mode:
        return torch.empty(tuple(x.shape), dtype=x.dtype, device=device)


def fake_call(call: Mapping[str, Any], mode: FakeTensorMode, device: torch.device | None = None) -> dict[str, Any]:
    """The arguments as fake tensors, on a device if one is given."""
    faked: dict[str, Any] = pytree.tree_map(lambda x: _fake(x, mode, device) if isinstance(x, torch.Tensor) else x, dict(call))
    return faked
