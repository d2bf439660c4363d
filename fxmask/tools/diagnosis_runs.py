"""Running a masked program in the ways that ``diagnose`` compares: checks of the input, runners, the first wrong result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxmask import reference
from fxmask.errors import InputError, MaskError
from fxmask.ir.combine import LOW_PRECISION
from fxmask.ir.forecast import INPUT, Cache, slot_of
from fxmask.ir.mask import Mask
from fxmask.ir.outputs import flatten_output
from fxmask.ir.program import Program
from fxmask.passes import rectify as rectify_pass
from fxmask.runtime.executor import Executor
from fxmask.runtime.graph_store import GraphStore
from fxmask.runtime.model import AcceleratedModel

Calls = Sequence[Mapping[str, Any] | Sequence[Mapping[str, Any]]]
Runner = Callable[[Program, Mask, Calls], Sequence[Any]]
Lanes = list[list[Mapping[str, Any]]]  # the calls of each step, one per lane
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4}  # relative; what a compiler's other order of operations may change
LOW_ROUNDING = 3e-2
TIMESTEP_ROUNDING = 4e-3


@dataclass(frozen=True)
class Failure:
    """The first way in which a run differs from the reference.

    Attributes:
        step: where; ``None`` if the run raised before it read the arguments of any step.
        lane: which of the step's calls.
        difference: largest absolute difference there; ``None`` if the run raised.
        relative: the same over the largest value of the reference's output.
        error: what the run raised.
        shapes: what was expected and what came, if a result has another shape or type.
    """

    step: int | None
    lane: int = 0
    difference: float | None = None
    relative: float | None = None
    error: Exception | None = field(default=None, compare=False)
    shapes: str | None = None

    def describe(self, lanes: int) -> str:
        """What happened, in a sentence without subject."""
        lane = f", lane {self.lane}" if lanes > 1 else ""
        if self.error is not None:
            where = "before its first step" if self.step is None else f"at step {self.step}{lane}"
            return f"raises {type(self.error).__name__} {where}: {self.error}"
        return f"is wrong at step {self.step}{lane}: its result {self.size}"

    @property
    def size(self) -> str:
        """How far a value is off."""
        if self.shapes:
            return f"is {self.shapes}"
        return f"differs from the reference by {self.difference:.3g}, which is {self.relative:.3g} of the largest value"


# What is asked for


def checked_calls(program: Program, mask: Mask, calls: Any) -> Lanes:
    """The calls of each step, one per lane, after a check of everything that is given.

    Raises:
        InputError: there is no program or mask, or calls do not have the form that the program was captured with.
        MaskError: the mask does not fit the program or the number of steps.
        CaptureError: the program was captured without weights.
    """
    if not isinstance(program, Program):
        raise InputError(f"program is a {type(program).__name__}; pass what fxmask.capture returned")
    if not isinstance(mask, Mask):
        raise InputError(f"mask is a {type(mask).__name__}; pass a fxmask.Mask")
    program.require_verified()
    check_mask(program, mask)
    steps = getattr(calls, "calls", calls)
    if isinstance(steps, (str, Mapping)) or not isinstance(steps, Sequence):
        raise InputError(
            f"calls is a {type(calls).__name__}; pass a recorded trajectory, or a sequence with one entry per step"
        )
    if len(steps) != mask.num_steps:
        raise MaskError(f"the mask has {mask.num_steps} steps, but {len(steps)} calls were given; one per step is needed")
    for i, step in enumerate(steps):
        if not isinstance(step, (Mapping, list, tuple)) or not step or not all(isinstance(x, (str, Mapping)) for x in step):
            raise InputError(
                f"step {i} is a {type(step).__name__}; each step is a dict of arguments or a list of them, per lane"
            )
    lanes = reference.steps_of(steps)
    for i, step in enumerate(lanes):
        wanted = [lane for at, lane in mask.order if at == i] if mask.lanes else step
        if len(step) != len(wanted):
            raise MaskError(f"step {i} makes {len(step)} calls, but the mask has {len(wanted)} lanes there; give one per lane")
        for k, call in enumerate(step):
            _check_form(program, call, f"step {i}" + (f", lane {k}" if len(step) > 1 else ""))
    return lanes


def check_mask(program: Program, mask: Mask) -> None:
    """Refuse a mask that has no meaning for a program. ``rectify`` checks the same, but it is what is being tested.

    Raises:
        MaskError: the mask names blocks or values that the program does not have, or was made for another program.
    """
    known = {block.name: block for block in (program.input_block, *program.all_blocks)}
    unknown = [name for name in mask.blocks if name not in known]
    if unknown:
        raise MaskError(f"the mask names blocks that the program does not have: {unknown[:5]}")
    if mask.fingerprint is not None and not program.fits(mask.fingerprint):
        raise MaskError(f"the mask was made for a program with fingerprint {mask.fingerprint}, this has {program.fingerprint}")
    cut = [value for name in (INPUT, *mask.blocks) for value in known[name].values]
    if len(set(cut)) < len(cut):
        raise MaskError("two blocks of the mask cut one value; list only one of them")
    calls = mask.by_call
    for (step, name), terms in (calls.forecast.terms if calls.forecast else {}).items():
        for source, _ in terms:
            for i, value in enumerate(known[name].values):
                slot = slot_of(source, name, i)
                if slot.block not in (INPUT, *mask.blocks) or slot.value >= len(known[slot.block].values):
                    raise MaskError(f"forecast of {name!r} at step {step} reads {slot.block!r}, which the mask does not have")
                ours, theirs = (program.node(n).meta["val"] for n in (value, known[slot.block].values[slot.value]))
                if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
                    raise MaskError(
                        f"forecast of {name!r} at step {step} reads {slot.block!r}, which has another shape or type"
                    )


def _check_form(program: Program, call: Mapping[str, Any], where: str) -> None:
    bound = program.signature.bind((), dict(call))
    if bound.key == program.example.key:
        return
    forms = [
        {name: f"{x.dtype}{list(x.shape)} on {x.device}" for name, x in given.tensors.items()}
        | {name: repr(x) for name, x in given.static}
        for given in (program.example, bound)
    ]
    name = next((n for n in {**forms[0], **forms[1]} if forms[0].get(n) != forms[1].get(n)), "an argument")
    raise InputError(
        f"{where} calls the denoiser with {name} = {forms[1].get(name)}, but the program was captured with "
        f"{forms[0].get(name)}; capture it with such a call"
    )


def check_accelerated(model: AcceleratedModel, program: Program, mask: Mask, steps: Lanes) -> None:
    """Refuse an accelerated model that was made for something else.

    Raises:
        InputError: of another model, of another mask, in training mode, or for other timesteps.
    """
    if model.original is not program.model or model.plan.fingerprint != program.fingerprint:
        raise InputError("run is an accelerated model of another program; pass run.program")
    if model.plan.source != mask:
        raise InputError("run was accelerated with another mask; pass run.plan.source")
    if model.plan.start:
        raise InputError(f"run has a plan that starts at step {model.plan.start}; only whole runs can be compared")
    if model.original.training:
        raise InputError("run is in training mode, in which the original model runs; call run.eval() first")
    for i, (step, wanted) in enumerate(zip(steps, mask.timesteps, strict=True)):
        for call in step:
            given = program.signature.bind((), dict(call)).timestep
            value = torch.as_tensor(given).flatten()[0].item() if isinstance(given, (int, float, torch.Tensor)) else wanted
            if abs(value - wanted) > TIMESTEP_ROUNDING * max(abs(wanted), 1e-3):
                raise InputError(f"step {i} is called at timestep {value:g}, the mask has {wanted:g} there")


# Runners


def run_eagerly(program: Program, mask: Mask, calls: Calls) -> list[Any]:
    """Outputs of the rectified, specialised program, operator by operator.

    Args:
        program: the captured denoiser.
        mask: of the program.
        calls: one per step, or a list of one per lane.

    Returns:
        The output tensors of each step; a list of them per lane where a step has several lanes.
    """
    executor = Executor(rectify_pass.rectify(program, mask), GraphStore(program, "eager"))
    caches: dict[int, Cache] = {}
    results: list[Any] = []
    with torch.no_grad():
        for i, step in enumerate(reference.steps_of(calls)):
            outputs = [
                executor.run_step(i, list(program.signature.bind((), call).tensors.values()), caches.setdefault(k, {}))
                for k, call in enumerate(step)
            ]
            results.append(outputs[0] if len(outputs) == 1 else outputs)
    return results


def run_accelerated(model: AcceleratedModel, calls: Calls) -> list[Any]:
    """Results of an accelerated model, in a generation of its own."""
    results: list[Any] = []
    with model.generation():
        for step in reference.steps_of(calls):
            outputs = [model(**call) for call in step]
            results.append(outputs[0] if len(outputs) == 1 else outputs)
    return results


def runners_of(run: Runner | AcceleratedModel | None) -> tuple[Runner, Runner]:
    """How to run what is tested: as it was given, and made anew, for other masks and with passes switched off."""
    if run is None:
        return run_eagerly, run_eagerly
    if not getattr(type(run), "is_accelerated", False):
        return run, run
    model: Any = run
    backend, mode = model.how_compiled

    def anew(program: Program, mask: Mask, calls: Calls) -> list[Any]:
        return run_accelerated(AcceleratedModel(program, rectify_pass.rectify(program, mask), backend, mode), calls)

    return lambda program, mask, calls: run_accelerated(model, calls), anew


# Comparison


class _WatchedCall(dict[str, Any]):
    """The arguments of one call, which tell when they are read: that is how far a run has come."""

    def __init__(self, call: Mapping[str, Any], at: tuple[int, int], latest: list[tuple[int, int]]) -> None:
        super().__init__(call)
        self._at, self._latest = at, latest

    def _tell(self) -> None:
        self._latest[:] = [self._at]

    def __getitem__(self, name: str) -> Any:
        self._tell()
        return super().__getitem__(name)

    def __iter__(self) -> Iterator[str]:  # with it ``f(**call)`` and ``dict(call)`` go through ``keys``, too
        self._tell()
        return super().__iter__()

    def items(self) -> Any:
        """Names and values."""
        self._tell()
        return super().items()


@dataclass(frozen=True)
class Comparison:
    """Runs over the same calls, compared with the reference.

    Attributes:
        program: the captured denoiser.
        steps: the calls of each step, one per lane.
        tolerance: relative to the largest value of the reference's output; ``None`` chooses by type.
    """

    program: Program
    steps: Lanes
    tolerance: float | None

    def failure(self, run: Runner, mask: Mask) -> Failure | None:
        """The first wrong result of a run, or what it raised.

        Raises:
            InputError: the reference itself cannot run, or the run does not return what it should.
        """
        expected = self.reference(mask)
        latest: list[tuple[int, int]] = []
        watched = [[_WatchedCall(call, (i, k), latest) for k, call in enumerate(step)] for i, step in enumerate(self.steps)]
        try:
            results = run(self.program, mask, [step[0] if len(step) == 1 else step for step in watched])
        except Exception as error:
            step, lane = latest[0] if latest else (None, 0)
            return Failure(step, lane, error=error)
        if len(results) != len(expected):
            raise InputError(f"run returned {len(results)} results for {len(expected)} steps; one per step is needed")
        for i, (result, wanted) in enumerate(zip(results, expected, strict=True)):
            lanes = [result] if len(wanted) == 1 else list(result)
            if len(lanes) != len(wanted):
                raise InputError(f"run returned {len(lanes)} results at step {i}, which has {len(wanted)} lanes")
            for k, (ours, theirs) in enumerate(zip(lanes, wanted, strict=True)):
                found = self.differ(flatten_output(ours)[0], theirs, i, k)
                if found:
                    return found
        return None

    def reference(self, mask: Mask) -> list[list[list[torch.Tensor]]]:
        """The reference's output tensors, per step and lane.

        Raises:
            InputError: the reference cannot run these calls.
        """
        caches: dict[int, Cache] = {}
        results = []
        for i, step in enumerate(self.steps):
            row = []
            for k, call in enumerate(step):
                try:
                    output = reference.run_step(self.program, mask, i, call, caches.setdefault(k, {}))
                except Exception as error:
                    raise InputError(f"the reference interpreter cannot run step {i}, lane {k}: {error!r}") from error
                row.append(flatten_output(output)[0])
            results.append(row)
        return results

    def differ(self, ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], step: int, lane: int) -> Failure | None:
        """In what the tensors of one call differ, if they do by more than the tolerance."""
        forms = [", ".join(f"{x.dtype}{list(x.shape)}" for x in given) for given in (ours, theirs)]
        if forms[0] != forms[1]:
            return Failure(step, lane, shapes=f"{forms[0]} instead of {forms[1]}")
        for a, b in zip(ours, theirs, strict=True):
            difference, largest = _distance(a, b)
            allowed = self._rounding(b.dtype) * largest
            if difference > allowed:
                return Failure(step, lane, difference, difference / largest if largest else float("inf"))
        return None

    def _rounding(self, dtype: torch.dtype) -> float:
        if self.tolerance is not None:
            return self.tolerance
        low = dtype in LOW_PRECISION or any(w.dtype in LOW_PRECISION for w in self.program.weights.values())
        return LOW_ROUNDING if low else ROUNDING.get(dtype, 0.0)


def _distance(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """Largest absolute difference, and largest finite value of ``b``. Equal infinities and two NaNs do not differ."""
    if not a.numel():
        return 0.0, 0.0
    a, b = a.to(b.device), b
    same = (a == b) | (a.isnan() & b.isnan())
    wide = torch.complex128 if b.is_complex() else torch.float64
    apart = (a.to(wide) - b.to(wide)).abs().nan_to_num(float("inf"), posinf=float("inf")).masked_fill(same, 0.0)
    return float(apart.max()), float(b.to(wide).abs().nan_to_num(0.0, posinf=0.0).max())
