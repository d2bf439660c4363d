"""Generations: one run of the sampling loop each, with a lane for each sequence of calls.

    Generation --> Lane (calls with one conditioning) --> Course (cached values, and the row of the mask that comes next)

Every lane is on a course of its own; lanes that have rows of their own in the mask are on one together, in which the first
call of a run takes the first lane's rows, and a lane joins in its turn with the sample that the first had.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxmask._torch import is_transformed, version_of
from fxmask.guards.ambient import modes
from fxmask.ir.calls import BoundCall
from fxmask.ir.forecast import Slot
from fxmask.ir.mask import Mask
from fxmask.ir.rebind import TENSORS
from fxmask.runtime import clock
from fxmask.runtime.batched_lanes import Whole
from fxmask.runtime.checks import RunChecks
from fxmask.runtime.clock import Clock
from fxmask.runtime.executor import Executor
from fxmask.runtime.history import DOUBTFUL, MIXED, changed_conditioning, other_timesteps
from fxmask.runtime.lane import Course, Lane, Seen, WholeRun
from fxmask.runtime.marks import LaneName, Marks
from fxmask.runtime.steady import Steady
from fxmask.runtime.timesteps import types_of
from fxmask.runtime.trial import RunTrial
from fxmask.runtime.variants import Variant, Variants

# Without a marked generation, a lane that was not called for this many calls is taken for abandoned.
IDLE_CALLS = 64


class Generation:
    """One run of the sampling loop; caches live as long as it does.

    Use as a context manager around the calls of one run. It may be entered again, so that two runs can be interleaved
    step by step in one thread, each in its own generation.

    Args:
        variants: the programs of the model that is called.
        marks: the generations that are marked in each context.
        lanes: the name of the lane whose call is made, where the caller says it.
        predicts: timesteps that are slow to read are predicted: the caller vouches for their sequence.
    """

    def __init__(
        self, variants: Variants, marks: Marks[Generation], lanes: LaneName | None = None, *, predicts: bool = True
    ) -> None:
        self._variants = variants
        self._lane_name = lanes if lanes is not None else LaneName()
        self._predicts = predicts
        self._marks = marks
        self._lanes: list[Lane] = []
        self._entered = 0
        self._clock = Clock()
        self._count = 0
        self._latest: Lane | None = None  # the lane whose step the latest call was, if it was one's
        self.calls = 0
        self.matched = 0

    @property
    def variants(self) -> Variants:
        """The programs of the model, and the plan."""
        return self._variants

    def __enter__(self) -> Generation:
        self._marks.enter(self)
        self._entered += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._marks.leave(self)
        self._entered -= 1
        ended = kind is None or issubclass(kind, (StopIteration, StopAsyncIteration, GeneratorExit))  # no failure
        if ended and not self._entered:
            self.warn_if_useless()

    def follow(self, args: Sequence[Any], kwargs: Mapping[str, Any], recording: bool) -> tuple[Any] | None:
        """What a call returns that goes on as its lane did, in a tuple; ``None`` if it must be looked at closely.

        Args:
            args: of the call.
            kwargs: of the call.
            recording: whether gradients are recorded around it.
        """
        if is_transformed():
            return None
        name = self._lane_name.now
        found = [
            (x, given)
            for x in self._lanes
            if x.steady and x.name == name and (given := x.steady.leaves(args, kwargs)) is not None
        ]
        if len(found) != 1:
            return None
        lane, given = found[0]
        if lane.variant.mask.lanes and not self._is_turn(lane, lane.position):
            return None
        if recording and any(type(x) in TENSORS and x.requires_grad for x in given):
            return None
        step, steady, variant = lane.position, lane.steady, lane.variant
        if step is None or steady is None or steady.modes != modes(variant.device_type) or not variant.unchanged_in_step():
            return None
        if self._is_over(lane, step):
            return None  # a full graph takes more than this way prepares
        if len(self._lanes) > 1 and any(x is not lane and x.is_twin_of(lane) for x in self._lanes):
            return None  # whose turn it is must be found out
        tensors, value = [given[k] for k in steady.inputs], None
        if steady.timestep >= 0:
            timestep = given[steady.timestep]
            if steady.readable and not self._clock.pending:
                value = self._clock.read_host(timestep)
            else:
                value = self._read_timestep(lane, timestep, variant.timetable.tolerance(steady.types))
            if value is None:
                return None
            if value != variant.mask.timesteps[step] and variant.timetable.step_of(value, steady.types, step) != step:
                return None
            row = lane.course.next
            assert row is not None
            if lane.executor.needs_timestep(row) or not lane.executor.prologues.is_exact(row, value):
                program = variant.program
                place = program.example.sample.device
                canonical = program.signature.canonical_timestep(timestep, place, program.batch_size)
                tensors[steady.inputs.index(steady.timestep)] = canonical
        lane.latest, lane.doubtful = step, False
        self._count += 1
        self.calls += 1
        lane.seen = self._count
        outputs = self._advance(lane, step, tensors, value, running=True)
        return (variant.program.outputs(outputs, steady.return_dict),)

    def remember(self, bound: BoundCall, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Prepare for calls that go on like the one that has just been run."""
        lane = self._latest
        if lane is not None and lane.steady is None and lane.is_going and not lane.is_over:
            lane.steady = Steady.of(lane.variant, bound, args, kwargs)

    def run(self, variant: Variant, bound: BoundCall) -> list[torch.Tensor] | None:
        """Run one call of the denoiser and move its lane forward; ``None`` if the original must run."""
        self._latest = None  # a call that is of no lane's run says nothing of the next of one
        tensors = list(bound.tensors.values())
        lane, step, value = self._locate(self._siblings(variant, bound), bound)
        running = step is not None and self._is_turn(lane, step)
        if not running:  # not a run in progress: all of the model's state is looked at
            current = self._variants.of(bound)
            if current is not variant:
                lane.forget()
                return None if current is None else self.run(current, bound)
        branch = variant.broken_assumption(tensors, running)
        if branch is not None:
            self._variants.warn(
                branch,
                f"the model branches on the values of its arguments ({branch}), and for these the other way than when it was "
                "captured: the original model runs, unaccelerated, wherever that is so",
            )
            self._variants.history.unplanned(variant.program.macs, original=True)
            lane.forget()
            return None
        self._count += 1
        self.calls += 1
        again, lane.seen = lane.seen > 0, self._count
        joins = not running and step is not None and self._join(lane, step, bound.sample)
        row = None if step is None or running or joins else self._first_row(lane, step)
        if step is not None and not running and not joins and row is None:
            step = None  # the mask has no such call
        if step is None:
            self._missed(lane, again, value)
            lane.forget()
            self._variants.history.unplanned(variant.program.macs)
            with variant.graph_mode():
                return variant.executor(0).run_full(tensors)
        if not running:
            if row is not None:
                lane.course = Course(row, row, taken={lane.number})
                if row != variant.executor(0).plan.start:
                    self._missed(lane, again, value)
            lane.executor = variant.executor(lane.course.start)
            lane.rows, lane.steady = (), None
            lane.weights = None
            lane.stats = self._variants.history.begin()
            lane.is_over, lane.checks = False, None if self._variants.checks is None else RunChecks(self._variants.checks)
            lane.trial = None if self._variants.findings is None else RunTrial(self._variants.findings)
            lane.stats.checks = lane.checks
        self._latest = lane
        return self._advance(lane, step, tensors, value, running or joins)

    def _is_turn(self, lane: Lane, step: int | None) -> bool:
        """Whether a lane's call at a step goes on from the call before it."""
        following = lane.course.next
        return step is not None and following is not None and lane.variant.mask.call_of(step, lane.number) == following

    def _join(self, lane: Lane, step: int, sample: torch.Tensor) -> bool:
        """Take a lane into a course in which the next call is another lane's first one, with this sample.

        Where the lane is the first of its step there is no sample to compare: its name tells then.
        """
        mask = lane.variant.mask
        if not mask.lanes:
            return False
        courses = {id(x.course): x.course for x in reversed(self._lanes)}  # several lanes share one
        for found in courses.values():
            at = None if found.next is None or found.next >= len(mask.order) else mask.order[found.next]
            if found.next is None or at is None or at[0] != step or at[1] in found.taken:
                continue
            named = lane.name in mask.lanes
            if named and mask.lanes[at[1]] != lane.name:
                continue
            if found.next > found.start and mask.order[found.next - 1][0] == step:
                if found.sample is None or not found.sample.is_same(lane.variant.program.moving_part(sample)):
                    continue  # of another image
            elif not named or self._was_due(found, mask, at[1], step):
                continue
            lane.course, lane.number = found, at[1]
            found.taken.add(at[1])
            return True
        return False

    def _was_due(self, course: Course, mask: Mask, lane: int, step: int) -> bool:
        """Whether a lane would have come to a course before this step, if it was its."""
        return any(mask.call_of(i, lane) is not None for i in range(mask.order[course.start][0], step))

    def _first_row(self, lane: Lane, step: int) -> int | None:
        """The row of the mask that a run begins with which has nothing to go on from; ``None`` if there is none."""
        mask = lane.variant.mask
        lane.number = mask.lanes.index(lane.name) if lane.name in mask.lanes else 0
        return mask.call_of(step, lane.number)

    def _advance(
        self, lane: Lane, step: int, tensors: list[torch.Tensor], timestep: float | None, running: bool
    ) -> list[torch.Tensor]:
        """Run one step of a lane's plan, with what was computed when its run began, as long as that holds."""
        executor, variant, course = lane.executor, lane.variant, lane.course
        row = course.next
        assert row is not None
        if running:
            self.matched += 1
            self._variants.followed()
        over = running and self._is_over(lane, step)
        full = executor.plan.steps[row].macs == executor.plan.full_macs
        # If the step raises, it is not known to have been reached: the next call must not go on from it.
        course.next = None
        if over:
            return self._advance_in_full(lane, row, tensors)
        with variant.graph_mode():
            watch = executor.prologues.weights
            if lane.weights is None or watch.changed(lane.weights, row):  # a new run, or weights changed in the middle of one
                lane.rows, lane.weights = executor.begin(tensors, lane.rows), watch.now()
            exact = timestep is None or executor.prologues.is_exact(row, timestep)
            trial = lane.trial if full else None
            if trial is not None:
                trial.before(step, course.cache)
            outputs = self._part_of_whole(lane, row) if variant.mask.batched else None
            if outputs is None:
                outputs = executor.run_step(row, tensors, course.cache, lane.rows, exact)
            if trial is not None:
                trial.after(step, variant.program, tensors, outputs[0])
        course.next = row + 1
        course.sample = None
        if len(course.taken) < len(variant.mask.lanes):
            course.sample = Seen.of(variant.program.moving_part(tensors[variant.sample]))
        if lane.position == variant.mask.num_steps:
            lane.rows, lane.steady = (), None  # the run is over: memory that it has is for the next
        assert lane.stats is not None
        lane.stats.add(executor.plan.steps[row].macs, executor.plan.full_macs, followed=running)
        if lane.checks is not None and full:
            lane.checks.computed(step, outputs[0], tensors[variant.sample])
        if lane.checks is not None and lane.position == variant.mask.num_steps:
            lane.checks.send()
        return outputs

    def _part_of_whole(self, lane: Lane, row: int) -> list[torch.Tensor] | None:
        """What a step that computes all lanes of one batch makes of a part; ``None`` if the part is computed alone."""
        whole: Whole | None = self._lane_name.whole
        if whole is None:
            return None
        if row in lane.executor.plan.whole_steps:
            self._run_whole(lane, row, whole)
        return whole.outputs.pop(row, None)

    def _run_whole(self, lane: Lane, row: int, whole: Whole) -> None:
        """Compute one step of the whole batch, store the parts of what later calls read, and keep the parts of the outputs."""
        course, mask, tensors = lane.course, lane.variant.mask, list(whole.bound.tensors.values())
        known = course.whole
        if known is None or known.variant.key != whole.bound.key or not known.variant.unchanged_in_step():
            variant = self._variants.of(whole.bound)
            if variant is None:
                return
            known = self._begin_whole(course, variant, tensors)
        elif known.executor.prologues.weights.changed(known.weights, row):
            known = self._begin_whole(course, known.variant, tensors)
        if known.variant.broken_assumption(tensors, running=False) is not None:
            return
        executor = known.executor
        outputs, stored = executor.run_whole(row, tensors, known.rows if self._is_at(executor, row, whole) else ())
        parts = mask.part_of_lane
        for k, part in enumerate(parts):
            whole.outputs[row + k] = [x.chunk(len(parts))[part].clone() for x in outputs]
            for block, value in lane.executor.plan.steps[row + k].store:
                course.cache[Slot(block, value, row + k)] = stored[block, value].chunk(len(parts))[part]

    def _begin_whole(self, course: Course, variant: Variant, tensors: list[torch.Tensor]) -> WholeRun:
        """What runs steps of the whole batch from now on."""
        executor = variant.executor(course.start)
        course.whole = WholeRun(variant, executor, executor.begin_whole(tensors), executor.prologues.weights.now())
        return course.whole

    def _is_at(self, executor: Executor, row: int, whole: Whole) -> bool:
        """Whether the table of the timestep's values is for this very timestep."""
        timestep = whole.bound.timestep
        value = None if timestep is None or not self._clock.knows(timestep) else self._clock.read(timestep)
        return value is None or executor.prologues.is_exact(row, value)

    def _is_over(self, lane: Lane, step: int) -> bool:
        """Whether the rest of a lane's run is computed, because its error is estimated to pass the plan's bound."""
        if not lane.is_over and lane.checks is not None and lane.checks.is_over():
            lane.is_over = True
            if lane.stats is not None:
                lane.stats.guarded = step
        return lane.is_over

    def _advance_in_full(self, lane: Lane, row: int, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Run one step of a lane without its plan; nothing is stored, so it cannot go back to the plan in this run."""
        executor, variant, course = lane.executor, lane.variant, lane.course
        course.cache = {}
        with variant.graph_mode():
            outputs = variant.executor(0).run_full(tensors)
        course.next = row + 1
        if lane.position == variant.mask.num_steps:
            lane.rows, lane.steady = (), None
        assert lane.stats is not None
        lane.stats.add(executor.plan.full_macs, executor.plan.full_macs, followed=True)
        return outputs

    def _missed(self, lane: Lane, again: bool, value: float | None) -> None:
        """A call did not go on from the one before it; after a few of them, say why."""
        others = [other for other in self._lanes if other is not lane and other.seen]
        if not again and not others:
            return  # the first call of all
        mask = self._variants.plan.mask
        if bool(mask.compute.all()):
            return  # nothing is lost
        if not again:
            changed = self._changed_conditioning(lane, others[-1])
            if not changed:
                return
            cause, reason = str(changed), changed_conditioning(changed)
        elif lane.doubtful:
            cause, reason = "doubtful", DOUBTFUL
        elif value is None:
            cause, reason = "mixed", MIXED
        else:
            cause, reason = "timesteps", other_timesteps(mask.timesteps, value)
        history = self._variants.history
        found = history.miss(cause, reason)
        if found is not None:
            reason = history.reasons.get(found, reason)
            self._variants.warn(found, f"the last denoiser calls did not follow the plan, so nothing was accelerated: {reason}")

    def _changed_conditioning(self, lane: Lane, other: Lane) -> list[str]:
        """Names of conditioning inputs that differ between two lanes of one variant."""
        if other.variant is not lane.variant or len(other.conditioning) != len(lane.conditioning):
            return []
        roles = lane.variant.program.roles
        names = [name for name in lane.variant.program.inputs if roles[name] == "conditioning"]
        pairs = zip(names, lane.conditioning, other.conditioning, strict=True)
        return [name for name, a, b in pairs if a is not b and not (a.shape == b.shape and torch.equal(a, b))]

    def interrupt(self, bound: BoundCall) -> None:
        """A call was answered by the original: no lane that it may have been of can go on from its caches.

        One of another form, at a timestep that the lane has just had, is none of its own: a further call of that step, which
        leaves layers out, say.
        """
        value = None if bound.timestep is None else self._clock.read(bound.timestep)
        for lane in self._lanes:
            if not self._had(lane, bound, value):
                lane.forget()

    def _had(self, lane: Lane, bound: BoundCall, value: float | None) -> bool:
        """Whether a lane of another form has just been at this timestep, which is no other step's."""
        timesteps = lane.variant.mask.timesteps
        if value is None or lane.latest is None or lane.position != lane.latest + 1 or lane.variant.key == bound.key:
            return False
        return (
            timesteps.count(timesteps[lane.latest]) == 1
            and lane.variant.timetable.step_of(value, types_of(bound), lane.latest) == lane.latest
        )

    def variant_in_use(self, bound: BoundCall) -> Variant | None:
        """The variant that a run in progress uses for this form of call, if it is still what the model is.

        All of the model's state is looked at when a run starts; in each step as much as costs nothing.
        """
        ambient = self._variants.ambient(bound)
        for lane in self._lanes:
            if lane.is_going and lane.variant.fits(bound, ambient) and lane.variant.unchanged_in_step():
                return lane.variant
        return None

    def _siblings(self, variant: Variant, bound: BoundCall) -> list[Lane]:
        """The lanes with this call's conditioning (the same tensors, unchanged, or else equal ones), at least one."""
        roles = variant.program.roles
        given = tuple(x for name, x in bound.tensors.items() if roles.get(name) == "conditioning")
        versions = tuple(map(version_of, given))
        name = self._lane_name.now
        lanes = [lane for lane in self._lanes if lane.variant is variant and lane.name == name]
        same = [lane for lane in lanes if lane.is_given(given, versions)]
        if not same and self._predicts and lanes and not all(map(clock.on_host, given)):
            same = self._predicted(lanes, given, bound)
        elif not same:
            same = [x for x in lanes if x.versions == versions and all(map(torch.equal, given, x.copies))]
        if same:
            return same
        self._forget_idle_lanes()
        lane = Lane(given, versions, tuple(map(_held, given)), variant, variant.executor(0), name=name)
        self._lanes.append(lane)
        return [lane]

    def _predicted(self, lanes: list[Lane], given: tuple[torch.Tensor, ...], bound: BoundCall) -> list[Lane]:
        """The lane whose turn it is, if a call with new tensors for its conditioning can be of one in progress.

        To compare them with a lane's would wait for the device: whether they are equal is seen at a later call. While it is not
        known yet how many lanes a step has, the timestep tells, if need be with a wait.
        """
        going = sorted((x for x in lanes if x.is_going), key=lambda x: x.seen)
        going = [x for x in going if tuple(map(version_of, x.conditioning)) == x.versions]
        if bound.timestep is None:
            return [x for x in going if all(map(torch.equal, given, x.copies))]
        if going and not self._clock.knows(bound.timestep) and all((x.position or 0) > 1 for x in going):
            chosen = going[0]
        else:
            value, types = self._clock.read(bound.timestep), types_of(bound)
            if value is None:
                return []
            turn = [x for x in going if x.variant.timetable.step_of(value, types, x.position) == x.position]
            if not turn:
                return []
            chosen = turn[0]
        self._clock.vouch(given, chosen.conditioning)
        return [chosen]

    def _locate(self, siblings: list[Lane], bound: BoundCall) -> tuple[Lane, int | None, float | None]:
        """The lane, the step of the plan that a call is, and its timestep; the step is ``None`` if it must run in full."""
        waiting = sorted(siblings, key=lambda x: x.seen)
        lane = waiting[0]
        name = lane.variant.program.signature.timestep
        if name is None:  # nothing but the count tells steps apart
            return lane, self._counted(lane), None
        timestep, timetable = bound.timestep, lane.variant.timetable
        types = types_of(bound)
        value = None if timestep is None else self._read_timestep(lane, timestep, timetable.tolerance(types))
        lane = self._choose(waiting, lambda x: None if value is None else timetable.step_of(value, types, x.position))
        step = None if value is None else timetable.step_of(value, types, lane.position)
        if step is None:
            return lane, None, value
        lane.doubtful = self._is_doubtful(lane, step)
        lane.latest = step
        return lane, None if lane.doubtful else step, value

    def _forget_idle_lanes(self) -> None:
        """A marked generation ends when its owner says so."""

    def _counted(self, lane: Lane) -> int | None:
        """The step of a denoiser that takes no timestep: nothing but the count tells steps apart."""
        position = lane.position if lane.position is not None else (0 if not lane.course.cache else None)
        return position if position is not None and position < lane.variant.mask.num_steps else None

    def _choose(self, waiting: Sequence[Lane], step_of: Callable[[Lane], int | None]) -> Lane:
        """Of lanes with the same conditioning the one whose turn it is; a new one if all have just had theirs."""
        steps = [step_of(lane) for lane in waiting]
        for lane, step in zip(waiting, steps, strict=True):
            if step is not None and lane.position == step:
                return lane
        if all(
            s is not None and lane.latest == s and lane.position is not None for lane, s in zip(waiting, steps, strict=True)
        ):
            first = waiting[0]
            form = first.conditioning, first.versions, first.copies, first.variant, first.executor
            self._lanes.append(Lane(*form, name=first.name))
            return self._lanes[-1]
        return waiting[0]

    def _read_timestep(self, lane: Lane, timestep: Any, rounding: float) -> float | None:
        """The timestep's value. Waits for the device only where a marked generation cannot predict it."""
        wrong = self._clock.wrong_prediction(rounding) if self._clock.pending else None
        if wrong is not None:
            for other in self._lanes:
                other.forget()
            raise RuntimeError(
                f"inside generation() a call was taken for {wrong}; its result is wrong. Mark each run of the sampling loop "
                "with a generation() of its own, and follow the plan's timesteps"
            )
        if self._predicts and lane.is_expected and not self._clock.knows(timestep):
            value = lane.variant.mask.timesteps[lane.position or 0]
            self._clock.predict(timestep, value)
            return value
        return self._clock.read(timestep)

    def _is_doubtful(self, lane: Lane, step: int) -> bool:
        """Whether a call could belong to one of two runs; in a marked generation there is one."""
        return False

    def warn_if_useless(self) -> None:
        """Warn if a run that should have been accelerated was not."""
        mask = self._variants.plan.mask
        if self.calls > 1 and not self.matched and not bool(mask.compute.all()):
            history = self._variants.history
            cause = history.cause or "unknown"
            reason = history.reasons.get(cause) or other_timesteps(mask.timesteps, None)
            self._variants.warn(
                cause, f"none of {self.calls} denoiser calls followed the plan, so nothing was accelerated: {reason}"
            )


class InferredGeneration(Generation):
    """Runs that nobody marked, one after the other: they are told apart by their timesteps and conditioning."""

    def __init__(self, variants: Variants, marks: Marks[Generation], lanes: LaneName) -> None:
        super().__init__(variants, marks, lanes, predicts=False)

    def start_again(self) -> None:
        """Count the calls of the next run, after a warning if the last one was not accelerated."""
        self.warn_if_useless()
        self.calls = self.matched = 0

    def _forget_idle_lanes(self) -> None:
        """Lanes of runs that ended or were abandoned hold memory for nothing."""
        self._lanes = [x for x in self._lanes if x.course.cache and self._count - x.seen <= IDLE_CALLS]

    def _counted(self, lane: Lane) -> int | None:
        """None: where a run begins cannot be counted."""
        return None

    def _choose(self, waiting: Sequence[Lane], step_of: Callable[[Lane], int | None]) -> Lane:
        """The lane that was not called for longest."""
        return waiting[0]

    def _is_doubtful(self, lane: Lane, step: int) -> bool:
        """Whether a call could belong to one of two runs with the same conditioning.

        Two calls in a row at one step are an abandoned run and a new one, or two runs step by step, or two lanes that
        nothing tells apart; only ``generation()`` can say which. The doubt ends when the sequence goes back: a new run.
        """
        if lane.latest is None or step == lane.position:
            return False
        return step == lane.latest or (lane.doubtful and step > lane.latest)


def _held(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself; of one on the host whose changes nobody counts (made in inference mode) a copy, to compare with."""
    return x.clone() if version_of(x) == -1 and clock.on_host(x) else x
