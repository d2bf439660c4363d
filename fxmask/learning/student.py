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
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxmask.errors import InputError
from fxmask.ir.block import Block
from fxmask.ir.combine import form
from fxmask.ir.forecast import INPUT, Cache, Forecast, Slot, Source, slot_of
from fxmask.ir.graph import value_bytes
from fxmask.ir.mask import Mask
from fxmask.ir.program import Program
from fxmask.ir.weights import detach_weights
from fxmask.learning.costs import StepCosts
from fxmask.learning.fit import second_moments, solve_ridge
from fxmask.learning.forms import Forms
from fxmask.learning.pieces import Place, kept_for_all_steps
from fxmask.learning.ranks import Group
from fxmask.learning.reversal import advances
from fxmask.learning.room import Elsewhere, Room, all_bytes, peak_bytes
from fxmask.learning.schedule import Coefficients, Schedule, Terms, difference_held, is_plain_reuse, lane_sources
from fxmask.passes.cut_graph import CutGraph, cut_graph
from fxmask.sampling.same_sampler import sampler_facts
from fxmask.sampling.sampler import Call, Loop, Sampler
from fxmask.sampling.split_lanes import SplitLanes


@dataclass
class Rollout:
    """What a rollout leaves behind.

    Attributes:
        finals: final samples of each trajectory, ``[B, ...]``.
        coefficients: those that were used.
        outputs: per trajectory the prediction of every call, in order.
    """

    finals: list[torch.Tensor]
    coefficients: dict[tuple[int, str], Terms]
    outputs: list[list[torch.Tensor]]


@dataclass
class State:
    """Where a rollout is before a step, so that others can go on from there.

    Attributes:
        step: the step.
        numbers: of the trajectories.
        outputs: of each the predictions of all calls; those before the step count.
        caches: of each, by lane, what this step and later ones may read.
    """

    step: int
    numbers: Sequence[int]
    outputs: Sequence[Sequence[torch.Tensor]]
    caches: list[dict[int, Cache]]


class Student:
    """Rolls schedules out on recorded noise.

    Args:
        program: the captured denoiser; captured again for every other form of call in the trajectories.
        trajectories: recorded runs of one sampler. With several ranks, this rank's share.
        group: of ranks that learn together.
        forms: the programs of all runs of all ranks; those of ``trajectories``, if not given.
        room: how many bytes its values may take; without bound, if not given.
        deployed: the program that will run, in a type of its own, if that is another one: prices and bounds are its.
        places: where the trajectories come from, if they are pieces of recorded runs.

    Attributes:
        program: of the first call of all; costs are its costs.
        programs: per trajectory the program of each lane.
        stochastic: whether the sampler injects noise.
        units: work done so far, in full sampling runs of all the trajectories.
    """

    def __init__(
        self,
        program: Program,
        trajectories: Sequence[Sampler],
        group: Group | None = None,
        forms: Forms | None = None,
        room: Room | None = None,
        deployed: Program | None = None,
        places: Sequence[Place] | None = None,
    ) -> None:
        self.trajectories = list(trajectories)
        self.places = places or [Place(n, 0, t.batch_size, t.batch_size) for n, t in enumerate(self.trajectories)]
        self.group = group or Group.single()
        first = self.trajectories[0]
        if any(t.timesteps != first.timesteps or t.order != first.order for t in self.trajectories):
            raise InputError("the trajectories have different timesteps; record all of them with one scheduler")
        forms = forms or Forms(program, self.trajectories)
        self.program = forms.base
        self.deployed = deployed or self.program
        self.programs = [forms.of_run(trajectory, n) for n, trajectory in enumerate(self.trajectories)]
        self.num_steps = first.num_steps
        self.order = first.order
        self.stochastic = any(t.stochastic for t in self.trajectories)
        self.units = 0.0
        self.room = room or Room()
        self._graphs: dict[Any, CutGraph] = {}
        self._macs = StepCosts(self.program)
        self._costs = self._macs

    # What a schedule costs and means

    def cost(self, loads: frozenset[str]) -> float:
        """What a step spends when it forms ``loads``, as a share of a step that computes everything."""
        return self._costs.cost(loads)

    def spent(self, schedule: Schedule) -> float:
        """Share of the full run's cost that a schedule spends."""
        return sum(self.cost(loads) for loads in schedule.loads) / len(schedule.loads)

    def price_by(self, prices: Mapping[str, float]) -> None:
        """From now on nodes cost a step this much."""
        self._costs = StepCosts(self.deployed, prices)

    def computed(self, loads: frozenset[str]) -> frozenset[str]:
        """Blocks that a step with these loads computes."""
        return self._costs.computed(loads)

    def sources(self, schedule: Schedule, step: int, block: str) -> list[Source]:
        """What a forecast of ``block`` may read at ``step``, or a blend of it, the latest first.

        Args:
            schedule: what each step forms.
            step: its row; with lanes that have rows of their own a call.
            block: its name.
        """
        if schedule.lanes > 1:
            return self._lane_sources(schedule, step, block)
        earlier = [j for j in reversed(range(step)) if block in self.computed(schedule.loads[j])]
        reads = bool(schedule.samples) and self.reads_samples(block)
        if block in self.computed(schedule.loads[step]):  # a blend
            if not schedule.loads[step]:
                return [step]
            steps = [step, *earlier[: schedule.blend]]
        else:
            steps = earlier[: 1 + schedule.blend if self._holds(schedule, block) else schedule.history]
        return [*steps, *((INPUT, j) for j in [step, *earlier][: schedule.samples if reads else 0])]

    def _lane_sources(self, schedule: Schedule, row: int, block: str) -> list[Source]:
        """The same where lanes have rows of their own: a blend reads no other lane."""
        fresh = [block in self.computed(loads) for loads in schedule.loads[:row]]
        samples = schedule.samples if self.reads_samples(block) else 0
        if block in self.computed(schedule.loads[row]):
            if not schedule.loads[row]:
                return [row]
            own = [r for r in reversed(range(row)) if fresh[r] and r % schedule.lanes == row % schedule.lanes]
            return [row, *own[: schedule.blend], *((INPUT, r) for r in [row, *own][:samples])]
        history = 1 + schedule.blend if self._holds(schedule, block) else schedule.history
        return lane_sources(fresh, row, schedule.lanes, history, samples)

    def _holds(self, schedule: Schedule, block: str) -> bool:
        """Whether a block is reused as it is, since it reads no samples and so knows nothing of the noise that is injected."""
        return self.stochastic and bool(schedule.samples) and not self.reads_samples(block)

    def step_of(self, schedule: Schedule, row: int) -> int:
        """The step of a row."""
        return row // schedule.lanes

    def row_of(self, schedule: Schedule, position: int) -> int:
        """The row that says what a call forms, by its position among all: of its step, or its own."""
        return position if schedule.lanes > 1 else self.order[position][0]

    def cache_of(self, schedule: Schedule, lane: int) -> int:
        """Key of the cache that a lane's calls read: each lane has its own, but those with rows of their own share one."""
        return 0 if schedule.lanes > 1 else lane

    @functools.cached_property
    def lane_names(self) -> tuple[str, ...]:
        """What the lanes are called: by the pipeline, or else by their turn."""
        named = getattr(self.trajectories[0], "lanes", ())
        names = named[0] if named else ()
        count = len(self.trajectories[0].calls[0])
        if len(set(names)) == count and None not in names:
            return tuple(names)
        return tuple(map(str, range(count)))

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
        compute = torch.tensor(rows, dtype=torch.bool).reshape(len(schedule.loads), len(names))
        forecast = Forecast(terms) if terms else None
        timesteps, fingerprint = self.trajectories[0].timesteps, self.program.fingerprint
        if schedule.lanes == 1:
            return Mask(compute, timesteps, names, forecast, fingerprint, self.sampler)
        lanes = self.lane_names
        split = self.trajectories[0]
        batched = isinstance(split, SplitLanes)
        parts = split.turns if isinstance(split, SplitLanes) else ()
        ones = torch.ones(self.num_steps, len(lanes), len(names), dtype=torch.bool)
        every = Mask(ones, timesteps, names, None, fingerprint, self.sampler, lanes, batched=batched, parts=parts)
        return every.folded(Mask(compute, every.by_call.timesteps, names, forecast, fingerprint))

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
        start: State | None = None,
        keep: bool = False,
    ) -> Rollout:
        """Sample with the schedule.

        Where no coefficients are fitted, one trajectory after the other, so that only one holds values at a time.

        Args:
            schedule: what each step forms.
            coefficients: how; those that are missing are fitted along the way.
            start: go on from here, with these trajectories only, whose steps before it had the same values.
            keep: whether to keep the outputs.
        """
        first, numbers = (start.step, start.numbers) if start else (0, range(len(self.trajectories)))
        used: dict[tuple[int, str], Terms] = dict(coefficients or {})
        rows = range(first * schedule.lanes, len(schedule.loads))
        fits = any((i, name) not in used for i in rows for name in schedule.loads[i])
        parts = [list(numbers)] if fits else [[n] for n in numbers]
        finals: list[torch.Tensor] = []
        outputs: list[list[torch.Tensor]] = []
        for part in parts:
            caches = self._caches(schedule, part, beside=start is not None)
            if start:
                for n, lanes in zip(part, caches, strict=True):
                    for lane, cache in start.caches[start.numbers.index(n)].items():
                        mine = lanes.setdefault(lane, {})
                        if isinstance(mine, Elsewhere) and isinstance(cache, Elsewhere):
                            mine.share(cache)
                        else:
                            mine.update(cache)
            given = [start.outputs[start.numbers.index(n)] for n in part] if start else None
            walked = self._walk(schedule, used, part, caches, given, first)
            try:
                while True:
                    next(walked)
            except StopIteration as end:
                made, kept = end.value
            finals += made
            outputs += kept if keep else []
        return Rollout(finals, used, outputs)

    @torch.no_grad()
    def states(
        self, schedule: Schedule, base: Rollout, steps: Iterable[int], numbers: Sequence[int], open_end: bool = False
    ) -> Iterator[State]:
        """Where a rollout was before each of some steps, in order.

        Its values are computed again from its outputs, so that only those are held which the next step may read: what a
        rollout would have to keep grows with the number of steps. A state is good until the next one is asked for.

        Args:
            schedule: what each step forms.
            base: its rollout, with ``keep=True``.
            steps: first steps of others.
            numbers: of trajectories.
            open_end: whether what goes on from there may form at every step what this schedule forms at its last one.
        """
        wanted, caches = set(steps), self._caches(schedule, numbers, beside=True)
        outputs = [base.outputs[n] for n in numbers]
        used, every = dict(base.coefficients), list(numbers)
        walked = self._walk(schedule, used, every, caches, outputs, self.num_steps, counted=False, open_end=open_end)
        for step in walked:
            if step in wanted:
                yield State(step, list(numbers), outputs, caches)
            if step >= max(wanted, default=0):
                break
        walked.close()

    def _walk(
        self,
        schedule: Schedule,
        used: dict[tuple[int, str], Terms],
        numbers: Sequence[int],
        caches: list[dict[int, Cache]],
        given: Sequence[Sequence[torch.Tensor]] | None,
        first: int,
        counted: bool = True,
        open_end: bool = False,
    ) -> Generator[int, None, tuple[list[torch.Tensor], list[list[torch.Tensor]]]]:
        """Sample some trajectories, and stop before each step.

        Args:
            schedule: what each step forms.
            used: coefficients; what is fitted is added.
            numbers: of the trajectories.
            caches: of each; kept up.
            given: outputs of all calls before step ``first``. If not ``counted`` these steps are computed nevertheless, for
                the values in the caches.
            first: the step from which on outputs are new.
            counted: whether this is work that was not done before.
            open_end: see ``states``.

        Returns:
            Final samples, and the outputs of all calls, of each trajectory.
        """
        loops = [self.trajectories[n].loop() for n in numbers]
        outputs: list[list[torch.Tensor]] = [[] for _ in loops]
        finals: list[torch.Tensor] = []
        calls = [next(loop) for loop in loops]
        last = len(self.trajectories[0].calls[0]) - 1
        try:
            for position, (step, lane) in enumerate(self.order):
                if lane == 0:
                    yield step
                known = given is not None and step < first
                if not known or not counted:
                    row = self.row_of(schedule, position)
                    if counted and 0 in numbers:
                        self.count(schedule.loads[row])
                    own = [lanes.setdefault(self.cache_of(schedule, lane), {}) for lanes in caches]
                    results = self._step(schedule, row, lane, numbers, calls, own, used)
                    if schedule.lanes > 1 and not open_end:
                        self._drop_read(schedule, row, own)
                    elif lane == last:
                        self._drop(schedule, caches)
                if known and given is not None:
                    results = [theirs[position] for theirs in given]
                for mine, result in zip(outputs, results, strict=True):
                    mine.append(result)
                calls, finals = _send(loops, results)
        finally:
            for loop in loops:
                loop.close()
        return finals, outputs

    def _caches(self, schedule: Schedule, numbers: Sequence[int], beside: bool) -> list[dict[int, Cache]]:
        """Empty caches of some trajectories that are rolled out together, with or without room for all their values.

        Args:
            schedule: what each step forms.
            numbers: of the trajectories.
            beside: whether a rollout and the state that it goes on from are held at once.

        Raises:
            InputError: there is no room for those of one.
        """
        size = max(self.pass_bytes(n, False) + self._block_bytes(self.programs[n][0], schedule.formed) for n in numbers)
        together = size + (1 + beside) * sum(self.live_bytes(schedule, n) for n in numbers)
        if self.room.holds(together):
            return [{} for _ in numbers]
        self.room.require(size, f"one call of a batch of {max(self.trajectories[n].batch_size for n in numbers)}")
        device = self.trajectories[numbers[0]].final.device
        place = "files" if device.type == "cpu" else "host memory"
        self.room.say(f"cached values of {len(numbers)} run(s) go to {place}, {together:,} bytes would be needed")
        lanes = [1 if schedule.lanes > 1 else len(self.programs[n]) for n in numbers]
        return [{lane: self.room.elsewhere(device) for lane in range(count)} for count in lanes]

    @torch.no_grad()
    def advance(
        self,
        schedule: Schedule,
        position: int,
        number: int,
        call: Mapping[str, Any],
        caches: dict[int, Cache],
        used: dict[tuple[int, str], Terms],
    ) -> None:
        """Compute the values of one call of a trajectory again, into its caches."""
        lane, row = self.order[position][1], self.row_of(schedule, position)
        own = caches.setdefault(self.cache_of(schedule, lane), {})
        self._step(schedule, row, lane, [number], [call], [own], used)
        if schedule.lanes > 1:
            self._drop_read(schedule, row, [own])
        else:
            self._drop(schedule, [caches])

    # Bytes

    def live_bytes(self, schedule: Schedule, number: int) -> int:
        """Bytes of cached values of one trajectory that a step may read, at most; with several lanes, of all."""
        cached, steps = self._cached(schedule), max(schedule.history, schedule.blend) + 1
        return sum(steps * self._block_bytes(program, cached) for program in self.programs[number])

    def _block_bytes(self, program: Program, names: Iterable[str]) -> int:
        return sum(value_bytes(program.node(value)) for b in names for value in program.block(b).values)

    def pass_bytes(self, number: int, gradients: bool) -> int:
        """Bytes of values in one call of a trajectory, with what a backward pass keeps or without."""
        sizes = [_call_bytes(program) for program in dict.fromkeys(self.programs[number])]
        return max(size[gradients] for size in sizes)

    def states_kept(self, schedule: Schedule, number: int, directions: int) -> int:
        """How many states a backward pass through a run may keep, besides the one at hand.

        Raises:
            InputError: there is no room for the least that it takes.
        """
        live = self.live_bytes(schedule, number)
        most = len(self.order)
        if self.room.size is None or not live:
            return most
        # the call itself, what its step may read twice (the state before and after), and adjoints of as much per direction
        least = self.pass_bytes(number, True) + (2 + directions) * live + kept_for_all_steps(self.trajectories[number])
        self.room.require(least, f"a backward pass through one call of a batch of {self.trajectories[number].batch_size}")
        kept = min(most, (self.room.size - least) // live)
        if kept < most:
            again = advances(most, kept) / most
            self.room.say(f"backward passes keep {kept} of {most} states, and compute each step {again:.1f} times")
        return kept

    def _step(
        self,
        schedule: Schedule,
        step: int,
        lane: int,
        numbers: Sequence[int],
        calls: Sequence[Mapping[str, Any]],
        caches: Sequence[Cache],
        used: dict[tuple[int, str], Terms],
    ) -> list[torch.Tensor]:
        """One call of each of some trajectories."""
        loads = schedule.loads[step]
        programs = [self.programs[n][lane] for n in numbers]
        inputs = [tensors_of(program, call) for program, call in zip(programs, calls, strict=True)]
        if schedule.samples:
            for program, cache, tensors in zip(programs, caches, inputs, strict=True):
                cache[Slot(INPUT, 0, step)] = tensors[program.inputs.index(program.signature.sample)]
        missing = [name for name in sorted(loads) if (step, name) not in used]
        if missing:
            used.update(self._fit(schedule, step, missing, programs, inputs, caches))
        results = []
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
            (step, name): difference_held(s, step, schedule.lanes)
            for name, s in sources.items()
            if (schedule.history == 1 and len(s) == 1) or self._holds(schedule, name)
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

    def _drop(self, schedule: Schedule, stored: Sequence[dict[int, Cache]]) -> None:
        """Forget what no forecast of a later step can read."""
        for caches in stored:
            for cache in caches.values():
                for block in {slot.block for slot in cache} - {INPUT}:
                    steps = sorted({slot.step for slot in cache if slot.block == block})
                    old = steps[: -schedule.lanes * (max(schedule.history, schedule.blend) + 1)]
                    for slot in [slot for slot in cache if slot.block == block and slot.step in old]:
                        del cache[slot]

    def _drop_read(self, schedule: Schedule, row: int, caches: Sequence[Cache]) -> None:
        """Forget what no row after this one reads, where lanes have rows of their own."""
        last = self._last_readers(schedule)
        for cache in caches:
            for slot in [slot for slot in cache if last.get((slot.block, slot.step), -1) <= row]:
                del cache[slot]

    @functools.lru_cache(maxsize=16)  # noqa: B019
    def _last_readers(self, schedule: Schedule) -> dict[tuple[str, int], int]:
        """By block and row, the last row that may read it."""
        last: dict[tuple[str, int], int] = {}
        for row, loads in enumerate(schedule.loads):
            for block in loads | ({self.output} if self.output and self.blends(schedule, row) else set()):
                for source in self.sources(schedule, row, block):
                    other, at = (source[0], source[1]) if isinstance(source, tuple) else (block, source)
                    last[other, at] = row
        return last

    def _graph(self, program: Program, loads: frozenset[str], live_out: tuple[str, ...]) -> CutGraph:
        key = program, loads, live_out
        if key not in self._graphs:
            graph = cut_graph(program, loads, live_out)
            detach_weights(graph.step_graph.graph_module)  # nobody wants their gradients, which take memory and time
            self._graphs[key] = graph
        return self._graphs[key]

    def count(self, loads: frozenset[str]) -> None:
        """Count the work of one call of every trajectory; alike on every rank, whatever its share."""
        self.units += self._macs.cost(loads) / len(self.order)

    def first_run(self) -> int:
        """Number of this rank's first recorded run among those of all ranks: random numbers must not depend on the ranks."""
        counts = self.group.gather([torch.tensor(1 + self.places[-1].run)])
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

    def decibels(self, rollout: Rollout) -> torch.Tensor:
        """Relative error of every final image in dB, float64 ``[N]`` over all ranks; smaller is better."""
        return 10 * self.errors(rollout).clamp_min(1e-15).log10()

    def score(self, rollout: Rollout) -> float:
        """Mean over images of the relative error in dB. The mean PSNR with its sign turned."""
        return float(self.decibels(rollout).mean())

    def relative_error(self, rollout: Rollout) -> float:
        """Relative L2 error of the final samples."""
        return float(self.errors(rollout).mean().sqrt())

    def score_of(self, others: Sequence[Sampler]) -> float:
        """Score of other trajectories, from the same noise, as if they were rollouts."""
        return self.score(Rollout([t.final for t in others], {}, []))

    def readable(self, schedule: Schedule, coefficients: Coefficients) -> dict[tuple[int, str], Terms]:
        """Those of some coefficients that suit a schedule: they read all that a forecast may read there, and nothing else."""
        return {
            (step, block): terms
            for (step, block), terms in coefficients.items()
            if block in schedule.loads[step] and [s for s, _ in terms] == self.sources(schedule, step, block)
        }

    def residuals(self, rollout: Rollout) -> list[torch.Tensor]:
        """Errors of the final samples, float64 ``[B, D]`` per trajectory."""
        return [self.residual(final, n) for n, final in enumerate(rollout.finals)]

    def residual(self, final: torch.Tensor, number: int) -> torch.Tensor:
        """Errors of the final samples of one trajectory, float64 ``[B, D]``."""
        return (final.double() - self.trajectories[number].final.double()).flatten(1).cpu()

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


@functools.lru_cache(maxsize=64)
def _call_bytes(program: Program) -> tuple[int, int]:
    """Bytes of values in a call at once: without gradients, and with what a backward pass keeps."""
    graph = program.graph_module.graph
    return peak_bytes(graph), all_bytes(graph) + peak_bytes(graph)
