"""The student: the denoiser with some blocks formed instead of computed, on its own rollouts.

A ``Schedule`` says which blocks each step forms from earlier values; ``Coefficients`` say how. A block that is formed at
step ``i`` reads the last K steps at which it was fresh, i.e. computed and live:

    v_b(i) ~ sum_k c[i, b, k] * source_k        sources: v_b at fresh steps; for whole outputs also the noisy samples

Coefficients are fitted in two ways. ``rollout`` solves for those that it is not given, step by step along the student's own
run, the ridge least squares problem whose target is what the block would have computed there (closed form, shrunk towards
plain reuse). ``refine`` then minimises the error of the final samples itself by Gauss-Newton, with derivatives by finite
differences of partial rollouts; there are only a few dozen coefficients.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxmask.errors import InputError
from fxmask.ir.block import Block
from fxmask.ir.combine import form
from fxmask.ir.forecast import INPUT, Cache, Forecast, Slot, Source, slot_of
from fxmask.ir.mask import Mask
from fxmask.ir.program import Program
from fxmask.learning.costs import StepCosts
from fxmask.learning.fit import second_moments, solve_ridge
from fxmask.learning.forms import Forms
from fxmask.learning.ranks import Group
from fxmask.learning.schedule import Coefficients, Schedule, Terms, is_plain_reuse
from fxmask.passes.cut_graph import CutGraph, cut_graph
from fxmask.sampling.same_sampler import sampler_facts
from fxmask.sampling.sampler import Call, Loop, Sampler


@dataclass
class Rollout:
    """What a rollout leaves behind.

    Attributes:
        finals: final samples of each trajectory, ``[B, ...]``.
        coefficients: those that were used.
        outputs: per trajectory the prediction of every call, in order.
        stored: per trajectory and lane, what later steps may read.
    """

    finals: list[torch.Tensor]
    coefficients: dict[tuple[int, str], Terms]
    outputs: list[list[torch.Tensor]]
    stored: list[dict[int, Cache]]


class Student:
    """Rolls schedules out on recorded noise.

    Args:
        program: the captured denoiser; captured again for every other form of call in the trajectories.
        trajectories: recorded runs of one sampler. With several ranks, this rank's share.
        group: of ranks that learn together.
        forms: the programs of all runs of all ranks; those of ``trajectories``, if not given.

    Attributes:
        program: of the first call of all; costs are its costs.
        programs: per trajectory the program of each lane.
        units: work done so far, in full sampling runs of all the trajectories.
    """

    def __init__(
        self, program: Program, trajectories: Sequence[Sampler], group: Group | None = None, forms: Forms | None = None
    ) -> None:
        self.trajectories = list(trajectories)
        self.group = group or Group.single()
        first = self.trajectories[0]
        if any(t.timesteps != first.timesteps or t.order != first.order for t in self.trajectories):
            raise InputError("the trajectories have different timesteps; record all of them with one scheduler")
        forms = forms or Forms(program, self.trajectories)
        self.program = forms.base
        self.programs = [forms.of_run(trajectory, n) for n, trajectory in enumerate(self.trajectories)]
        self.num_steps = first.num_steps
        self.order = first.order
        self.units = 0.0
        self._graphs: dict[Any, CutGraph] = {}
        self._macs = StepCosts(self.program)
        self._costs = self._macs

    # What a schedule costs and means

    def cost(self, loads: frozenset[str]) -> float:
        """What a step spends when it forms ``loads``, as a share of a step that computes everything."""
        return self._costs.cost(loads)

    def spent(self, schedule: Schedule) -> float:
        """Share of the full run's cost that a schedule spends."""
        return sum(self.cost(loads) for loads in schedule.loads) / self.num_steps

    def price_by(self, prices: Mapping[str, float]) -> None:
        """From now on nodes cost a step this much."""
        self._costs = StepCosts(self.program, prices)

    def computed(self, loads: frozenset[str]) -> frozenset[str]:
        """Blocks that a step with these loads computes."""
        return self._costs.computed(loads)

    def sources(self, schedule: Schedule, step: int, block: str) -> list[Source]:
        """What a forecast of ``block`` may read at ``step``, or a blend of it, the latest first."""
        earlier = [j for j in reversed(range(step)) if block in self.computed(schedule.loads[j])]
        reads = bool(schedule.samples) and self.reads_samples(block)
        if block in self.computed(schedule.loads[step]):  # a blend
            if not schedule.loads[step]:
                return [step]
            steps = [step, *earlier[: schedule.blend]]
        else:
            plain = bool(schedule.samples) and not reads
            steps = earlier[: 1 + schedule.blend if plain else schedule.history]
        return [*steps, *((INPUT, j) for j in [step, *earlier][: schedule.samples if reads else 0])]

    @functools.cached_property
    def output(self) -> str | None:
        """Name of the block that is the prediction itself, which can be blended."""
        result = next(iter(self.program.graph_module.graph.find_nodes(op="output"))).args[0][0]
        return next((b.name for b in output_blocks(self.program) if b.values == (result.name,)), None)

    def reads_samples(self, name: str) -> bool:
        """Whether the block's value has the shape of the sample, so that a forecast may read samples."""
        block, program = self.program.block(name), self.program
        value, sample = (program.node(b.values[0]).meta["val"] for b in (block, program.input_block))
        return block.kind == "output" and len(block.values) == 1 and value.shape == sample.shape and value.dtype == sample.dtype

    def mask(self, schedule: Schedule, coefficients: Coefficients) -> Mask:
        """The schedule as a mask of the program."""
        cached = self._cached(schedule)
        names = tuple(block.name for block in self.program.blocks if block.name in cached)
        # what is dead is not loaded either: rectify turns it off, and computes the live part of a block of several values
        rows = [[name not in loads for name in names] for loads in schedule.loads]
        terms = {key: value for key, value in coefficients.items() if not is_plain_reuse(schedule, key, value)}
        compute = torch.tensor(rows, dtype=torch.bool).reshape(self.num_steps, len(names))
        return Mask(
            compute,
            self.trajectories[0].timesteps,
            names,
            Forecast(terms) if terms else None,
            self.program.fingerprint,
            self.sampler,
        )

    @functools.cached_property
    def sampler(self) -> dict[str, Any] | None:
        """Facts about the sampler that all trajectories come from."""
        return sampler_facts(self.trajectories[0])

    # Rolling out

    @torch.no_grad()
    def rollout(
        self,
        schedule: Schedule,
        coefficients: Coefficients | None = None,
        base: Rollout | None = None,
        start: int = 0,
        keep: bool = False,
    ) -> Rollout:
        """Sample with the schedule.

        Args:
            schedule: what each step forms.
            coefficients: how; those that are missing are fitted along the way.
            base: a rollout with ``keep=True`` that agrees with this one before step ``start``.
            start: the first step that is computed; outputs before it are taken from ``base``.
            keep: whether to keep what later partial rollouts need.
        """
        loops = [t.loop() for t in self.trajectories]
        used: dict[tuple[int, str], Terms] = dict(coefficients or {})
        outputs: list[list[torch.Tensor]] = [[] for _ in loops]
        stored: list[dict[int, Cache]] = [{} for _ in loops]
        if base is not None:
            for mine, theirs in zip(stored, base.stored, strict=True):
                for lane, cache in theirs.items():
                    mine[lane] = {slot: value for slot, value in cache.items() if slot.step < start}
        calls = [next(loop) for loop in loops]
        finals: list[torch.Tensor] = []
        try:
            for position, (step, lane) in enumerate(self.order):
                if step < start and base is not None:
                    results = [kept[position] for kept in base.outputs]
                else:
                    caches = [s.setdefault(lane, {}) for s in stored]
                    results = self._step(schedule, step, lane, calls, caches, used)
                    if not keep and lane == len(self.trajectories[0].calls[step]) - 1:
                        self._drop(schedule, step, stored)
                if keep:
                    for kept_outputs, result in zip(outputs, results, strict=True):
                        kept_outputs.append(result)
                calls, finals = _send(loops, results)
        finally:
            for loop in loops:
                loop.close()
        return Rollout(finals, used, outputs, stored)

    def _step(
        self,
        schedule: Schedule,
        step: int,
        lane: int,
        calls: Sequence[Mapping[str, Any]],
        caches: Sequence[Cache],
        used: dict[tuple[int, str], Terms],
    ) -> list[torch.Tensor]:
        """One call of every trajectory."""
        loads = schedule.loads[step]
        programs = [lanes[lane] for lanes in self.programs]
        inputs = [tensors_of(program, call) for program, call in zip(programs, calls, strict=True)]
        if schedule.samples:
            for program, cache, tensors in zip(programs, caches, inputs, strict=True):
                cache[Slot(INPUT, 0, step)] = tensors[program.inputs.index(program.signature.sample)]
        missing = [name for name in sorted(loads) if (step, name) not in used]
        if missing:
            used.update(self._fit(schedule, step, missing, programs, inputs, caches))
        results = []
        self.count(loads)
        for program, tensors, cache in zip(programs, inputs, caches, strict=True):
            graph = self.cut(program, schedule, step)
            formed = [formed_value(block, i, used[step, block], cache) for block, i in graph.load]
            produced = graph(tensors, formed)
            for (block, i), value in zip(graph.store, produced[graph.num_outputs :], strict=True):
                cache[Slot(block, i, step)] = value
            results.append(produced[0])
        return self._blended(step, caches, used) if self.blends(schedule, step) else results

    def _blended(self, step: int, caches: Sequence[Cache], used: dict[tuple[int, str], Terms]) -> list[torch.Tensor]:
        """The outputs that a step has just computed, blended with earlier ones; they take their place in the caches."""
        block = self.output
        assert block is not None
        used.setdefault((step, block), ((step, 1.0),))
        for cache in caches:
            cache[Slot(block, 0, step)] = formed_value(block, 0, used[step, block], cache)
        return [cache[Slot(block, 0, step)] for cache in caches]

    def blends(self, schedule: Schedule, step: int) -> bool:
        """Whether a step computes its output and then blends it, if only with nothing."""
        return bool(schedule.blend) and self.output in self._cached(schedule) & self.computed(schedule.loads[step])

    def cut(self, program: Program, schedule: Schedule, step: int) -> CutGraph:
        """What a step computes in one form of call, with the values that later steps may read."""
        loads = schedule.loads[step]
        stored = self._cached(schedule) & self.computed(loads)
        return self._graph(program, loads, tuple(b.name for b in self.program.blocks if b.name in stored))

    def _cached(self, schedule: Schedule) -> frozenset[str]:
        """Blocks whose computed values may be read later."""
        return schedule.formed | {self.output} if schedule.blend and self.output else schedule.formed

    def _fit(
        self,
        schedule: Schedule,
        step: int,
        blocks: Sequence[str],
        programs: Sequence[Program],
        inputs: Sequence[list[torch.Tensor]],
        caches: Sequence[Cache],
    ) -> dict[tuple[int, str], Terms]:
        """Coefficients of some blocks at one step, from what the full network computes there. The first lane decides."""
        sources = {name: self.sources(schedule, step, name) for name in blocks}
        fitted: dict[tuple[int, str], Terms] = {
            (step, name): ((s[0], 1.0),)
            for name, s in sources.items()
            if len(s) == 1 and (schedule.history == 1 or (schedule.samples and not self.reads_samples(name)))
        }
        blocks = [name for name in blocks if (step, name) not in fitted]
        if not blocks:
            return fitted
        sums: dict[str, list[torch.Tensor]] = {name: [] for name in blocks}
        self.count(frozenset())
        for program, tensors, cache in zip(programs, inputs, caches, strict=True):
            graph = self._graph(program, frozenset(), tuple(b.name for b in self.program.blocks if b.name in blocks))
            produced = graph(tensors, [])
            moments: dict[str, torch.Tensor] = {}
            for (block, i), value in zip(graph.store, produced[graph.num_outputs :], strict=True):
                moments[block] = moments.get(block, 0) + second_moments(block, i, sources[block], cache, value)
            for name in blocks:
                sums[name].append(moments[name])
        for name in blocks:
            moment = self.group.sum(sums[name])
            fitted[step, name] = solve_ridge(moment, sources[name])
        return fitted

    def _drop(self, schedule: Schedule, step: int, stored: list[dict[int, Cache]]) -> None:
        """Forget what no forecast of a later step can read."""
        for caches in stored:
            for cache in caches.values():
                for block in {slot.block for slot in cache} - {INPUT}:
                    steps = sorted({slot.step for slot in cache if slot.block == block})
                    old = steps[: -max(schedule.history, schedule.blend) - 1]
                    for slot in [slot for slot in cache if slot.block == block and slot.step in old]:
                        del cache[slot]

    def _graph(self, program: Program, loads: frozenset[str], live_out: tuple[str, ...]) -> CutGraph:
        key = program, loads, live_out
        if key not in self._graphs:
            self._graphs[key] = cut_graph(program, loads, live_out)
        return self._graphs[key]

    def count(self, loads: frozenset[str]) -> None:
        """Count the work of one call of every trajectory; alike on every rank, whatever its share."""
        self.units += self._macs.cost(loads) / len(self.order)

    def first_trajectory(self) -> int:
        """Number of this rank's first trajectory among those of all ranks: random numbers must not depend on the ranks."""
        counts = self.group.gather([torch.tensor(len(self.trajectories))])
        return int(sum(counts[: self.group.rank]))

    # Errors

    def errors(self, rollout: Rollout) -> torch.Tensor:
        """Mean squared error of every final image, relative to the images' variance, float64 ``[N]`` over all ranks."""
        parts = []
        for final, trajectory in zip(rollout.finals, self.trajectories, strict=True):
            parts.append((final.double() - trajectory.final.double()).flatten(1).pow(2).mean(dim=1).cpu())
        return torch.cat(self.group.gather(parts)) / self.scale

    @functools.cached_property
    def scale(self) -> float:
        """Variance of the recorded final samples."""
        parts = [t.final.double().pow(2).mean().reshape(1).cpu() for t in self.trajectories]
        return float(torch.cat(self.group.gather(parts)).mean().clamp_min(1e-30))

    @functools.cached_property
    def images(self) -> int:
        """Number of images over all ranks."""
        counts = [torch.tensor(float(t.batch_size)) for t in self.trajectories]
        return int(self.group.sum(counts))

    def score(self, rollout: Rollout) -> float:
        """Mean over images of the relative error in dB; smaller is better. The mean PSNR with its sign turned."""
        return float(10 * self.errors(rollout).clamp_min(1e-15).log10().mean())

    def relative_error(self, rollout: Rollout) -> float:
        """Relative L2 error of the final samples."""
        return float(self.errors(rollout).mean().sqrt())

    def score_of(self, others: Sequence[Sampler]) -> float:
        """Score of other trajectories, from the same noise, as if they were rollouts."""
        return self.score(Rollout([t.final for t in others], {}, [], []))

    def residuals(self, rollout: Rollout) -> list[torch.Tensor]:
        """Errors of the final samples, float64 ``[B, D]`` per trajectory."""
        return [
            (final.double() - t.final.double()).flatten(1).cpu()
            for final, t in zip(rollout.finals, self.trajectories, strict=True)
        ]

    def weights(self, rollout: Rollout) -> list[torch.Tensor]:
        """Per trajectory the weight ``[B]`` of every image: that of a small error counts as much as that of a large one."""
        errors = self.errors(rollout) * self.scale
        floor = 0.3 * float(errors.median())
        return [(r.pow(2).mean(dim=1) + floor + 1e-30).rsqrt() for r in self.residuals(rollout)]


def tensors_of(program: Program, call: Call) -> list[torch.Tensor]:
    """What a program's graph is given for a call."""
    return list(program.signature.bind((), dict(call)).tensors.values())


def formed_value(block: str, i: int, terms: Terms, cache: Cache) -> torch.Tensor:
    """Cut value ``i`` of a block, formed from cached values."""
    values, coefficients = [cache[slot_of(source, block, i)] for source, _ in terms], [c for _, c in terms]
    return values[0] if coefficients == [1.0] else form(values, coefficients)


def per_image(x: torch.Tensor, images: int) -> torch.Tensor:
    """Sum over everything but images, ``[images]``; a batch may hold several rows per image."""
    flat = x.flatten(1).sum(dim=1) if x.dim() > 1 else x
    return flat.reshape(-1, images).sum(dim=0) if len(flat) % images == 0 else flat.sum().expand(images) / images


def _send(loops: Sequence[Loop], results: Sequence[torch.Tensor]) -> tuple[list[dict[str, Any]], list[torch.Tensor]]:
    """Give every loop its prediction; the next calls, or the final samples."""
    calls: list[dict[str, Any]] = []
    finals: list[torch.Tensor] = []
    for loop, result in zip(loops, results, strict=True):
        try:
            calls.append(loop.send(result))
        except StopIteration as end:
            finals.append(end.value)
    return calls, finals


def output_blocks(program: Program) -> tuple[Block, ...]:
    """The block of the whole output, if there is one."""
    return tuple(block for block in program.blocks if block.kind == "output")
