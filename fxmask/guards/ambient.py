"""What is set around a call and changes what a model computes: part of what a graph is captured for."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from fxmask._torch import default_device, float32_precisions, is_transformed, raw_modes

SDPA = ("flash_sdp_enabled", "mem_efficient_sdp_enabled", "math_sdp_enabled", "cudnn_sdp_enabled")
AUTOCAST_DEVICES = ("cpu", "cuda")


class Ambient(NamedTuple):
    """The modes of PyTorch that a captured or compiled graph depends on, for one device.

    Attributes:
        autocast: the type that autocast computes in, or ``None``.
        default_dtype: of new tensors.
        default_device: of new tensors.
        deterministic: whether only deterministic algorithms are allowed.
        float32_precision: how matrix products and convolutions of float32 are computed, e.g. in TF32.
        attention: which implementations of attention are allowed.
    """

    autocast: torch.dtype | None
    default_dtype: torch.dtype
    default_device: torch.device | None
    deterministic: bool
    float32_precision: tuple[str, ...]
    attention: tuple[bool, ...]

    @classmethod
    def now(cls, device: str) -> Ambient:
        """The modes of this thread, for a device type."""
        return cls(
            torch.get_autocast_dtype(device) if device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device) else None,
            torch.get_default_dtype(),
            default_device(),
            torch.are_deterministic_algorithms_enabled(),
            float32_precisions(),
            tuple(_sdpa()),
        )

    def graph_mode(self) -> contextlib.AbstractContextManager[Any]:
        """How a graph that was captured so runs: autocast is in it, as casts."""
        return contextlib.nullcontext() if self.autocast is None else without_autocast()

    def differences(self, other: Ambient) -> list[str]:
        """What is different, in words."""
        pairs = zip(self._fields, self, other, strict=True)
        return [f"{name.replace('_', ' ')} was {a}, is {b}" for name, a, b in pairs if a != b]


def modes(device: str) -> tuple[Any, ...]:
    """What ``Ambient.now`` is made of, to be compared in each step: equal modes are equal here, whatever they are."""
    autocast = device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)
    return (raw_modes(device), torch.get_autocast_dtype(device) if autocast else None)


def without_autocast() -> contextlib.ExitStack:
    """Nothing is cast from here on, until it is closed."""
    stack = contextlib.ExitStack()
    for device in AUTOCAST_DEVICES:
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def needs_gradients(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether somebody will differentiate through a call: a graph runs without gradients and without transforms."""
    if is_transformed():
        return True
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors.values())


def _sdpa() -> list[bool]:
    fast_path: Any = torch.backends.mha.get_fastpath_enabled  # nested tensors give zeros where a padding mask says so
    return [*(bool(getattr(torch.backends.cuda, name)()) for name in SDPA), bool(fast_path())]
