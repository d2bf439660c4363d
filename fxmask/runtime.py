"""AcceleratedModel: a drop-in for the denoiser that knows which step, which lane, which graph and which caches.

State belongs to a run, not to the module: a ``Generation`` holds caches; the current one is a context variable, so
threads, tasks and interleaved runs have their own. Within a generation each lane (recognised by its conditioning) has a
position in the plan's sequence of timesteps; a cache is only ever read at the position right after the one that was run.
Anything else runs every block and drops what was cached.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import itertools
import logging
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fxmask.backends.compiler import Compiler
from fxmask.backends.package import Package, Packages
from fxmask.calls import RETURN_DICT, BoundCall
from fxmask.clock import Clock, version_of
from fxmask.errors import CaptureError, MaskError
from fxmask.executor import Cache, Executor, GraphStore, Row
from fxmask.mask import Mask, Plan
from fxmask.packaging import compile_packages, write_package
from fxmask.passes.rectify import rectify
from fxmask.program import Block, Program
from fxmask.report import Report
from fxmask.saving import save_mask
from fxmask.tracing import capture, recapture

logger = logging.getLogger(__name__)

# Largest relative difference between a recorded timestep and the same one in the precision that it arrives in.
TIMESTEP_ROUNDING = {torch.bfloat16: 4e-3, torch.float16: 5e-4}

# Without a marked generation, a lane that was not called for this many calls is taken for abandoned.
IDLE_CALLS = 64


class _Variant:
    """The program captured for one form of call (shapes, types, static arguments), and its executors by start step."""

    def __init__(
        self,
        program: Program,
        mask: Mask,
        backend: str,
        mode: str | None,
        plan: Plan | None = None,
        compiler: Compiler | None = None,
    ) -> None:
        self.program = program
        self.mask = mask
        self.key = program.example.key
        self._anchor = next(iter(program.weights.values()), None)
        self._place = self._anchor.device if self._anchor is not None else None
        self.graphs = GraphStore(program, backend, mode, compiler)
        self._executors: dict[int, Executor] = {}
        if plan is not None:
            self._executors[plan.start] = Executor(plan, self.graphs)

    def in_place(self) -> bool:
        """Whether the first weight is still on the device that it was captured on."""
        return self._anchor is None or self._anchor.device == self._place

    def executor(self, start: int) -> Executor:
        if start not in self._executors:
            self._executors[start] = Executor(rectify(self.program, self.mask, start), self.graphs)
        return self._executors[start]


@dataclass
class _Lane:
    """One sequence of calls with the same conditioning."""

    conditioning: tuple[torch.Tensor, ...]  # held, so that their memory cannot become another lane's
    versions: tuple[int, ...]
    variant: _Variant
    start: int = 0
    position: int | None = None  # the step that the next call is expected to be; None: no caches to go on from
    cache: Cache = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)  # what was computed when its run began
    seen: int = 0  # when it was last called, in calls of its generation
    latest: int | None = None  # the step of the latest call that the plan knows
    doubtful: bool = False  # calls came that could belong to two runs; full graphs until a clear start

    def forget(self) -> None:
        self.position = None
        self.cache = {}
        self.rows = []


class Generation:
    """One run of the sampling loop; caches live as long as it does.

    Use as a context manager around the calls of one run. It may be entered again, so that two runs can be interleaved
    step by step in one thread, each in its own generation.
    """

    def __init__(self, owner: AcceleratedModel, explicit: bool) -> None:
        self._owner = owner
        self._explicit = explicit
        self._lanes: list[_Lane] = []
        self._tokens: list[contextvars.Token[Generation | None]] = []
        self._clock = Clock()
        self._count = 0
        self.calls = 0
        self.matched = 0

    def __enter__(self) -> Generation:
        self._tokens.append(self._owner._fxmask.current.set(self))
        return self

    def __exit__(self, *exception: object) -> None:
        self._owner._fxmask.current.reset(self._tokens.pop())
        if exception[0] is None and not self._tokens:
            self._warn_if_useless()

    def run(self, variant: _Variant, bound: BoundCall) -> list[torch.Tensor] | None:
        """Run one call of the denoiser and move its lane forward; ``None`` if the original must run."""
        tensors = list(bound.tensors.values())
        lane, step = self._locate(self._siblings(variant, bound), bound)
        if step is None or step != lane.position:  # not a run in progress: its weights may have been replaced
            current = self._owner._variant(bound)
            if current is not variant:
                return None if current is None else self.run(current, bound)
        self._count += 1
        lane.seen = self._count
        self.calls += 1
        if step is None:
            lane.forget()
            return variant.executor(0).run_full(tensors)
        if step != lane.position:
            lane.start, lane.cache = step, {}
            lane.rows = variant.executor(step).begin(tensors)
        else:
            self.matched += 1
        # If the step raises, the position is not known to have been reached: the next call must not go on from it.
        lane.position = None
        outputs = variant.executor(lane.start).run_step(step, tensors, lane.cache, lane.rows)
        lane.position = step + 1
        return outputs

    def variant_in_use(self, bound: BoundCall) -> _Variant | None:
        """The variant that a run in progress uses for this form of call, if its weights are still where they were.

        Whether weights were replaced is looked up when a run starts, not at every step: that takes a walk over them.
        """
        for lane in self._lanes:
            running = lane.position is not None and 0 < lane.position < lane.variant.mask.num_steps
            if running and lane.variant.key == bound.key and lane.variant.in_place():
                return lane.variant
        return None

    def _siblings(self, variant: _Variant, bound: BoundCall) -> list[_Lane]:
        """The lanes with this call's conditioning (the same tensors, unchanged, or else equal ones), at least one."""
        roles = variant.program.roles
        given = tuple(x for name, x in bound.tensors.items() if roles.get(name) == "conditioning")
        lanes = [lane for lane in self._lanes if lane.variant is variant]
        for test in (_identical, _equal):
            same = [x for x in lanes if all(map(test, given, x.conditioning, x.versions))]
            if same:
                return same
        if not self._explicit:  # lanes of runs that ended or were abandoned hold memory for nothing
            self._lanes = [x for x in self._lanes if x.cache and self._count - x.seen <= IDLE_CALLS]
        lane = _Lane(given, tuple(version_of(x) for x in given), variant)
        self._lanes.append(lane)
        return [lane]

    def _locate(self, siblings: list[_Lane], bound: BoundCall) -> tuple[_Lane, int | None]:
        """The lane and the step of the plan that a call is; the step is ``None`` if it must run in full."""
        waiting = sorted(siblings, key=lambda x: x.seen)
        lane = waiting[0]
        mask = lane.variant.mask
        name = lane.variant.program.signature.timestep
        if name is None:  # nothing but the count tells steps apart
            position = lane.position if lane.position is not None else (0 if not lane.cache else None)
            return lane, position if self._explicit and position is not None and position < mask.num_steps else None
        timestep = bound.timestep
        rounding = TIMESTEP_ROUNDING.get(timestep.dtype, 1e-6) if isinstance(timestep, torch.Tensor) else 1e-6
        value = None if timestep is None else self._read_timestep(lane, timestep, rounding)
        matches = [] if value is None else [i for i, t in enumerate(mask.timesteps) if _close(t, value, rounding)]
        if not matches:
            return lane, None
        if self._explicit:
            lane = self._choose(waiting, matches)
        step = lane.position if lane.position in matches else matches[0]
        assert step is not None
        if not self._explicit:
            lane.doubtful = self._is_doubtful(lane, step)
        lane.latest = step
        return lane, None if lane.doubtful else step

    def _choose(self, waiting: list[_Lane], matches: list[int]) -> _Lane:
        """Of lanes with the same conditioning the one whose turn it is; a new one if all have just had theirs."""
        for lane in waiting:
            if lane.position in matches:
                return lane
        if all(lane.latest in matches and lane.position is not None for lane in waiting):
            first = waiting[0]
            self._lanes.append(_Lane(first.conditioning, first.versions, first.variant))
            return self._lanes[-1]
        return waiting[0]

    def _read_timestep(self, lane: _Lane, timestep: Any, rounding: float) -> float | None:
        """The timestep's value. Waits for the device only where a marked generation cannot predict it."""
        wrong = self._clock.wrong_prediction(rounding)
        if wrong is not None:
            for other in self._lanes:
                other.forget()
            raise RuntimeError(
                f"inside generation() a call was taken for timestep {wrong[0]:g}, but it was at {wrong[1]:g}; its result is "
                "wrong. Mark each run of the sampling loop with a generation() of its own, and follow the plan's timesteps"
            )
        expected = lane.position is not None and lane.position < lane.variant.mask.num_steps
        if self._explicit and expected and not self._clock.knows(timestep):
            value = lane.variant.mask.timesteps[lane.position or 0]
            self._clock.predict(timestep, value)
            return value
        return self._clock.read(timestep)

    def _is_doubtful(self, lane: _Lane, step: int) -> bool:
        """Whether a call could belong to one of two runs with the same conditioning.

        Two calls in a row at one step are an abandoned run and a new one, or two runs step by step, or two lanes that
        nothing tells apart; only ``generation()`` can say which. The doubt ends when the sequence goes back: a new run.
        """
        if lane.latest is None or step == lane.position:
            return False
        return step == lane.latest or (lane.doubtful and step > lane.latest)

    def _warn_if_useless(self) -> None:
        mask = self._owner.mask
        if self.calls > 1 and not self.matched and not bool(mask.compute.all()):
            warnings.warn(
                f"none of {self.calls} denoiser calls followed the plan, so nothing was accelerated: it is made for "
                f"{mask.num_steps} steps at timesteps {_abbreviate(mask.timesteps)}. Use the same scheduler and "
                "num_inference_steps as in accelerate(), and mark each run with `with accelerated.generation():`",
                stacklevel=3,
            )


def _identical(a: torch.Tensor, b: torch.Tensor, version: int) -> bool:
    return (
        version_of(b) == version != -1
        and a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
    )


def _equal(a: torch.Tensor, b: torch.Tensor, version: int) -> bool:
    return version_of(b) == version and torch.equal(a, b)


def _close(a: float, b: float, rounding: float) -> bool:
    return abs(a - b) <= rounding * max(abs(a), 1e-3)


def _abbreviate(values: tuple[float, ...]) -> str:
    shown = [f"{v:g}" for v in values]
    return "[" + ", ".join(shown if len(shown) <= 6 else [*shown[:3], "...", *shown[-2:]]) + "]"


@dataclass
class _Private:
    """What an AcceleratedModel holds beside the original's submodules."""

    model: torch.nn.Module
    program: Program
    plan: Plan
    backend: str
    mode: str | None
    variants: dict[tuple[Any, ...], _Variant]
    weights: tuple[Any, ...]
    # The marked generation, and one that is inferred where none is marked.
    current: contextvars.ContextVar[Generation | None]
    inferred: contextvars.ContextVar[tuple[Any, Generation] | None]
    lock: Any = field(default_factory=threading.RLock)
    refused: set[tuple[Any, ...]] = field(default_factory=set)
    facts: dict[str, Any] = field(default_factory=dict)  # about the sampler that the plan was made for
    loaded: bool = False  # from a package, which has graphs for one form of call
    warned: set[Any] = field(default_factory=set)

    @property
    def elsewhere(self) -> tuple[str, str | None]:
        """Backend and mode for other forms of call than the one that a package was made for."""
        return ("inductor", None) if self.loaded else (self.backend, self.mode)


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
    """

    def __init__(
        self,
        program: Program,
        plan: Plan,
        backend: str = "inductor",
        mode: str | None = None,
        compiler: Compiler | None = None,
    ) -> None:
        super().__init__()
        if plan.fingerprint != program.fingerprint:
            raise MaskError(
                f"the plan was made for a program with fingerprint {plan.fingerprint}, this one has {program.fingerprint}"
            )
        model = program.model
        variant = _Variant(program, plan.source, backend, mode, plan, compiler)
        private = _Private(
            model=model,
            program=program,
            plan=plan,
            backend=backend,
            mode=mode,
            variants={program.example.key: variant},
            weights=_weights_of(model),
            current=contextvars.ContextVar("fxmask_generation", default=None),
            inferred=contextvars.ContextVar("fxmask_inferred", default=None),
            loaded=compiler is not None,
        )
        # The original's own dictionaries: parameters, submodules and what is later done to them stay one and the same.
        shared = {name: model.__dict__[name] for name in ("_parameters", "_buffers", "_modules")}
        shared["_non_persistent_buffers_set"] = model.__dict__["_non_persistent_buffers_set"]
        self.__dict__.update(shared, _fxmask=private, training=model.training, __module__=type(model).__module__)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The original's class: pipelines check types, and record the class in their config."""
        return type(self.__dict__["_fxmask"].model) if "_fxmask" in self.__dict__ else AcceleratedModel

    @property
    def original(self) -> torch.nn.Module:
        """The denoiser that was accelerated."""
        return self._fxmask.model

    @property
    def program(self) -> Program:
        """The captured denoiser."""
        return self._fxmask.program

    @property
    def plan(self) -> Plan:
        """What each step computes, loads and stores."""
        return self._fxmask.plan

    @property
    def mask(self) -> Mask:
        """The rectified mask, bool ``[T, B]``."""
        return self._fxmask.plan.mask

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The program's blocks."""
        return self._fxmask.program.blocks

    @property
    def _fxmask(self) -> _Private:
        private: _Private = self.__dict__["_fxmask"]
        return private

    def generation(self) -> Generation:
        """Mark one run of the sampling loop: ``with accelerated.generation(): ...``.

        Without it a run is recognised from the sequence of timesteps, and whatever is ambiguous runs in full. The one
        thing that no sequence can tell: a run that was abandoned and is taken up by another run, with the same
        conditioning, at the very next timestep.
        """
        return Generation(self, explicit=True)

    def report(self) -> Report:
        """What the plan saves, as a table when printed; ``.to_dict()`` for programs."""
        return Report.of(self.program, self.plan)

    def save(self, folder: str | Path) -> None:
        """Save mask, forecasts and what they were made for; ``fxmask.load(folder, model)`` reads them. No weights.

        Raises:
            MaskError: the folder holds something else, or the captured call holds an argument that cannot be saved.
        """
        private = self._fxmask
        facts = {**self._facts(), "backend": private.backend, "mode": private.mode}
        save_mask(folder, self._source(), facts, private.program.example.arguments)

    def export(self, folder: str | Path, progress: bool = False) -> None:
        """Compile ahead of time: ``fxmask.load(folder, model)`` then neither captures nor compiles, nor needs a compiler.

        The folder holds AOTInductor packages of the step graphs and of the timestep's table, for the captured form of call
        (shapes, types), and the plan; it is a saved plan too. It holds no weights: these are the loading model's own, and
        must have the names, shapes and types of this one's. It fits this version of PyTorch and this kind of device and
        processor.

        Args:
            folder: is replaced if it holds a plan; any other folder with something in it is refused.
            progress: show a progress bar.

        Raises:
            MaskError: the folder holds something else, the model's weights were replaced after it was captured, or the
                program holds something that cannot be stored.
            BackendError: there is no C++ compiler, or a step graph cannot be compiled ahead of time.
        """
        private = self._fxmask
        known = self._packages()
        compiler = compile_packages(private.program, private.plan, known, private.loaded and bool(known), progress)
        facts = {**self._facts(), "backend": "package", "mode": None}
        write_package(folder, private.program, self._source(), facts, compiler.packages)

    def _source(self) -> Mask:
        """The mask as it was given, for this program and no other."""
        return replace(self._fxmask.plan.source, fingerprint=self._fxmask.program.fingerprint)

    def _packages(self) -> Mapping[str, Package]:
        """What is compiled ahead of time already."""
        private = self._fxmask
        variant = private.variants.get(private.program.example.key)
        return variant.graphs.compiler.packages if variant and isinstance(variant.graphs.compiler, Packages) else {}

    def _facts(self) -> dict[str, Any]:
        """What the plan was made for."""
        private = self._fxmask
        roles = {n: r for n, r in private.program.roles.items() if r in ("conditioning", "step")}
        return {**private.facts, "model": type(private.model).__name__, "roles": roles, "start": private.plan.start}

    def compile_all(self, progress: bool = False) -> AcceleratedModel:
        """Compile every step graph now, for the captured shapes, instead of at its first call. Returns ``self``."""
        with torch.no_grad():
            self._fxmask.variants[self.program.example.key].executor(self.plan.start).compile_all(progress)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the denoiser; arguments and return value are the original's."""
        private = self._fxmask
        if private.model.training:
            return private.model(*args, **kwargs)
        with torch.no_grad():
            bound = private.program.signature.bind(args, kwargs)
            generation = self._generation()
            variant = generation.variant_in_use(bound) or self._variant(bound)
            if variant is None:
                return private.model(*args, **kwargs)
            outputs = generation.run(variant, bound)
            if outputs is None:
                return private.model(*args, **kwargs)
            return variant.program.outputs(outputs, bound.arguments.get(RETURN_DICT))

    def _generation(self) -> Generation:
        marked = self._fxmask.current.get()
        if marked is not None:
            return marked
        owner, inferred = self._fxmask.inferred.get() or (None, None)
        if inferred is None or owner != _who():  # a copied context is another run's
            inferred = Generation(self, explicit=False)
            self._fxmask.inferred.set((_who(), inferred))
        elif inferred.calls >= max(2, self.mask.num_steps):
            inferred._warn_if_useless()
            inferred.calls = inferred.matched = 0
        return inferred

    def _variant(self, bound: BoundCall) -> _Variant | None:
        """The program for this form of call, captured now if it is new; ``None`` if it cannot be."""
        private = self._fxmask
        key = bound.key
        weights = _weights_of(private.model)
        sample = bound.tensors[private.program.signature.sample]
        if any(device != sample.device for _, _, device, _ in weights):
            # Offloading moves weights in hooks of the original's forward, which a graph does not call.
            self._warn_once("offloaded", "the weights are not where the sample is, so the original model runs, unaccelerated")
            return None
        if weights == private.weights and key in private.variants:
            return private.variants[key]
        with private.lock:
            if weights != private.weights:  # .half(), .to(), or modules replaced (LoRA): graphs hold the old ones
                private.variants.clear()
                private.refused.clear()
                private.weights = weights
            if key in private.refused:
                return None
            if key not in private.variants:
                if private.loaded:
                    self._warn_once(
                        "package",
                        f"{_difference(private.program.example, bound)}, so the model is captured and "
                        "compiled now; export a package from such a call",
                    )
                try:
                    program = recapture(private.program, _detached(bound))
                except CaptureError as error:
                    private.refused.add(key)
                    self._warn_once(key, f"this form of call runs unaccelerated, with the original model: {error}")
                    return None
                private.variants[key] = _Variant(program, private.plan.source, *private.elsewhere)
            return private.variants[key]

    def _warn_once(self, topic: Any, message: str) -> None:
        if topic not in self._fxmask.warned:
            self._fxmask.warned.add(topic)
            warnings.warn(message, stacklevel=5)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_fxmask" not in self.__dict__:
                raise
            return getattr(self._fxmask.model, name)

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
        plan = self.plan
        return (
            f"AcceleratedModel({type(self.original).__name__}, {plan.mask.num_steps} steps, {plan.mac_ratio:.2f}x fewer MACs, "
            f"{plan.distinct_graphs} step graphs, backend={self._fxmask.backend!r})"
        )

    def __reduce__(self) -> Any:
        private = self._fxmask
        roles = {n: r for n, r in private.program.roles.items() if r in ("conditioning", "step")}
        example = private.program.example.arguments
        return _restore, (private.model, example, roles, private.plan.source, private.plan.start, *private.elsewhere)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        function, arguments = self.__reduce__()
        return function(*copy.deepcopy(arguments, memo))


def _restore(
    model: torch.nn.Module,
    example: Mapping[str, Any],
    roles: Mapping[str, str],
    mask: Mask,
    start: int,
    backend: str,
    mode: str | None,
) -> AcceleratedModel:
    """Capture and plan again, after unpickling or a deep copy."""
    program = capture(model, example, {name.split(".")[0]: role for name, role in roles.items()})
    return AcceleratedModel(program, rectify(program, mask, start), backend, mode)


def _difference(old: BoundCall, new: BoundCall) -> str:
    """In what a call differs from the one that a package was made for."""
    forms = [{name: f"{x.dtype}{list(x.shape)} on {x.device}" for name, x in bound.tensors.items()} for bound in (old, new)]
    name = next((name for name in {**forms[0], **forms[1]} if forms[0].get(name) != forms[1].get(name)), None)
    if name is None:
        return "the model's weights were replaced, or a call has other arguments than the package was exported for"
    return f"the package was exported for {name} {forms[0].get(name)}, it is now {forms[1].get(name)}"


def _who() -> tuple[int, int | None]:
    """The thread and the asyncio task that call. Servers copy contexts into worker threads, and tasks inherit them."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop
        task = None
    return threading.get_ident(), None if task is None else id(task)


def _weights_of(model: torch.nn.Module) -> tuple[Any, ...]:
    """Identity, type, place and layout of every parameter and buffer: what a captured graph relies on."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return tuple((id(x), x.dtype, x.device, x.stride()) for x in tensors)


def _detached(bound: BoundCall) -> BoundCall:
    """A call that keeps no reference to the caller's tensors."""
    tensors = {name: x.detach().clone() for name, x in bound.tensors.items()}
    arguments = bound.rebuild(list(tensors.values()))
    return replace(bound, tensors=tensors, arguments=arguments)
