"""One pipeline in use: which settings were seen, what was recorded of them, which plan each has.

    call --> setting --> new:     runs in full, recorded in passing
                     --> known:   a plan, made at the second call, runs
                     --> refused: runs as it always did; why was said once

A plan is made from recorded runs alone. Better ones take further calls of the denoiser, and are made only when they are asked
for, see ``improve``.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import statistics
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fxmask.backends import get_backend
from fxmask.errors import FxmaskError, InputError
from fxmask.frontend.capture import capture
from fxmask.frontend.modules import module_device
from fxmask.frontend.offloading import execution_device, hook_of, onloaded
from fxmask.ir.mask import Mask
from fxmask.ir.program import Program
from fxmask.learning.effort import Limits
from fxmask.learning.instant.levels import ReuseErrors, ReusePlan, best_plan, reuses_of, trial_of
from fxmask.learning.instant.parts import PartsLearner, learner_of
from fxmask.learning.instant.plans import InstantLearner, InstantPlan, formed_share, keeper
from fxmask.learning.outcome import Outcome
from fxmask.learning.room import free_bytes
from fxmask.passes.rectify import rectify
from fxmask.runtime.account import Account
from fxmask.runtime.checks import Checks
from fxmask.runtime.history import History
from fxmask.runtime.model import AcceleratedModel, given_roles
from fxmask.runtime.trial import Findings
from fxmask.runtime.variants import Variants
from fxmask.sampling.pipeline_trajectory import INTERRUPTED, PipelineTrajectory
from fxmask.sampling.same_sampler import sampler_facts
from fxmask.sampling.sampler import Sampler
from fxmask.settings.better import better_mask, journal_in
from fxmask.settings.checked import checks_of, checks_of_mask
from fxmask.settings.components import accelerated_in
from fxmask.settings.key import Setting, setting_of, unlike
from fxmask.settings.known import KEPT_RUNS, Known, count_graphs, named
from fxmask.settings.obstacles import DRIFTING, drift_of, obstacle_to
from fxmask.settings.passing import record_in_passing
from fxmask.settings.together import fit_together

logger = logging.getLogger(__name__)
MOST_SETTINGS = 16  # that are kept, those used last
MOST_RECORDED = 4  # of these, with recorded runs, if all have plans
SHARE = 8  # of free memory, one part in so many may hold recorded runs, if nothing else was asked for
MOST_TRIALS = 3  # calls that may compare, if the first ones could not

INSIDE: contextvars.ContextVar[bool] = contextvars.ContextVar("fxmask_inside", default=False)


class Session:
    """A pipeline in use with an accelerated denoiser.

    Args:
        model: the accelerated denoiser, at first without a plan.
        component: its name among the pipeline's attributes.
        outcome: what plans are to meet.
        limits: bounds on them.
        backend: of step graphs.
        mode: of the backend.
        max_learning_bytes: what recorded runs may hold; an eighth of what is free, if not given.
        improve: ``"background"``: plans are made better in a thread of their own.
        every: one call in so many runs in full and is recorded, once there is a plan; 0: none.
        compiling: ``"background"``: step graphs compile in a thread of their own, while the original answers.
        progress: show progress bars.

    Attributes:
        others: of the pipeline's other denoisers. One call of it is recorded for all, and one outcome is for all together.
        shared: whether there are several.
        replaced: what the accelerated denoiser was put in the place of.
    """

    def __init__(
        self,
        model: AcceleratedModel,
        component: str | None,
        outcome: Outcome,
        *,
        limits: Limits,
        backend: str,
        mode: str | None,
        max_learning_bytes: int | None = None,
        improve: str | None = None,
        every: int = 0,
        compiling: str | None = None,
        progress: bool = True,
    ) -> None:
        self.model = model
        self.component = component
        self.outcome = outcome
        self.limits = limits
        self.backend, self.mode = backend, mode
        self.progress = progress
        self.every = every
        self.background = improve == "background"
        self.compiles_aside = compiling == "background"
        self.settings: OrderedDict[Setting, Known] = OrderedDict()
        self.program: Program | None = None
        self.others: list[Session] = []
        self.shared = False
        self.replaced: torch.nn.Module = model.original
        self._max_bytes = max_learning_bytes
        self._relatives: list[Variants] = []
        self._history = History()
        self._lock = threading.RLock()
        self._seconds = {"learning": 0.0, "capturing": 0.0, "compiling": 0.0}
        self._recorded = self._accelerated = self._further_calls = 0
        self._said: set[str] = set()
        self._latest: Known | None = None
        self._worker: threading.Thread | None = None

        model._fxmask.learner = self

    def take_over(self, program: Program, runs: Sequence[Sampler], mask: Mask, checks: Checks | None) -> None:
        """Go on from a model's plan that was made elsewhere.

        Args:
            program: the captured denoiser.
            runs: recorded, of one setting.
            mask: in use.
            checks: of its full steps.
        """
        self.program = program
        variants = self.model._fxmask.planned
        known = Known(mask=mask, checks=checks, variants=variants, facts=sampler_facts(runs[0]) or {})
        known.runs.extend(runs)
        self._history = variants.history
        self._relatives.append(variants)
        self.settings[Setting((), "{}", "{}")] = known
        self._latest = known

    # One call of the pipeline

    def call(self, pipe: Any, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Make one call of the pipeline.

        Args:
            pipe: the pipeline.
            call: its own call.
            args: of the call.
            kwargs: of the call.
        """
        if INSIDE.get():
            return call(*args, **kwargs)
        if not all(part._is_in(pipe) for part in self.parts):
            return self._run_as_ever(call, args, kwargs)
        token = INSIDE.set(True)
        try:
            setting = self.setting_of(pipe, call, args, kwargs)
            found = self._look_up_all(setting)
            known = found[0][1]
            if all(k.refused is not None or k.unused for _, k in found):
                return self._run_as_ever(call, args, kwargs)
            if all(not k.runs and k.mask is None for _, k in found):
                self._say_new(setting)
                return self._record(pipe, call, args, kwargs, setting)
            self.plan_all(setting)
            for part, k in found:
                if k.findings is not None and k.trials:
                    part._conclude(k)
            known.calls += 1
            if all(k.variants is None or k.refused is not None for _, k in found):
                return self._run_as_ever(call, args, kwargs)
            if self.every and known.calls % self.every == 0:
                return self._record(pipe, call, args, kwargs, setting)
            return self._run(call, args, kwargs, setting)
        finally:
            INSIDE.reset(token)

    def _run_as_ever(self, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Make a call by the original denoisers; the plan of another setting is not for it."""
        with contextlib.ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(part.model.standing_aside())
            return call(*args, **kwargs)

    @property
    def parts(self) -> list[Session]:
        """Of all denoisers of the pipeline, this one first."""
        return [self, *self.others]

    def setting_of(self, pipe: Any, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Setting:
        """The setting of a call of the pipeline."""
        return setting_of(pipe, call, args, kwargs, [part.model.original for part in self.parts])

    def _look_up_all(self, setting: Setting) -> list[tuple[Session, Known]]:
        return [(part, part._look_up(setting)) for part in self.parts]

    def _say_new(self, setting: Setting) -> None:
        """One line for a setting that nothing is known of."""
        others = [other for other in self.settings if other != setting]
        level, what = (logging.WARNING if others else logging.INFO), unlike(others, setting)
        news = f" ({what})" if what else ""
        logger.log(
            level, "not seen before, so this call runs in full and is recorded; the next ones are fast: %s%s", setting, news
        )

    def _is_in(self, pipe: Any) -> bool:
        """Whether the pipeline still calls this model, and nothing moves its weights from call to call."""
        if self.component is None or self.model.training or accelerated_in(pipe, self.component) is not self.model:
            return False  # another denoiser was put in its place
        obstacle = obstacle_to(self.model, self.component)
        if obstacle is not None:
            self._say(obstacle)
        return obstacle is None

    def _say(self, message: str) -> None:
        """Warn, once."""
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, stacklevel=6)

    def _look_up(self, setting: Setting) -> Known:
        with self._lock:
            known = self.settings.setdefault(setting, Known())
            self.settings.move_to_end(setting)
            while len(self.settings) > MOST_SETTINGS:
                _, old = self.settings.popitem(last=False)
                if old.variants in self._relatives:
                    self._relatives.remove(old.variants)
            return known

    def record(
        self, pipe: Any, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Setting, str | None]:
        """Make a call in full, to learn from it; the setting, and why nothing was recorded, if so."""
        token = INSIDE.set(True)
        try:
            setting = self.setting_of(pipe, call, args, kwargs)
            self._record(pipe, call, args, kwargs, setting, fits=False)
        finally:
            INSIDE.reset(token)
        return setting, next((k.refused for _, k in self._look_up_all(setting) if k.refused is not None), None)

    def _record(
        self,
        pipe: Any,
        call: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        setting: Setting,
        *,
        fits: bool = True,
    ) -> Any:
        """Make a call in full, and keep what its denoisers did."""
        found = self._look_up_all(setting)
        components = [part.component for part in self.parts]
        room = self._room(found[0][1]) // len(found)
        began = time.perf_counter()
        result, runs = record_in_passing(pipe, call, args, kwargs, components=components, max_bytes=room)
        found[0][1].full.append(time.perf_counter() - began)
        for (part, known), run in zip(found, runs, strict=True):
            with part._lock:
                part._take(known, setting, run)
        known = found[0][1]
        if fits and len(known.runs) > 1:
            with self._lock:
                self._fit_again(known, found)
        if self.background:
            self._start_worker()
        return result

    def _take(self, known: Known, setting: Setting, run: Sampler | str | None) -> None:
        """Keep what was recorded of this denoiser."""
        self._recorded += 1
        known.unused = run is None
        if isinstance(run, str):
            if not known.runs and run != INTERRUPTED:
                self._refuse(known, setting, run)
        elif run is not None:
            known.runs.append(run)
            self._forget_runs()

    def _forget_runs(self) -> None:
        """Recorded runs take memory: they are kept of the settings that were used last, and until there is a plan."""
        recorded = [known for known in self.settings.values() if known.runs]
        for known in recorded[:-MOST_RECORDED]:
            if known.mask is not None:
                known.runs.clear()

    def _room(self, known: Known) -> int:
        """Bytes that a recorded run may hold."""
        if self._max_bytes is not None:
            return self._max_bytes // KEPT_RUNS if known.runs else self._max_bytes
        return free_bytes(execution_device(self.model) or module_device(self.model.original)) // SHARE

    def _run(self, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], setting: Setting) -> Any:
        """Make a call with the plans of its setting."""
        planned = [(part, known, v) for part, known in self._look_up_all(setting) if (v := known.variants) is not None]
        for part, known, variants in planned:
            part._notice_drift(setting, known)
            if part._latest is not known:
                part.model.adopt(variants, known.facts)
                part._latest = known
        graphs = count_graphs(planned)
        began = time.perf_counter()
        with contextlib.ExitStack() as stack:
            for part in self.parts:
                if all(part is not own for own, _, _ in planned):
                    stack.enter_context(part.model.standing_aside())
            generations = [stack.enter_context(part.model.generation_of(v, predicts=False)) for part, _, v in planned]
            result = call(*args, **kwargs)
        seconds = time.perf_counter() - began
        settled = count_graphs(planned) == graphs
        for (part, known, variants), generation in zip(planned, generations, strict=True):
            with part._lock:
                part._accelerated += bool(generation.matched)
                if variants.findings is not None:
                    known.trials += 1
                elif settled and generation.matched and part is planned[0][0]:
                    known.fast.append(seconds)
        return result

    def _notice_drift(self, setting: Setting, known: Known) -> None:
        """Look at what the last run's checks said, if that has arrived on the host."""
        drift = drift_of(known, self._history.runs[-1] if self._history.runs else None)
        if drift is not None:
            self._say(f"the last {DRIFTING} images at {setting} {drift}")

    # Plans

    def plan_all(self, setting: Setting) -> None:
        """Make the plans of a setting, of all denoisers together."""
        found = [(part, known) for part, known in self._look_up_all(setting) if not known.unused]
        waiting = [(part, known) for part, known in found if known.mask is None and known.runs and known.refused is None]
        if len(found) > 1 and waiting:
            try:
                fit_together(waiting, self.outcome)
            except Exception as error:  # whatever it is, the user's image must not fail for it
                logger.debug("no plans could be made", exc_info=True)
                reason = str(error) if isinstance(error, FxmaskError) else f"no plan could be made: {named(error)}"
                for part, known in waiting:
                    part._refuse(known, setting, reason)
        for part, known in found:
            part.plan(setting, known)

    def plan(self, setting: Setting, known: Known) -> None:
        """Make the plan of a setting from what was recorded of it."""
        with self._lock:
            if known.variants is not None or known.refused is not None or (known.mask is None and not known.runs):
                return
            try:
                with onloaded(self.model):
                    if known.mask is None:
                        self._fit(known)
                    self._use(known)
            except FxmaskError as error:
                self._refuse(known, setting, str(error))
            except Exception as error:  # whatever it is, the user's image must not fail for it
                logger.debug("no plan could be made", exc_info=True)
                self._refuse(known, setting, f"no plan could be made of the recorded run: {named(error)}")

    def given_roles(self) -> dict[str, str]:
        """Roles that a later capture must be told."""
        return given_roles(self.program) if self.program is not None else {}

    def captured(self, run: PipelineTrajectory | Any) -> Program:
        """The program of this denoiser, captured now if it is the first run."""
        if self.program is None:
            with self._spending("capturing"), onloaded(self.model):
                self.program = capture(run.denoiser, run.calls[0][0], roles=run.roles)
        return self.program

    def _fit(self, known: Known) -> None:
        run: Any = known.runs[-1]
        program, outcome = self.captured(run), self._own_outcome(known)
        with self._spending("learning"):
            learner = learner_of(list(known.runs), program)
            if isinstance(learner, PartsLearner):
                self.keep(
                    known,
                    program,
                    learner,
                    learner.best(outcome, formed_share(program), keeper(program, run, self.limits)),
                )
                return
            keeps = keeper(program, run, self.limits)
            reuses = reuses_of(program, outcome) if run.stochastic else []
            errors = ReuseErrors(learner, known.squares, fresh=True) if known.squares else None
            plan = best_plan(learner, outcome, formed_share(program), reuses, errors, keeps)
            self.keep(known, program, learner, plan)
            known.trial = None
            if reuses and not known.trials and isinstance(plan, InstantPlan):
                found = trial_of(program, learner, plan, reuses)
                kept = found is not None and self.limits.keeps(rectify(program, found[0]))
                known.trial = found if kept else None

    def keep(
        self, known: Known, program: Program, learner: InstantLearner | PartsLearner, plan: InstantPlan | ReusePlan
    ) -> None:
        """Take a plan for a setting."""
        run, known.plan = known.runs[-1], plan
        known.facts = sampler_facts(run) or {}
        known.mask = plan.mask(program, run, known.facts or None)
        known.checks = checks_of(learner, plan, self.outcome.max_error)

    def _conclude(self, known: Known) -> None:
        """End a trial: whichever did better on the full steps of the last call is used from now on."""
        with self._lock:
            findings = known.findings
            if findings is None or (not findings.squares and known.trials < MOST_TRIALS):
                return
            previous = findings.trial.previous
            known.squares = {
                name: {(step, previous[step]): square for step, square in found.items()}
                for name, found in findings.read().items()
            }
            known.findings = known.trial = None
            with onloaded(self.model):
                try:
                    self._fit(known)
                except FxmaskError:
                    logger.debug("the plan stays as it is", exc_info=True)
                self._use(known)

    def _use(self, known: Known) -> None:
        """Put the mask of a setting to use, beside those of others; the call of a trial is not worth compiling for."""
        program, mask = self.program, known.mask
        assert program is not None
        assert mask is not None
        offloaded = hook_of(self.model) is not None
        # Recordings of CUDA graphs are for weights that stay where they are.
        backend, mode = "inductor" if offloaded and self.backend == "auto" else self.backend, self.mode
        if known.trial is not None:
            (mask, trial), backend, mode = known.trial, "eager", None
            known.findings = Findings(trial)
        plan = rectify(program, mask)
        if known.variants in self._relatives:
            self._relatives.remove(known.variants)
        variants = Variants(
            program,
            plan,
            backend,
            mode,
            relatives=self._relatives,
            history=self._history,
            checks=known.checks,
            progress=self.progress,
            findings=known.findings,
        )
        if known.variants is not None:
            variants.inherit(known.variants)
        self._relatives.append(variants)
        known.variants = variants
        if self.model._fxmask.variants is None or self._latest is known:
            self.model.adopt(variants, known.facts)
            self._latest = known
        if not get_backend(backend).exact and self.compiles_aside and not offloaded:
            variants.compile_in_background(progress=self.progress)
        elif not get_backend(backend).exact:
            with self._spending("compiling"), torch.no_grad():
                variants.executor().compile_all(progress=self.progress)

    def _fit_again(self, known: Known, found: Sequence[tuple[Session, Known]]) -> None:
        """The plan of the recorded runs alone, with one more run: least squares in which older runs are forgotten."""
        if known.plan is None or known.effort != "instant":
            return
        try:
            if len(found) > 1:
                fit_together([(part, k) for part, k in found if k.runs], self.outcome)
            else:
                self._fit(known)
            for part, k in found:
                if k.mask is not None:
                    with onloaded(part.model):
                        part._use(k)
        except FxmaskError:
            logger.debug("the plan stays as it is", exc_info=True)

    def _refuse(self, known: Known, setting: Setting, reason: str) -> None:
        known.refused = reason
        known.runs.clear()
        self._say(f"not accelerated at {setting}: {reason}")

    @contextlib.contextmanager
    def _spending(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[what] += time.perf_counter() - began

    # Better plans

    def improve_setting(self, setting: Setting, effort: str, checkpoint: str | Path | None = None) -> str | None:
        """Learn on what was recorded of a setting, by further calls of the denoisers; why it is not accelerated, if so."""
        found = [(part, known) for part, known in self._look_up_all(setting) if not known.unused]
        refused = next((known.refused for _, known in found if known.refused is not None), None)
        for part, known in found:
            if effort == "instant" or known.mask is None or known.refused is not None:
                continue
            try:
                part._improve(known, effort, checkpoint=journal_in(checkpoint, part.component, setting))
            except FxmaskError as error:
                logger.warning("%s: the plan of recorded runs alone stays, since %s", setting, error)
        return refused

    def improve(self, effort: str = "quick", **options: Any) -> bool:
        """Learn on the recorded runs of the setting that was used last; see ``AcceleratedModel.improve``."""
        with self._lock:
            setting, known = next(reversed(self.settings.items()), (None, None))
            if setting is None or known is None or not known.runs:
                raise InputError("no run was recorded yet; call the pipeline first, its first call at each setting is recorded")
            if known.variants is None:
                self.plan(setting, known)
            if known.refused is not None:
                raise InputError(f"not accelerated at {setting}: {known.refused}")
        return self._improve(known, effort, **options)

    def _improve(self, known: Known, effort: str, **options: Any) -> bool:
        if effort == "instant":
            with self._lock, onloaded(self.model):
                self._fit(known)
                self._use(known)
            return True
        program, mask = self.program, known.mask
        assert program is not None
        assert mask is not None
        began = time.perf_counter()
        given = {"max_learning_bytes": self._max_bytes, "progress": self.progress, "backend": self.backend, **options}
        given["guarded"] = self.outcome.max_error is not None
        with onloaded(self.model):
            found, error, calls = better_mask(
                program, list(known.runs), mask, self._own_outcome(known), self.limits, effort=effort, **given
            )
        with self._lock, onloaded(self.model):
            self._seconds["learning"] += time.perf_counter() - began
            self._further_calls += calls
            if found is None:
                return False
            known.mask, known.effort = found, effort
            known.checks = checks_of_mask(known.runs, program, found, error, self.outcome.max_error)
            known.trial = known.findings = None
            self._use(known)
        return True

    def _own_outcome(self, known: Known) -> Outcome:
        """What this denoiser's plan is to meet: of several, each keeps to the share that it was given."""
        if not self.shared or known.variants is None:
            return self.outcome
        return Outcome(macs=min(1.0, 1 / known.variants.plan.mac_ratio))

    def _start_worker(self) -> None:
        if any(hook_of(part.model) is not None for part in self.parts):
            self._say(
                "weights of this pipeline are offloaded between calls: nothing is improved in the background; improve() works"
            )
            return
        with self._lock:
            if self._worker is None or not self._worker.is_alive():
                self._worker = threading.Thread(target=self._work, name="fxmask improve", daemon=True)
                self._worker.start()

    def _work(self) -> None:
        """Improve the plans of settings with several recorded runs, each once."""
        for known in list(self.settings.values()):
            if known.variants is None or known.refused is not None or known.effort != "instant" or len(known.runs) < 2:
                continue
            try:
                self._improve(known, "quick", progress=False)
            except Exception:  # in a thread of its own: nobody else would hear of it
                logger.warning("improving a plan in the background failed; the plan stays", exc_info=True)

    def note(self, facts: Mapping[str, Any]) -> None:
        """Keep facts about the plan that is in use."""
        if self._latest is not None:
            self._latest.facts = {**self._latest.facts, **facts}

    def account(self) -> Account:
        """What was spent and saved until now."""
        with self._lock:
            saved = [
                statistics.median(known.full) - statistics.median(known.fast)
                for known in self.settings.values()
                if known.full and known.fast
            ]
            return Account(
                images=self._accelerated,
                recorded=self._recorded,
                calls=self._further_calls,
                saved_per_image=statistics.fmean(saved) if saved else None,
                **self._seconds,
            )
