"""Refinement of all coefficients of a schedule at once: derivatives of the final samples from backward passes through the
student's own run.

A step hands its output to the sampler and some values to caches that later steps read. Backwards, the adjoint of a value is
what its readers ask for; through the sampler, which acts element by element, derivatives S come from finite differences:

    adjoint(output p) = S[final, p] u + sum_q S[q, p] adjoint(sample of call q)        q: calls after p
    d <u, final> / d c[i, b, k] = <adjoint(value formed at step i), source k>

A pass gives ``d <u, final>`` by all coefficients, whatever their number. With the direction of every image's own error and a
few random ``u``, the Gauss-Newton matrix is estimated (Hutchinson). ``Student.refine`` is exact where these are not, but takes
a partial rollout for every coefficient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fxmask.ir.calls import repeats
from fxmask.ir.forecast import INPUT, Cache, Slot, slot_of
from fxmask.learning.fit import damped_step
from fxmask.learning.pieces import Place, drawn_for
from fxmask.learning.reversal import backwards
from fxmask.learning.schedule import Coefficients, Schedule, Terms, moved_by
from fxmask.learning.student import Rollout, Student, formed_value, per_image, tensors_of
from fxmask.sampling.sampler import Sampler

NUDGE = 1e-3  # of finite differences through the sampler
PROBES = 2  # random directions per image
DAMPING = (1e-2, 1e-1, 1.0, 10.0)  # tried at once, the best is taken
Coordinate = tuple[int, str, int]  # (step, block, term)


def acts_by_element(trajectory: Sampler) -> bool:
    """Whether samples and outputs have one shape, so that every element of an output may move its own of the next sample.

    A batch of guidance holds that shape more than once: its parts have one sample, and each part of an output moves that.
    Not in half precision, in which small differences are lost.
    """
    rows, *shape = trajectory.final.shape

    def is_alike(x: torch.Tensor) -> bool:
        return [*x.shape[1:]] == shape and len(x) % rows == 0 and x.dtype in (torch.float32, torch.float64)

    return all(
        is_alike(sample) and is_alike(output) and len(sample) == len(output) and repeats(sample, len(sample) // rows)
        for step, outputs in zip(trajectory.calls, trajectory.outputs, strict=True)
        for sample, output in zip((call[trajectory.sample] for call in step), outputs, strict=True)
    )


def _gains(trajectory: Sampler, outputs: Sequence[torch.Tensor], samples: Sequence[torch.Tensor], p: int) -> list[torch.Tensor]:
    """Derivatives of every sample after call ``p``, the final one last, by its output, element by element.

    Each is ``[L * N, ...]`` as the output is: of the L parts of a batch, every one moves the N samples.
    """
    rows = len(trajectory.final)
    moved = []
    for first in range(0, len(outputs[p]), rows):
        nudge = torch.zeros_like(outputs[p])
        nudge[first : first + rows] = NUDGE
        moved.append(_samples(trajectory, [*outputs[:p], outputs[p] + nudge, *outputs[p + 1 :]])[p + 1 :])
    return [
        torch.cat([(part[:rows] - still[:rows]) / NUDGE for part in parts])
        for *parts, still in zip(*moved, samples[p + 1 :], strict=True)
    ]


def _of_parts(adjoint: torch.Tensor, rows: int, parts: int) -> torch.Tensor:
    """The adjoint of the N samples whose batch has this one, once for each of so many parts that move them."""
    return torch.cat([adjoint.reshape(-1, rows, *adjoint.shape[1:]).sum(dim=0)] * parts)


@torch.no_grad()
def _samples(trajectory: Sampler, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The sample of every call, then the final one, when the denoiser gives these outputs."""
    loop = trajectory.loop()
    samples = [next(loop)[trajectory.sample]]
    try:
        for output in outputs:
            samples.append(loop.send(output)[trajectory.sample])
    except StopIteration as end:
        samples.append(end.value)
    finally:
        loop.close()
    return samples


def refine_all(
    student: Student, schedule: Schedule, coefficients: Coefficients, seed: int = 0
) -> tuple[dict[tuple[int, str], Terms], float]:
    """Coefficients with a smaller error of the final samples, and its score; never worse than the given ones.

    One step of Gauss-Newton on the images' errors, weighted as in ``Student.refine``.

    Args:
        student: its trajectories must all be such that ``acts_by_element``.
        schedule: what each step forms.
        coefficients: all of them. A computed value that is blended with nothing stays as it is.
        seed: of the random directions.
    """
    base = student.rollout(schedule, coefficients, keep=True)
    score = student.score(base)
    terms = free_terms(coefficients)
    first = student.first_run()
    residuals = student.residuals(base)
    directions = [
        _directions(residual, t.final, 7919 * seed + first + place.run, place)
        for residual, t, place in zip(residuals, student.trajectories, student.places, strict=True)
    ]
    found = derivatives(student, schedule, base, terms, directions)
    parts = []
    for rows, residual, weight in zip(found, residuals, student.weights(base), strict=True):
        rows = rows * weight.reshape(1, -1, 1)
        error = weight.reshape(-1, 1) * residual.norm(dim=1, keepdim=True)
        along = torch.cat([rows[0], error], dim=1)  # [B, P + 1]
        across = torch.nn.functional.pad(rows[1:].flatten(0, 1), (0, 1)) / PROBES**0.5
        parts.append(along.T @ along + across.T @ across)
    normal = student.group.sum(parts)
    trials = [(score, dict(coefficients))]
    for damping in DAMPING:
        trial = dict(coefficients)
        for (step, block, k), amount in zip(terms, damped_step(normal, damping), strict=True):
            trial = moved_by(trial, step, (block,), k, amount)
        trials.append((student.score(student.rollout(schedule, trial)), trial))
    found_score, best = min(trials, key=lambda trial: trial[0])
    return best, found_score


def refinement_cost(student: Student, schedule: Schedule) -> float:
    """Units that ``refine_all`` takes."""
    return student.spent(schedule) * (2 + 2 * (1 + PROBES) + len(DAMPING))


def free_terms(coefficients: Coefficients) -> list[Coordinate]:
    """Every coefficient, but those of values that a step computes and blends with nothing."""
    return [
        (step, block, k)
        for (step, block), terms in sorted(coefficients.items())
        if len(terms) > 1 or terms[0][0] != step
        for k in range(len(terms))
    ]


def _directions(residual: torch.Tensor, like: torch.Tensor, seed: int, place: Place) -> list[torch.Tensor]:
    """That of every image's error, of length 1, and random ones orthogonal to it."""
    own = residual / residual.norm(dim=1, keepdim=True).clamp_min(1e-30)
    generator = torch.Generator().manual_seed(seed)
    shape = (place.whole, own.shape[1])
    drawn = [drawn_for(place, torch.randn(shape, generator=generator, dtype=own.dtype)) for _ in range(PROBES)]
    directions = [own, *(u - (u * own).sum(dim=1, keepdim=True) * own for u in drawn)]
    return [u.reshape(like.shape).to(like) for u in directions]


def derivatives(
    student: Student,
    schedule: Schedule,
    base: Rollout,
    terms: Sequence[Coordinate],
    directions: Sequence[Sequence[torch.Tensor]],
) -> list[torch.Tensor]:
    """``<u, d final / d coefficient>``.

    Args:
        student: whose program and trajectories.
        schedule: what each step forms.
        base: its rollout, with ``keep=True``.
        terms: the coefficients.
        directions: per trajectory M tensors u like its final samples.

    Returns:
        Per trajectory float64 ``[M, B, len(terms)]``.
    """
    for _ in range(1 + 2 * len(directions[0])):  # a backward pass takes twice as long as a forward one
        for p in range(len(student.order)):
            student.count(schedule.loads[student.row_of(schedule, p)])
    columns = {term: k for k, term in enumerate(terms)}
    return [_Backward(student, schedule, base, n, columns, us).run() for n, us in enumerate(directions)]


class _Backward:
    """Backward passes through one trajectory's run, one for each of M directions."""

    def __init__(
        self,
        student: Student,
        schedule: Schedule,
        base: Rollout,
        number: int,
        columns: Mapping[Coordinate, int],
        directions: Sequence[torch.Tensor],
    ) -> None:
        self.student = student
        self.schedule = schedule
        self.used = base.coefficients
        self.number = number
        self.cache: Cache = {}  # of the lane at hand, what the present step may read
        self.outputs = base.outputs[number]
        self.trajectory = student.trajectories[number]
        self.programs = student.programs[number]
        self.samples = _samples(self.trajectory, self.outputs)
        self.columns = columns
        self.directions = directions
        self.position = {(student.row_of(schedule, p), lane): p for p, (_, lane) in enumerate(student.order)}
        self.found = torch.zeros(len(directions), self.trajectory.batch_size, len(columns), dtype=torch.float64)
        # adjoints that later steps have asked for: of the sample of each call, and of cached values by lane and slot
        self.of_samples: list[list[Any]] = [[0] * len(student.order) for _ in directions]
        self.of_values: list[dict[tuple[int, Slot], torch.Tensor]] = [{} for _ in directions]

    def run(self) -> torch.Tensor:
        """The derivatives ``[M, B, columns]``."""
        kept = self.student.states_kept(self.schedule, self.number, len(self.directions))
        nothing: Mapping[int, Cache] = {}
        for p, caches in backwards(nothing, len(self.student.order), kept, self._advance):
            row, lane = self._place(p)
            program = self.programs[lane]
            place = program.inputs.index(program.signature.sample)
            tensors = tensors_of(program, self._call(p))
            tensors[place] = tensors[place].detach().requires_grad_()
            self.cache = dict(caches.get(self.student.cache_of(self.schedule, lane), {}))
            self.cache[Slot(INPUT, 0, row)] = self.samples[p]
            del caches
            graph = self.student.cut(program, self.schedule, row)
            formed = [formed_value(b, i, self.used[row, b], self.cache).detach().requires_grad_() for b, i in graph.load]
            with torch.enable_grad():
                produced = graph(tensors, formed)
            stores = dict(zip(graph.store, produced[graph.num_outputs :], strict=True))
            gains = _gains(self.trajectory, self.outputs, self.samples, p)
            for m in range(len(self.directions)):
                wanted = self._asked(m, p, stores, produced[0], gains)
                gradients = torch.autograd.grad(
                    [value for value, _ in wanted],
                    [*formed, tensors[place]],
                    [adjoint for _, adjoint in wanted],
                    retain_graph=m + 1 < len(self.directions),
                    allow_unused=True,
                )
                for (block, i), gradient in zip(graph.load, gradients[:-1], strict=True):
                    if gradient is not None:
                        self._read(m, p, block, i, gradient)
                if gradients[-1] is not None:
                    self.of_samples[m][p] = self.of_samples[m][p] + gradients[-1]
            del stores, produced, formed, wanted, gradients  # before the values of the next step are made
        return self.found

    def _call(self, p: int) -> dict[str, Any]:
        """The arguments of call ``p``."""
        step, lane = self.student.order[p]
        return {**self.trajectory.calls[step][lane], self.trajectory.sample: self.samples[p]}

    def _place(self, p: int) -> tuple[int, int]:
        """Row of the schedule and lane of call ``p``."""
        return self.student.row_of(self.schedule, p), self.student.order[p][1]

    def _advance(self, caches: Mapping[int, Cache], p: int) -> Mapping[int, Cache]:
        """What may be read after call ``p``, by lane."""
        after: dict[int, Cache] = {lane: dict(cache) for lane, cache in caches.items()}
        self.student.advance(self.schedule, p, self.number, self._call(p), after, self.used)
        return after

    def _asked(
        self,
        m: int,
        p: int,
        stores: Mapping[tuple[str, int], torch.Tensor],
        output: torch.Tensor,
        gains: Sequence[torch.Tensor],
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What call ``p`` computed that later ones and the sampler read, and their adjoints."""
        row, lane = self._place(p)
        shared = self.student.cache_of(self.schedule, lane)
        later = [*self.of_samples[m][p + 1 :], self.directions[m]]
        rows = len(self.trajectory.final)
        own = torch.zeros_like(output)
        for gain, adjoint in zip(gains, later, strict=True):
            if isinstance(adjoint, torch.Tensor):
                own = own + gain * _of_parts(adjoint, rows, len(output) // rows)
        wanted = []
        for (block, i), value in stores.items():
            asked = self.of_values[m].pop((shared, Slot(block, i, row)), None)
            if self.student.blends(self.schedule, row) and block == self.student.output:
                own = self._read(m, p, block, i, own if asked is None else own + asked, output.detach())
            elif asked is not None:
                wanted.append((value, asked))
        return [(value, adjoint) for value, adjoint in (*wanted, (output, own)) if value.requires_grad]

    def _read(
        self, m: int, p: int, block: str, i: int, adjoint: torch.Tensor, computed: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A value was formed at call ``p``: derivatives by its coefficients, and adjoints of what it was formed from.

        Returns:
            The adjoint of ``computed``, the value of the present step that is blended with others.
        """
        row, lane = self._place(p)
        shared = self.student.cache_of(self.schedule, lane)
        present = torch.zeros_like(adjoint)
        for k, (source, c) in enumerate(self.used[row, block]):
            slot = slot_of(source, block, i)
            own = computed if source == row else None
            value = self.cache[slot] if own is None else own
            column = self.columns.get((row, block, k))
            if column is not None:
                self.found[m, :, column] += per_image(adjoint.double() * value.double(), self.trajectory.batch_size).cpu()
            if own is not None:
                present = c * adjoint
            elif slot.block == INPUT:
                at = self.position[slot.step, lane]
                self.of_samples[m][at] = self.of_samples[m][at] + c * adjoint
            else:
                asked = self.of_values[m]
                asked[shared, slot] = asked.get((shared, slot), 0) + c * adjoint
        return present
