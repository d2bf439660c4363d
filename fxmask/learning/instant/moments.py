"""Second moments of recorded predictions and samples: all that closed-form fits need of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fxmask.errors import InputError
from fxmask.ir.combine import wide_dtype
from fxmask.ir.outputs import sampled_part
from fxmask.learning.instant.response import Response, response_of
from fxmask.sampling.sampler import Sampler

CHUNK = 1 << 16  # elements of every value that are held in wide precision at once
FORGETTING = 0.9  # what a run counts when the next one has come


@dataclass(frozen=True)
class Moments:
    """Second moments of the values of one or several runs.

    Values are the predictions of the T steps (all lanes of a step together), then, if they have the predictions' shape, the T
    noisy samples: V = T or 2 T.

    Attributes:
        steps: T.
        plain: float64 ``[V, V]``, of the values as they are.
        effective: float64 ``[V, V]``, of what the sampler makes of them: lanes combined as guidance combines them.
        weights: float64 ``[T]``, how much an error of each step's combined prediction changes the final samples.
        scale: mean square of the final samples.
    """

    steps: int
    plain: torch.Tensor
    effective: torch.Tensor
    weights: torch.Tensor
    scale: float

    @property
    def has_samples(self) -> bool:
        """Whether forecasts may read noisy samples."""
        return len(self.plain) == 2 * self.steps

    @classmethod
    def of(cls, run: Sampler, response: Response | None = None) -> Moments:
        """Those of one run.

        Args:
            run: recorded.
            response: of its sampler; measured, if not given.
        """
        response = response or response_of(run)
        vectors = [list(outputs) for outputs in run.outputs]
        samples = [[call[run.sample] for call in calls] for calls in run.calls]
        tensors = all(isinstance(x, torch.Tensor) for step in samples for x in step)  # some models take a list of them
        if tensors and all([x.shape for x in a] == [x.shape for x in b] for a, b in zip(vectors, samples, strict=True)):
            vectors += samples
        vectors = [[sampled_part(x, run.final) for x in lanes] for lanes in vectors]
        plain, effective = _gram(vectors, response.mixing)
        scale = float(run.final.double().square().mean())
        # Per element, so that runs of any size can be added.
        size = sum(x.numel() for x in vectors[0])
        count = run.final.numel()
        return cls(run.num_steps, plain / size, effective / count, response.weights, max(scale, 1e-30))

    def error(self, deviation: torch.Tensor) -> float:
        """Mean square error of the final samples, relative to theirs, for a deviation ``[V]``: the values' shares in it."""
        return max(0.0, float(deviation @ self.effective @ deviation)) / self.scale


def together(moments: Sequence[Moments], forgetting: float = 1.0) -> Moments:
    """Moments of several runs: their mean, each relative to the size of its own final samples, the latest counting most.

    Raises:
        InputError: the runs have different numbers of steps.
    """
    first = moments[-1]
    if any(len(m.plain) != len(first.plain) for m in moments):
        raise InputError("recorded runs of different numbers of steps or forms of call have no moments together")
    shares = torch.tensor([forgetting**k for k in reversed(range(len(moments)))], dtype=torch.float64)
    shares /= shares.sum()

    def mean(name: str, scaled: bool) -> torch.Tensor:
        parts = [getattr(m, name) / (m.scale if scaled else 1.0) for m in moments]
        return sum((share * part for share, part in zip(shares, parts, strict=True)), torch.zeros_like(parts[0]))

    return replace(
        first,
        plain=mean("plain", True),
        effective=mean("effective", True),
        weights=mean("weights", False),
        scale=1.0,
    )


def _gram(vectors: Sequence[Sequence[torch.Tensor]], mixing: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Second moments of values, as they are and with their rows combined by ``mixing`` ``[rows of lanes, final rows]``."""
    count = len(vectors)
    plain = torch.zeros(count, count, dtype=torch.float64)
    effective = torch.zeros_like(plain)
    rows = [torch.cat([x.flatten(1) if x.dim() > 1 else x[:, None] for x in value]) for value in vectors]
    width = rows[0].shape[1]
    step = max(1, CHUNK // max(1, rows[0].shape[0]))
    mix = mixing.to(rows[0].device, torch.float64 if rows[0].device.type != "mps" else torch.float32)
    for first in range(0, width, step):
        part = torch.stack([x[:, first : first + step].to(wide_dtype(x.dtype)) for x in rows])  # [V, rows, n]
        part = part.to(mix.dtype)
        flat = part.flatten(1)
        plain += (flat @ flat.T).double().cpu()
        combined = torch.einsum("vrn,rf->vfn", part, mix).flatten(1)
        effective += (combined @ combined.T).double().cpu()
    return plain, effective
