"""What every recorded run holds, whoever recorded it."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from fxmask.errors import InputError
from fxmask.ir.outputs import first_tensor
from fxmask.sampling.sampler import Call, Denoiser, Loop


@dataclass(frozen=True, eq=False)
class Recording(ABC):
    """The T denoiser calls of one batch of sampling runs.

    Attributes:
        calls: per step and lane the call's arguments by parameter name; the noisy sample is ``[B, ...]``.
        outputs: per step and lane the model's prediction, ``[B, ...]``.
        timesteps: the T timestep values as the denoiser receives them.
        initial_noise: the sample before the first step, ``[B, ...]``.
        noises: per step, every random tensor that the sampler drew.
        final: the samples after the last step, ``[B, ...]``.
        sample: name of the denoiser's sample argument.
    """

    calls: tuple[tuple[Call, ...], ...]
    outputs: tuple[tuple[torch.Tensor, ...], ...]
    timesteps: tuple[float, ...]
    initial_noise: torch.Tensor
    noises: tuple[tuple[torch.Tensor, ...], ...]
    final: torch.Tensor
    sample: str

    @property
    def num_steps(self) -> int:
        """T, the number of denoiser calls (per lane)."""
        return len(self.calls)

    @property
    def order(self) -> tuple[tuple[int, int], ...]:
        """(step, lane) of every denoiser call, in order."""
        return tuple((i, lane) for i, step in enumerate(self.calls) for lane in range(len(step)))

    @property
    def stochastic(self) -> bool:
        """Whether the sampler injects noise."""
        return any(self.noises)

    @property
    def batch_size(self) -> int:
        """B."""
        return int(self.initial_noise.shape[0])

    @abstractmethod
    def loop(self) -> Loop:
        """The sampler as a generator: yields the denoiser's calls, in order, and is sent the prediction of each.

        The same noise as in the recording. Its return value is the final samples, ``[B, ...]``.
        """

    @abstractmethod
    def renoised(self, model: torch.nn.Module, seed: int) -> Recording:
        """The same conditioning, recorded with other noise."""

    @torch.no_grad()
    def rollout(self, denoiser: Denoiser) -> torch.Tensor:
        """Replay the sampler with another denoiser and the same noise.

        Args:
            denoiser: called like the model. An ``AcceleratedModel`` runs inside a generation of its own.

        Returns:
            The final samples, ``[B, ...]``.
        """
        if not callable(denoiser):
            raise InputError(f"a {type(denoiser).__name__} cannot be called; roll out a model, or what fxmask.compile makes")
        generation = getattr(denoiser, "generation", contextlib.nullcontext)
        loop = self.loop()
        try:
            with generation():
                call = next(loop)
                while True:
                    call = loop.send(first_tensor(denoiser(**call)))
        except StopIteration as end:
            final: torch.Tensor = end.value
            return final
        finally:
            loop.close()

    def __repr__(self) -> str:
        lanes = sorted({len(step) for step in self.calls})
        steps = f"{self.num_steps} steps from timestep {self.timesteps[0]:g} to {self.timesteps[-1]:g}"
        shape = "x".join(map(str, self.initial_noise.shape))
        noise = "stochastic" if self.stochastic else "deterministic"
        return (
            f"{type(self).__name__}({steps}, {'-'.join(map(str, lanes))} call(s) a step, {noise}, samples {shape} "
            f"{str(self.initial_noise.dtype).removeprefix('torch.')} on {self.initial_noise.device})"
        )
