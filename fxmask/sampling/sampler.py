"""Sampler: what learning needs of a recorded run, whoever recorded it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

Call = Mapping[str, Any]
Denoiser = Callable[..., Any]
Loop = Generator[dict[str, Any], torch.Tensor, torch.Tensor]


@runtime_checkable
class Sampler(Protocol):
    """One recorded batch of sampling runs that can be run again with another denoiser.

    Attributes are those of ``Recording``, which has everything but ``loop`` and ``renoised``.
    """

    @property
    def calls(self) -> Sequence[Sequence[Call]]:
        """Per step and lane the call's arguments by parameter name; the noisy sample is ``[B, ...]``."""

    @property
    def outputs(self) -> Sequence[Sequence[torch.Tensor]]:
        """Per step and lane the model's prediction, ``[B, ...]``."""

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The T timestep values as the denoiser receives them."""

    @property
    def initial_noise(self) -> torch.Tensor:
        """The sample before the first step, ``[B, ...]``."""

    @property
    def final(self) -> torch.Tensor:
        """The samples after the last step, ``[B, ...]``."""

    @property
    def sample(self) -> str:
        """Name of the denoiser's sample argument."""

    @property
    def num_steps(self) -> int:
        """T, the number of denoiser calls (per lane)."""

    @property
    def order(self) -> tuple[tuple[int, int], ...]:
        """(step, lane) of every denoiser call, in order."""

    @property
    def stochastic(self) -> bool:
        """Whether the sampler injects noise."""

    @property
    def batch_size(self) -> int:
        """B."""

    def loop(self) -> Loop:
        """The sampler as a generator: yields the denoiser's calls, in order, and is sent the prediction of each."""

    def renoised(self, model: torch.nn.Module, seed: int) -> Sampler:
        """The same conditioning, recorded with other noise."""

    def rollout(self, denoiser: Denoiser) -> torch.Tensor:
        """The final samples with another denoiser and the same noise."""


@runtime_checkable
class ChangesType(Protocol):
    """A sampler that can be recorded again, from the same noise, with a model in another type."""

    def in_type(self, model: torch.nn.Module, dtype: torch.dtype) -> Sampler:
        """The same run of a model whose type is ``dtype``."""


@runtime_checkable
class Renews(Protocol):
    """A sampler that can run from noise of its own at every pass, and keeps nothing of it."""

    def fresh_loop(self, seed: int) -> Loop:
        """The sampler as a generator, as ``Sampler.loop``, with the same conditioning and other noise."""


@runtime_checkable
class Splits(Protocol):
    """A sampler whose batch can be taken apart."""

    def rows(self, first: int, end: int) -> Sampler | None:
        """Some of the samples of the batch, as runs of their own, if they do not depend on the others."""


@runtime_checkable
class ChangesSteps(Protocol):
    """A sampler that can take another number of steps from the same start, like one recorded from a scheduler alone."""

    @property
    def can_change_steps(self) -> bool:
        """Whether its scheduler can be set to another number of steps."""

    def with_steps(self, model: torch.nn.Module, num_inference_steps: int) -> Sampler:
        """The same start and conditioning with another number of steps."""
