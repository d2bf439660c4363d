"""AcceleratedModel: a drop-in for the denoiser that knows which step, which lane, which graph and which caches.

State belongs to a run, not to the module: a ``Generation`` holds caches; the current one is a context variable, so
threads, tasks and interleaved runs have their own. Within a generation each lane (recognised by its conditioning) has a
position in the plan's sequence of timesteps; a cache is only ever read at the position right after the one that was run.
Anything else runs every block and drops what was cached.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from fxmask._torch import COMPILED_CALL, MODULE_INTERNALS, is_transformed, share_state
from fxmask.backends.package import Package, Packages
from fxmask.backends.protocol import Compiler
from fxmask.errors import InputError, MaskError
from fxmask.frontend.capture import capture
from fxmask.guards.ambient import needs_gradients
from fxmask.ir.block import Block
from fxmask.ir.calls import RETURN_DICT, BoundCall, parts_of_batch
from fxmask.ir.mask import Mask
from fxmask.ir.plan import Plan
from fxmask.ir.program import Program
from fxmask.ir.rebind import Rebinder
from fxmask.passes.rectify import rectify
from fxmask.passes.step_graph import StepGraph
from fxmask.runtime.account import Improver
from fxmask.runtime.batched_lanes import Whole, holds_lanes, joined
from fxmask.runtime.checks import Checks
from fxmask.runtime.executor import Executor
from fxmask.runtime.export import compile_packages
from fxmask.runtime.generation import Generation, InferredGeneration
from fxmask.runtime.marks import LaneName, Marks
from fxmask.runtime.quality import MEASURED, Quality
from fxmask.runtime.report import Report
from fxmask.runtime.stand_in import stand_in
from fxmask.runtime.variants import Variants
from fxmask.storage.about import PLAN_FACTS, VERSIONS, base_model, plan_facts, versions
from fxmask.storage.card import Entry, write_card
from fxmask.storage.folders import check_destination
from fxmask.storage.packages import write_package
from fxmask.storage.plans import facts_to_data, save_mask

# Of the accelerated model itself, rather than of the original. Libraries that move weights wrap ``forward``.
OWN_STATE = MODULE_INTERNALS | {"training", "_fxmask", "forward", "_old_forward", "_hf_hook", COMPILED_CALL}

NOTHING = contextlib.nullcontext()


@dataclass
class _Private:
    """What an AcceleratedModel holds beside the original's submodules.

    Attributes:
        model: the denoiser.
        variants: the program of each form of call, and the plan.
        marks: the generations that are marked.
        lanes: the lane that is called.
        aside: whether the original answers in this context.
        caller: who calls in this context. Contexts outlive models, so this is all that they keep.
        inferred: by caller, a generation that is inferred where none is marked.
        bind: puts calls into the form of ``program.signature``.
        facts: about the sampler that the plan was made for.
        learner: makes plans from runs and better ones of more, if there is one.
    """

    model: torch.nn.Module
    variants: Variants | None
    marks: Marks[Generation]
    lanes: LaneName
    aside: contextvars.ContextVar[bool]
    caller: contextvars.ContextVar[_Caller | None]
    inferred: weakref.WeakKeyDictionary[_Caller, InferredGeneration]
    bind: Rebinder | None
    facts: dict[str, Any] = field(default_factory=dict)
    learner: Improver | None = None

    @property
    def planned(self) -> Variants:
        """Of the plan that was used last.

        Raises:
            InputError: there is no plan yet.
        """
        if self.variants is None:
            raise InputError(
                f"this {type(self.model).__name__} has no plan yet: the first call of its pipeline runs in full and is "
                "recorded, and the second makes a plan of it. Call the pipeline twice"
            )
        return self.variants


class _Caller:
    """A thread, or a task in it, in one context."""

    def __init__(self, who: tuple[int, int | None]) -> None:
        self.who = who


class AcceleratedModel(torch.nn.Module):
    """The denoiser with a plan. Called like the original, and returns what the original returns.

    Attributes (``config``, ``dtype``, ``device``, ...), ``state_dict``, ``to`` and ``save_pretrained`` are the
    original's; ``isinstance`` with the original's class holds, so pipelines treat it as the original. In training mode
    the original runs. Gradients are not recorded.

    Args:
        program: the captured denoiser.
        plan: of this program, from ``fxmask.rectify``.
        backend: see ``fxmask.compile``.
        mode: of the backend, see ``fxmask.compile``.
        compiler: of the backend for this form of call, if it comes from a package; others are compiled with Inductor then.
        facts: about the sampler that the plan was made for; ``save`` writes them.
        checks: of the plan's full steps, for ``report``.
        progress: show a bar while step graphs compile at their first call.
    """

    is_accelerated: ClassVar[bool] = True  # what an instance says of its class is the original's

    def __new__(cls, program: Program, *_: Any, **__: Any) -> AcceleratedModel:
        """An instance of a class that compares equal to the original's."""
        made: AcceleratedModel = super().__new__(stand_in(cls, type(program.model)))
        return made

    def __init__(
        self,
        program: Program,
        plan: Plan,
        backend: str = "auto",
        mode: str | None = None,
        *,
        compiler: Compiler | None = None,
        facts: Mapping[str, Any] | None = None,
        checks: Checks | None = None,
        progress: bool = False,
    ) -> None:
        super().__init__()
        if plan.fingerprint != program.fingerprint:
            raise MaskError(
                f"the plan was made for a program with fingerprint {plan.fingerprint}, this one has {program.fingerprint}"
            )
        model = program.model
        self._stand_in_for(model)
        self.adopt(Variants(program, plan, backend, mode, compiler, checks=checks, progress=progress), facts)

    @classmethod
    def without_plan(cls, model: torch.nn.Module) -> AcceleratedModel:
        """A model that is the original until it is given a plan, by ``adopt``."""
        made: AcceleratedModel = object.__new__(stand_in(cls, type(model)))
        torch.nn.Module.__init__(made)
        made._stand_in_for(model)
        return made

    def _stand_in_for(self, model: torch.nn.Module) -> None:
        private = _Private(
            model=model,
            variants=None,
            marks=Marks(),
            lanes=LaneName(),
            aside=contextvars.ContextVar("fxmask_aside", default=False),
            caller=contextvars.ContextVar("fxmask_caller", default=None),
            inferred=weakref.WeakKeyDictionary(),
            bind=None,
        )
        # The original's own dictionaries: parameters, submodules and what is later done to them stay one and the same.
        share_state(self, model)
        self.__dict__.update(_fxmask=private, training=model.training, __module__=type(model).__module__)

    def adopt(self, variants: Variants, facts: Mapping[str, Any] | None = None) -> None:
        """Use a plan from now on, where no generation is marked that uses another one.

        Args:
            variants: the programs of this model, and the plan.
            facts: about the sampler that the plan was made for.
        """
        private = self._fxmask
        private.variants, private.bind, private.facts = variants, Rebinder(variants.program.signature), dict(facts or {})
        private.inferred.clear()  # their lanes go on with the plan before

    def note(self, **facts: Any) -> None:
        """Keep facts about the present plan, plain data: ``save`` writes them."""
        self._fxmask.facts.update(facts)
        if self._fxmask.learner is not None:
            self._fxmask.learner.note(facts)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The original's class: pipelines check types, and record the class in their config."""
        return type(self.__dict__["_fxmask"].model) if "_fxmask" in self.__dict__ else AcceleratedModel

    @property
    def _fxmask(self) -> _Private:
        private: _Private = self.__dict__["_fxmask"]
        return private

    # What it is made of

    @property
    def original(self) -> torch.nn.Module:
        """The denoiser that was accelerated."""
        return self._fxmask.model

    @property
    def has_plan(self) -> bool:
        """Whether there is a plan; in a pipeline the second call at a setting makes one."""
        return self._fxmask.variants is not None

    @property
    def program(self) -> Program:
        """The captured denoiser."""
        return self._fxmask.planned.program

    @property
    def plan(self) -> Plan:
        """What each step computes, loads and stores."""
        return self._fxmask.planned.plan

    @property
    def mask(self) -> Mask:
        """The rectified mask, bool ``[T, B]`` or ``[T, L, B]``."""
        return self.plan.mask

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The program's blocks."""
        return self.program.blocks

    @property
    def executor(self) -> Executor:
        """What runs the steps at the captured form of call: graphs, caches, prologues. For tools that look inside."""
        return self._fxmask.planned.executor()

    @property
    def programs(self) -> tuple[Program, ...]:
        """The denoiser as it was captured for each form of call (shapes, types) that was seen."""
        return tuple(variant.program for variant in self._fxmask.planned.known)

    @property
    def how_compiled(self) -> tuple[str, str | None]:
        """Backend and mode for forms of call that are captured now; those of a package are compiled with Inductor."""
        return self._fxmask.planned.elsewhere

    @property
    def step_graphs(self) -> tuple[StepGraph, ...]:
        """The distinct graphs that really run, in the order of the plan's ``graph`` indices."""
        executor = self.executor
        return tuple(executor.graphs.get(executor.plan, i)[0] for _, i in sorted(self.plan.first_steps.items()))

    def explain(self, step: int) -> str:
        """What a step of the plan does with every block, and why; see ``Plan.explain``."""
        return self.plan.explain(step, self.program)

    # Running

    def generation(self) -> Generation:
        """Mark one run of the sampling loop: ``with accelerated.generation(): ...``.

        Without it a run is recognised from the sequence of timesteps, and whatever is ambiguous runs in full. The one
        thing that no sequence can tell: a run that was abandoned and is taken up by another run, with the same
        conditioning, at the very next timestep.

        Threads and asyncio tasks have their own. Generators do not: of two that are advanced in turn, each inside of its own
        ``generation()``, a call belongs to the one that is running.
        """
        return self.generation_of(self._fxmask.planned)

    def generation_of(self, variants: Variants, *, predicts: bool = True) -> Generation:
        """The same with one of several plans.

        Args:
            variants: the programs of this model, and the plan.
            predicts: whether the caller vouches for the sequence of timesteps; see ``Clock``.
        """
        return Generation(variants, self._fxmask.marks, self._fxmask.lanes, predicts=predicts)

    @contextlib.contextmanager
    def cache_context(self, name: str, **options: Any) -> Iterator[None]:
        """Say which of several calls within a step is made inside, as diffusers' pipelines do: ``"cond"``, ``"uncond"``.

        Without it lanes are told apart by their conditioning.

        Args:
            name: of the lane.
            options: passed on to the original, whose own hooks may ask for them.
        """
        own = getattr(self._fxmask.model, "cache_context", None)
        with self._fxmask.lanes.called(name), NOTHING if own is None else own(name, **options):
            yield

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the denoiser; arguments and return value are the original's."""
        if torch.compiler.is_dynamo_compiling():  # torch.compile around a pipeline, or around this: graphs are compiled already
            return _call_as_it_is(self, *args, **kwargs)
        private = self._fxmask
        if private.variants is None or private.bind is None or self._stands_aside:
            return private.model(*args, **kwargs)
        if vars(private.model).get("_cache_config") is not None:  # its hooks are in no graph
            private.variants.warn(
                "own cache",
                f"enable_cache() was called on {type(private.model).__name__}: that cache of diffusers' own is used, and no "
                "plan; call disable_cache() to go back to the plan",
            )
            return private.model(*args, **kwargs)
        if private.variants.background is not None and private.variants.is_waiting(private.bind(args, kwargs)):
            return private.model(*args, **kwargs)
        generation, recording = self._generation(), torch.is_grad_enabled()
        mask = generation.variants.plan.mask
        if mask.batched and private.lanes.whole is None and not is_transformed():  # whose values cannot be read
            whole = private.bind(args, kwargs)
            if holds_lanes(whole, generation.variants.program, len(mask.lanes)):
                return self._by_lanes(whole, mask, args, kwargs)
        with torch.no_grad() if recording else NOTHING:
            followed = generation.follow(args, kwargs, recording)
        if followed is not None:
            return followed[0]
        bound, variants = private.bind(args, kwargs), generation.variants
        if needs_gradients(bound.tensors):
            variants.warn(
                "gradients",
                "a gradient is taken through the denoiser, and a graph records none, so the original model runs, "
                "unaccelerated. Call it under torch.no_grad() where the gradient is not used",
            )
            variants.history.unplanned(variants.program.macs, original=True)
            return private.model(*args, **kwargs)
        with torch.no_grad():
            variant = generation.variant_in_use(bound) or variants.of(bound)
            outputs = None if variant is None else generation.run(variant, bound)
            if variant is None:
                generation.interrupt(bound)
                variants.history.unplanned(variants.program.macs, original=True)
            if variant is None or outputs is None:
                result = private.model(*args, **kwargs)
                variants.answered(bound)
                return result
            generation.remember(bound, args, kwargs)
            return variant.program.outputs(outputs, bound.arguments.get(RETURN_DICT))

    def _by_lanes(self, whole: BoundCall, mask: Mask, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """A call that holds all lanes of a mask, part by part."""
        shared = Whole(whole)
        outputs: dict[int, Any] = {}
        parts = parts_of_batch((tuple(args), dict(kwargs)), whole.sample, len(mask.lanes))
        for name, part in zip(mask.lanes, mask.part_of_lane, strict=True):
            some, named = parts[part]
            with self._fxmask.lanes.called(name, shared):
                outputs[part] = self.forward(*some, **named)
        return joined([outputs[part] for part in sorted(outputs)])

    @property
    def _stands_aside(self) -> bool:
        """Whether the original answers and nothing is said of it."""
        return bool(self._fxmask.model.training or self._fxmask.aside.get())

    @contextlib.contextmanager
    def standing_aside(self) -> Iterator[None]:
        """The original answers the calls inside."""
        aside = self._fxmask.aside
        before = aside.get()
        aside.set(True)
        try:
            yield
        finally:
            aside.set(before)

    def _generation(self) -> Generation:
        private = self._fxmask
        marked = private.marks.current()
        if marked is not None:
            return marked
        caller, who = private.caller.get(), _who()
        if caller is None or caller.who != who:  # a copied context is another run's
            caller = _Caller(who)
            private.caller.set(caller)
        inferred = private.inferred.get(caller)
        if inferred is None:
            inferred = private.inferred[caller] = InferredGeneration(private.planned, private.marks, private.lanes)
        elif inferred.calls >= max(2, self.mask.num_steps):
            inferred.start_again()
        return inferred

    def compile_all(self, *, progress: bool = True, background: bool = False) -> AcceleratedModel:
        """Compile every step graph now, for the captured shapes, instead of at its first call. Returns ``self``.

        Args:
            progress: show a bar.
            background: in a thread of its own. The original answers until that is over, and to the end of the run in which it
                is; the next run follows the plan.
        """
        if background:
            self._fxmask.planned.compile_in_background(progress=progress)
            return self
        with torch.no_grad():
            self.executor.compile_all(progress=progress)
        return self

    def report(self) -> Report:
        """What the plan saves, and what the latest runs did, as a table when printed; ``.to_dict()`` for programs."""
        private = self._fxmask
        account = None if private.learner is None else private.learner.account()
        planned = private.planned
        quality = Quality.of_facts(private.facts, self.plan.source)
        return Report.of(self.program, self.plan, planned.history.runs, planned.checks, account, quality)

    def improve(self, effort: str = "quick", **options: Any) -> bool:
        """Spend time on a better plan, and use it from the next run on if recorded runs that it was not made from say so.

        Args:
            effort: ``"instant"`` (fits again, with all runs that were recorded since), ``"quick"`` or ``"default"``.
            options: of ``fxmask.learn``, e.g. ``progress=False``.

        Returns:
            Whether the plan was replaced.

        Raises:
            InputError: the plan was given, or loaded without what it was learned from: nothing was recorded to learn from.
        """
        learner = self._fxmask.learner
        if learner is None:
            raise InputError(
                "there is nothing recorded to improve this plan with; accelerate the model or the pipeline with "
                "fxmask.accelerate(), which records"
            )
        return learner.improve(effort, **options)

    # Saving

    def save(self, folder: str | Path) -> None:
        """Save mask, forecasts and what they were made for; ``fxmask.load(folder, model)`` reads them. No weights.

        A README.md beside them says for people what the plan was learned on and what was measured, with its heat map.

        Raises:
            MaskError: the folder holds something else or cannot be written, or the captured call holds an argument that cannot
                be saved.
        """
        facts = {**self._facts(), "backend": self._fxmask.planned.backend, "mode": self._fxmask.planned.mode}
        save_mask(folder, self._source(), facts, self.program.example.arguments)
        write_card(Path(folder), [Entry("", self._source(), facts_to_data(facts), "mask.png")], model=facts["model"])

    def export(self, folder: str | Path, *, progress: bool = True) -> None:
        """Compile ahead of time: ``fxmask.load(folder, model)`` then neither captures nor compiles, nor needs a compiler.

        The folder holds AOTInductor packages of the step graphs and of the timestep's table, for the captured form of call
        (shapes, types), and the plan; it is a saved plan too. It holds no weights: these are the loading model's own, and
        must have the names, shapes and types of this one's. It fits this version of PyTorch and this kind of device and
        processor.

        Args:
            folder: its plan is replaced, other files in it stay. One without a plan and with something in it is refused.
            progress: show a progress bar.

        Raises:
            MaskError: the folder holds something else, the model's weights were replaced after it was captured, or the
                program holds something that cannot be stored.
            BackendError: there is no C++ compiler, or a step graph cannot be compiled ahead of time.
        """
        if self.program.assumptions is not None:
            place = self.program.assumptions.conditions[0].place
            raise MaskError(f"the model branches on the values of its arguments ({place}), and a package cannot ask for these")
        check_destination(folder)
        known = self._packages()
        closed = self._fxmask.planned.loaded and bool(known)
        compiler = compile_packages(self.program, self.plan, known, closed=closed, progress=progress)
        facts = {**self._facts(), "backend": "package", "mode": None}
        write_package(folder, self.program, self._source(), facts, compiler.packages)

    def _source(self) -> Mask:
        """The mask as it was given, for this program and no other."""
        return replace(self.plan.source, fingerprint=self.program.fingerprint)

    def _packages(self) -> Mapping[str, Package]:
        """What is compiled ahead of time already."""
        first = self._fxmask.planned.first
        return first.graphs.compiler.packages if first and isinstance(first.graphs.compiler, Packages) else {}

    def _facts(self) -> dict[str, Any]:
        """What the plan was made for."""
        facts = {**self._fxmask.facts, "model": type(self.original).__name__}
        if Quality.of_facts(facts, self.plan.source) is None:
            facts.pop(MEASURED, None)  # of another plan
        about = {PLAN_FACTS: plan_facts(self.plan, self.program.batch_size), VERSIONS: versions(), **base_model(self.original)}
        return {**facts, **about, "roles": given_roles(self.program), "start": self.plan.start}

    # Standing in for the original

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_fxmask" not in self.__dict__:
                raise
            return getattr(self._fxmask.model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set on the original, too: what a pipeline sets on its denoiser must reach the code that reads it."""
        if "_fxmask" in self.__dict__ and name not in OWN_STATE:
            setattr(self._fxmask.model, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if "_fxmask" in self.__dict__ and name not in OWN_STATE:
            delattr(self._fxmask.model, name)
        else:
            super().__delattr__(name)

    def __dir__(self) -> list[str]:
        """The original's names and ours."""
        own = [name for name in vars(AcceleratedModel) if not name.startswith("_")]
        return sorted({*dir(self.original), *own} - {"is_accelerated"})

    def train(self, mode: bool = True) -> AcceleratedModel:
        """Set the original's mode; in training mode the original runs."""
        self._fxmask.model.train(mode)
        self.training = mode
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The original's state dict."""
        return self._fxmask.model.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load into the original."""
        return self._fxmask.model.load_state_dict(state_dict, *args, **kwargs)

    def __repr__(self) -> str:
        if self._fxmask.variants is None:
            return f"AcceleratedModel({type(self.original).__name__}, no plan yet)"
        plan = self.plan
        return (
            f"AcceleratedModel({type(self.original).__name__}, {plan.mask.num_steps} steps, {plan.mac_ratio:.2f}x fewer MACs, "
            f"{plan.distinct_graphs} step graphs, backend={self._fxmask.planned.backend!r})"
        )

    def __reduce__(self) -> Any:
        if self._fxmask.variants is None:
            return AcceleratedModel.without_plan, (self.original,)
        program = self.program
        arguments = (self.original, program.example.arguments, given_roles(program), self.plan.source, self.plan.start)
        return _restore, (*arguments, *self._fxmask.planned.elsewhere, self._fxmask.facts)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        function, arguments = self.__reduce__()
        return function(*copy.deepcopy(arguments, memo))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _call_as_it_is(model: AcceleratedModel, *args: Any, **kwargs: Any) -> Any:
    return model.forward(*args, **kwargs)


def given_roles(program: Program) -> dict[str, str]:
    """Roles that a later capture must be told."""
    found = {name: role for name, role in program.roles.items() if role in ("conditioning", "step")}
    return {**found, **program.given_roles}


def _restore(
    model: torch.nn.Module,
    example: Mapping[str, Any],
    roles: Mapping[str, str],
    mask: Mask,
    start: int,
    backend: str,
    mode: str | None,
    facts: Mapping[str, Any],
) -> AcceleratedModel:
    """Capture and plan again, after unpickling or a deep copy."""
    program = capture(model, example, roles={name.split(".")[0]: role for name, role in roles.items()})
    return AcceleratedModel(program, rectify(program, mask, start=start), backend, mode, facts=facts)


def _who() -> tuple[int, int | None]:
    """The thread and the asyncio task that call. Servers copy contexts into worker threads, and tasks inherit them."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop
        task = None
    return threading.get_ident(), None if task is None else id(task)
