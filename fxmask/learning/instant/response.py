"""What a sampler makes of an error in one step's prediction, without calling the denoiser.

The recorded run is played again with all its predictions, to which small steps are added: those of each step, lane and row at
elements of their own. Samplers work element by element, so one replay tells for all steps alike how far a final sample moves,
and which rows of which lanes are combined in it (guidance). Where a sampler clips, or mixes elements, it is an average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fxmask.ir.outputs import sampled_part
from fxmask.sampling.sampler import Loop, Sampler

NUDGE = 0.05  # of the root mean square of a prediction
REPEATS = 3  # replays at most; fewer where there are many elements
ENOUGH = 64  # elements for each step and row


@dataclass(frozen=True)
class Response:
    """How final samples respond to predictions: a change ``d`` ``[rows, ...]`` of step i's moves them by
    ``weights[i] * (mixing.T @ d)``.

    Attributes:
        weights: float64 ``[T]``, not negative.
        mixing: float64 ``[rows, final rows]``, rows of all lanes of a step; guidance at 4 has -3 and 4 here, up to a factor.
    """

    weights: torch.Tensor
    mixing: torch.Tensor

    @classmethod
    def flat(cls, steps: int, rows: int, final_rows: int) -> Response:
        """Where nothing is known: every step counts alike, rows by themselves."""
        mixing = torch.zeros(rows, final_rows, dtype=torch.float64)
        mixing[torch.arange(rows), torch.arange(rows) % final_rows] = 1.0
        return cls(torch.ones(steps, dtype=torch.float64), mixing)


def replayed(run: Sampler, outputs: list[torch.Tensor], gains: Sequence[float] | None = None) -> torch.Tensor:
    """The final samples with these predictions, one for every call in order.

    Args:
        run: recorded.
        outputs: what each call is answered.
        gains: by step, how much of a change of its sample a prediction follows; without it the calls do not matter.
    """
    loop: Loop = getattr(run, "idle_loop", run.loop)()
    try:
        call = next(loop)
        for (step, lane), output in zip(run.order, outputs, strict=True):
            if gains is not None:
                change = call[run.sample] - run.calls[step][lane][run.sample]
                output = output.clone()
                sampled_part(output, change).add_(change.to(output.dtype), alpha=gains[step])
            call = loop.send(output)
    except StopIteration as end:
        final: torch.Tensor = end.value
        return final
    finally:
        loop.close()
    raise AssertionError("a recorded run has as many calls as predictions")


def gains_of(run: Sampler) -> list[float]:
    """How much of a change of its sample each step's prediction follows, as far as one run tells: least squares over elements.

    For Gaussian data that is the derivative of the best denoiser. Zero where predictions are not like samples.
    """
    gains = []
    for calls, outputs in zip(run.calls, run.outputs, strict=True):
        products = squares = 0.0
        for call, output in zip(calls, outputs, strict=True):
            sample = call[run.sample].double()
            part = sampled_part(output, sample).double()
            if part.shape == sample.shape:
                products += float((part * sample).sum())
                squares += float(sample.square().sum())
        gains.append(products / squares if squares else 0.0)
    return gains


@torch.no_grad()
def response_of(run: Sampler, seed: int = 0, gains: Sequence[float] | None = None) -> Response:
    """Measure it on a recorded run, by a few replays of its sampler.

    Args:
        run: recorded.
        seed: of the elements that are nudged.
        gains: the denoiser's part in it, see ``gains_of``: with injected noise it makes up for most of what goes wrong early.
            Without it predictions stay what they were.
    """
    steps, lanes = run.num_steps, len(run.calls[0])
    sizes = [x.shape[0] for x in run.outputs[0]]
    rows, final = sum(sizes), run.final
    flat = Response.flat(steps, rows, final.shape[0])
    trailing = final.shape[1:]
    if any(len(calls) != lanes for calls in run.calls) or any(
        sampled_part(x, final).shape[1:] != trailing for x in run.outputs[0]
    ):
        return flat
    codes, elements = steps * rows, final[0].numel()
    repeats = max(1, min(REPEATS, math.ceil(ENOUGH * codes / elements)))
    generator = torch.Generator().manual_seed(seed)
    sums = torch.zeros(steps, rows, final.shape[0], dtype=torch.float64)
    squares, counts = sums.clone(), torch.zeros(steps, rows, dtype=torch.float64)
    for _ in range(repeats):
        code = torch.randperm(elements, generator=generator).remainder(codes)
        code = (code + int(torch.randint(codes, (), generator=generator))).remainder(codes).reshape(trailing)
        outputs, nudges = [], []
        for i, lane in run.order:
            output = run.outputs[i][lane].clone()
            nudge = NUDGE * float(output.double().square().mean().sqrt()) or NUDGE
            nudges.append(nudge)
            part = sampled_part(output, final)
            first = sum(sizes[:lane])
            for q in range(sizes[lane]):
                part[q] += (nudge * (code == i * rows + first + q)).to(part)
            outputs.append(output)
        moved = (replayed(run, outputs, gains).double() - final.double()).cpu().flatten(1)
        if not bool(moved.isfinite().all()):
            return flat
        places = code.flatten()
        for (i, lane), nudge in zip(run.order, nudges, strict=True):
            first = sum(sizes[:lane])
            for q in range(first, first + sizes[lane]):
                found = moved[:, places == i * rows + q] / nudge
                sums[i, q] += found.sum(dim=1)
                squares[i, q] += found.square().sum(dim=1)
                counts[i, q] += found.shape[1]
    mean = sums / counts.clamp_min(1)[..., None]
    size = (squares / counts.clamp_min(1)[..., None]).sum(dim=(1, 2)).sqrt()
    return _factored(mean, size, flat)


def _factored(mean: torch.Tensor, size: torch.Tensor, flat: Response) -> Response:
    """Responses ``[T, rows, final rows]`` as one mixing of rows and a weight per step."""
    if not bool(mean.isfinite().all()) or float(size.max()) <= 0:
        return flat
    shaped = mean / size.clamp_min(1e-12)[:, None, None]
    _, values, right = torch.linalg.svd(shaped.flatten(1), full_matrices=False)
    mixing = right[0].reshape(mean.shape[1:])
    if float(values[0]) ** 2 < 0.5 * len(mean):  # clipping hides who is combined with whom
        mixing = flat.mixing / flat.mixing.norm()
    return Response(size / mixing.norm(), mixing)
