"""Variants: the program captured for each form of call, each state of the model and each mode around it.

    call --> form (shapes, types, static arguments), modes (autocast, ...), state (attributes, hooks, weights) --> Variant

A variant is used only while all three are what it was captured for. What is new is captured then, with the blocks and the
mask of the first capture; where that cannot be or never ends, the original model runs, and a warning names what changed.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fxmask.backends.protocol import Compiler
from fxmask.errors import CaptureError
from fxmask.frontend.recapture import recapture
from fxmask.frontend.refusals import explain, refuse_active_hooks
from fxmask.guards.ambient import Ambient
from fxmask.guards.state import Change, Snapshot
from fxmask.ir.calls import BoundCall
from fxmask.ir.mask import Mask
from fxmask.ir.plan import Plan
from fxmask.ir.program import Program
from fxmask.passes.rectify import rectify
from fxmask.runtime.background import Background
from fxmask.runtime.batched_lanes import program_of_a_lane
from fxmask.runtime.checks import Checks
from fxmask.runtime.executor import Executor
from fxmask.runtime.graph_store import GraphStore
from fxmask.runtime.history import History
from fxmask.runtime.replay import executor_of
from fxmask.runtime.timesteps import Timetable
from fxmask.runtime.trial import Findings
from fxmask.runtime.warn import Warner

logger = logging.getLogger(__name__)
NOTHING = contextlib.nullcontext()
MOST_VARIANTS = 16  # that are kept, the ones used last
NEAR = 5e-3  # of the largest timestep: a timestep in half precision is no other one
MOST_REFUSED = 64  # forms of call that the model could not be captured for, and that are remembered
MOST_VALUES = 6  # of one attribute or argument that the model is captured for; a value that never settles is not followed


class Variant:
    """The program captured for one form of call, state and mode, and its executors by start step."""

    def __init__(
        self,
        program: Program,
        mask: Mask,
        backend: str,
        mode: str | None,
        plan: Plan | None = None,
        compiler: Compiler | None = None,
        graphs: GraphStore | None = None,
    ) -> None:
        self.program = program
        self.mask = mask
        self.sample = program.inputs.index(program.example.samples[0])  # which of the inputs is the (first) sample
        self.key = program.example.key
        self.ambient = program.ambient
        self.state = program.state
        self.device_type = program.example.sample.device.type
        self.timetable = Timetable(mask.timesteps)
        self.graphs = graphs if graphs is not None else GraphStore(program, backend, mode, compiler)
        changing = {k for k, name in enumerate(program.inputs) if program.roles[name] != "conditioning"}
        self._assumptions = program.assumptions
        self._step_assumptions = program.assumptions and program.assumptions.of_inputs(changing)
        self._executors: dict[int, Executor] = {}
        if plan is not None:
            self._executors[plan.start] = executor_of(plan, self.graphs)

    def fits(self, bound: BoundCall, ambient: Ambient) -> bool:
        """Whether it was captured for such a call under such modes."""
        return self.key == bound.key and self.ambient in (None, ambient)

    def unchanged(self) -> bool:
        """Whether the model's state is, to the last object, what it was."""
        return self.state is None or self.state.held.same()

    def unchanged_in_step(self) -> bool:
        """The same of what is likeliest to change in the middle of a run; takes microseconds."""
        return self.state is None or self.state.held.same_in_step()

    def broken_assumption(self, tensors: Sequence[torch.Tensor], running: bool) -> str | None:
        """Where the model would take another way than its graph; ``running``: a run's conditioning was looked at before."""
        asked = self._step_assumptions if running else self._assumptions
        return None if asked is None else asked.broken(tensors)

    @property
    def asks_in_steps(self) -> bool:
        """Whether values of what changes from step to step decide which way the model takes."""
        return self._step_assumptions is not None

    def graph_mode(self) -> contextlib.AbstractContextManager[Any]:
        """How its graphs run: what autocast casts is cast in them."""
        return NOTHING if self.ambient is None or self.ambient.autocast is None else self.ambient.graph_mode()

    def executor(self, start: int) -> Executor:
        """Runs the mask from step ``start`` on."""
        if start not in self._executors:
            self._executors[start] = executor_of(rectify(self.program, self.mask, start=start), self.graphs)
        return self._executors[start]


class Variants:
    """The programs of one accelerated model, captured when they are first needed.

    Args:
        program: the first capture.
        plan: of this program.
        backend: of every variant.
        mode: of the backend.
        compiler: of the first variant, if it comes from a package, which has graphs for one form of call; others are
            compiled with Inductor then.
        relatives: of the same model with plans for other settings: what they have captured, and compiled with the same
            backend, is used here, too. The list may grow later.
        history: of the latest runs, if it is shared with them.
        checks: of the plan, if steps are compared with their forecasts.
        progress: show a bar while step graphs compile at their first call.
        findings: of a trial, if the plan is one.
    """

    def __init__(
        self,
        program: Program,
        plan: Plan,
        backend: str,
        mode: str | None,
        compiler: Compiler | None = None,
        *,
        relatives: Sequence[Variants] = (),
        history: History | None = None,
        checks: Checks | None = None,
        progress: bool = False,
        findings: Findings | None = None,
    ) -> None:
        program, plan = program_of_a_lane(program, plan)
        self.progress = progress
        self.program = program
        self.plan = plan
        self.backend = backend
        self.mode = mode
        self.loaded = compiler is not None
        self.background: Background | None = None
        self.warn = Warner()
        self.history = history if history is not None else History()
        self.checks = checks
        self.findings = findings
        self._relatives = relatives
        self._model = program.model
        alike = [other for other in relatives if (other.backend, other.mode) == (backend, mode)]
        shared = next((v.graphs for other in alike for v in other.known if v.program is program), None)
        self._known: list[Variant] = []
        self._use(Variant(program, plan.source, backend, mode, plan, compiler, shared))
        # By form of call and modes: the state, and why it failed where the model itself did and nothing was said of it.
        self._refused: dict[Any, tuple[Snapshot, str | None]] = {}
        self._values: Counter[str] = Counter()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._known)

    def values(self) -> tuple[Variant, ...]:
        """All that are kept, the one used last first."""
        return tuple(self._known)

    @property
    def elsewhere(self) -> tuple[str, str | None]:
        """Backend and mode for other forms of call than the one that a package was made for."""
        return ("auto", None) if self.loaded else (self.backend, self.mode)

    known = property(values)

    @property
    def first(self) -> Variant | None:
        """One of the program's own form of call; ``None`` after weights were replaced, until such a call comes again."""
        return next((v for v in self._known if v.key == self.program.example.key), None)

    def executor(self) -> Executor:
        """Runs the plan at the captured form of call."""
        variant = self.first
        if variant is None:
            variant = self.of(self.program.example)
        if variant is None:
            raise CaptureError("the model cannot be captured any more as it is now; accelerate it again")
        return variant.executor(self.plan.start)

    def compile_in_background(self, *, progress: bool) -> None:
        """Compile the step graphs of the captured form of call in a thread of its own, while the original answers."""
        executor = self.executor()
        self.background = Background(lambda: executor.compile_all(progress=progress))

    def is_waiting(self, bound: BoundCall) -> bool:
        """Whether the original must answer a call: step graphs compile in the background, or the run began while they did."""
        if self.background is None:
            return False
        if not self.background.is_over or not self._is_first(bound.timestep):
            return True
        self.background = None
        return False

    def _is_first(self, timestep: Any) -> bool:
        """Whether a timestep is the one that runs begin with. Waits for the device."""
        if timestep is None:
            return True
        timesteps = self.plan.mask.timesteps
        value = float(torch.as_tensor(timestep).flatten()[0])
        return abs(value - timesteps[self.plan.start]) <= NEAR * max(map(abs, timesteps))

    def followed(self) -> None:
        """A call followed the plan: what kept others from it is news again."""
        for cause in self.history.hit():
            self.warn.forget(cause)

    def ambient(self, bound: BoundCall) -> Ambient:
        """The modes around a call."""
        return Ambient.now(bound.sample.device.type)

    def of(self, bound: BoundCall) -> Variant | None:
        """The variant for a call, captured now if it is new; ``None`` if the original model must run."""
        ambient = self.ambient(bound)
        for variant in self._known:
            if variant.fits(bound, ambient) and variant.unchanged():
                return variant
        if self._are_weights_elsewhere(bound):
            # Offloading moves weights in hooks of the original's forward, which a graph does not call.
            self.warn(
                "offloaded",
                f"the weights of {type(self._model).__name__} are not on {self._place(bound)}, where the sample is, so the "
                "original model runs, unaccelerated; move the model there with .to(), or switch offloading off for it",
            )
            return None
        with self._lock:
            return self._find_or_capture(bound, ambient)

    def _find_or_capture(self, bound: BoundCall, ambient: Ambient) -> Variant | None:
        now = Snapshot.of(self._model)
        fitting = [v for v in self._known if v.fits(bound, ambient)]
        changes: list[Change] = []
        for variant in fitting:
            assert variant.state is not None
            found = variant.state.changes(now)
            if not found:  # other objects, but equal ones
                variant.state = now
                self._use(variant)
                return variant
            changes = changes or found
        self._forget_replaced_weights(now)
        found_elsewhere = self._of_relatives(bound, ambient)
        if found_elsewhere is not None:
            return found_elsewhere
        refused = self._refused.get((bound.key, ambient))
        if refused is not None and not refused[0].changes(now):
            return None
        if not fitting:
            base = self.program.state
            changes = [] if base is None else base.changes(now)
        reason = self._reason_not_to_capture(bound, ambient, fitting, changes)
        if reason is None:
            try:
                return self._capture(bound, ambient, changes, bool(fitting))
            except CaptureError as error:
                reason = (
                    f"{_and(self._what_is_new(bound, ambient, changes))}, and the model cannot be captured like this: {error}"
                )
            except Exception as error:  # the model itself does not take such a call, or failed: it says so when it runs
                logger.debug("the model failed while it was captured", exc_info=True)
                name = type(self._model).__name__
                reason = f"{name} failed while it was captured for such a call: {explain(error, self._model)}"
                self._refuse(bound, ambient, now, reason)
                return None
        self._refuse(bound, ambient, now, None)
        self._warn_of(reason)
        return None

    def inherit(self, other: Variants) -> None:
        """Take over what was captured with the plan before this one, and what was compiled with the same backend."""
        for variant in reversed(other.known):
            if variant.program is not self.program:
                self._adopt(variant, other)

    def _of_relatives(self, bound: BoundCall, ambient: Ambient) -> Variant | None:
        """What was captured for such a call with another setting's plan."""
        for other in self._relatives:
            for variant in other.known if other is not self else ():
                if variant.fits(bound, ambient) and variant.unchanged() and self._has_blocks(variant.program):
                    return self._adopt(variant, other)
        return None

    def _has_blocks(self, program: Program) -> bool:
        """Whether the mask fits: a program of a call that leaves layers out has not all blocks."""
        return {block.name for block in program.all_blocks}.issuperset(self.plan.source.blocks)

    def _adopt(self, variant: Variant, other: Variants) -> Variant:
        """A variant of another plan's, with this plan."""
        graphs = variant.graphs if other.elsewhere == self.elsewhere else None
        found = Variant(variant.program, self.plan.source, *self.elsewhere, graphs=graphs)
        self._use(found)
        return found

    def _refuse(self, bound: BoundCall, ambient: Ambient, now: Snapshot, unsaid: str | None) -> None:
        """Remember a form of call that cannot be captured as the model is now."""
        self._refused.pop((bound.key, ambient), None)
        self._refused[bound.key, ambient] = (now, unsaid)
        while len(self._refused) > MOST_REFUSED:
            del self._refused[next(iter(self._refused))]

    def answered(self, bound: BoundCall) -> None:
        """The original answered a call; where it had failed while it was captured for such a one, that is worth a word."""
        key = (bound.key, self.ambient(bound))
        with self._lock:
            now, unsaid = self._refused.get(key, (None, None))
            if now is not None and unsaid is not None:
                self._refused[key] = (now, None)
        if unsaid is not None:
            self._warn_of(unsaid)

    def _warn_of(self, reason: str) -> None:
        self.warn(reason, f"{reason}. The original model runs, unaccelerated")

    def _capture(self, bound: BoundCall, ambient: Ambient, changes: list[Change], known_form: bool) -> Variant:
        news = self._what_is_new(bound, ambient, changes)
        logger.info("%s is captured again: %s", type(self._model).__name__, _and(news))
        if self.loaded:
            self.warn("package", f"{_and(news)}, so the model is captured and compiled now; export a package from such a call")
        program = recapture(self.program, detached_call(bound), self.plan.source.blocks)
        if known_form:
            self._values.update({change.path for change in changes})
        else:
            self._values.update(self._new_arguments(bound))
        variant = Variant(program, self.plan.source, *self.elsewhere)
        self._use(variant)
        return variant

    def _use(self, variant: Variant) -> None:
        """Put a variant in front; forget the one that was used least recently if there are too many."""
        variant.graphs.bar.shown = self.progress
        self._known = [variant, *(v for v in self._known if v is not variant)][:MOST_VARIANTS]

    def _reason_not_to_capture(
        self, bound: BoundCall, ambient: Ambient, fitting: list[Variant], changes: list[Change]
    ) -> str | None:
        try:
            refuse_active_hooks(self._model)
        except CaptureError as error:
            return str(error)
        hooks = [change for change in changes if change.is_hook and change.before == "not there"]
        if hooks:
            return (
                f"a hook was added after capture ({hooks[0].path}), and a graph does not call hooks; remove it, or accelerate "
                "the model again with it"
            )
        if fitting:
            restless = [change for change in changes if self._values[change.path] >= MOST_VALUES]
            if restless:
                return (
                    f"{restless[0].path} has changed {MOST_VALUES} times ({restless[0]}), and a graph holds one value of it; "
                    "pass it as a tensor argument, or keep it the same"
                )
            return None
        for name in self._new_arguments(bound):
            if self._values[name] >= MOST_VALUES:
                return (
                    f"argument {name} has had {MOST_VALUES} values, and a graph is captured for each; pass it as a tensor "
                    "if it changes from call to call"
                )
        return None

    def _new_arguments(self, bound: BoundCall) -> set[str]:
        """Static arguments with a value that no variant of otherwise the same form has."""
        shapes, static = bound.key
        alike = [v.key[1] for v in self._known if v.key[0] == shapes and len(v.key[1]) == len(static)]
        return {name for name, value in static if alike and all((name, value) not in other for other in alike)}

    def _what_is_new(self, bound: BoundCall, ambient: Ambient, changes: list[Change]) -> list[str]:
        """In what a call differs from the first capture, in words."""
        before = self.program.ambient
        modes = before.differences(ambient) if before is not None else []
        weights = [change for change in changes if change.is_other_tensor]
        state = [str(change) for change in changes if not change.is_other_tensor]
        if weights:
            state.insert(0, f"weights were replaced ({weights[0].path}{', ...' if len(weights) > 1 else ''})")
        return [*self.program.example.differences(bound), *modes, *state]

    def _forget_replaced_weights(self, now: Snapshot) -> None:
        """A variant whose weights are gone would keep them alive for nothing."""
        self._known = [v for v in self._known if v.state is None or not _tensors_differ(v.state, now)]

    def _are_weights_elsewhere(self, bound: BoundCall) -> bool:
        place = self._place(bound)
        return any(x.device != place for x in self._model.parameters()) or any(x.device != place for x in self._model.buffers())

    def _place(self, bound: BoundCall) -> torch.device:
        return bound.sample.device


def _tensors_differ(before: Snapshot, now: Snapshot) -> bool:
    return any(token[0] == "tensor" and now.tokens.get(path) != token for path, token in before.tokens.items())


def _and(parts: list[str]) -> str:
    """The first few of some facts."""
    return "; ".join(parts[:3]) + (f"; and {len(parts) - 3} more" if len(parts) > 3 else "")


def detached_call(bound: BoundCall) -> BoundCall:
    """A call that keeps no reference to the caller's tensors."""
    tensors = {name: x.detach().clone() for name, x in bound.tensors.items()}
    arguments = bound.rebuild(list(tensors.values()))
    return replace(bound, tensors=tensors, arguments=arguments)
