"""Why is a result wrong? Bisect it to a pass and to the smallest failing set of mask entries.

A masked program is right if it agrees with the reference interpreter. If it does not, loads are turned into computes as
long as the failure stays (Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input", 2002), and whoever
could be at fault is tried in a fixed order, each by means that do not rely on the others:

    rectify          its plan is compared with one that another planner makes of the same mask
    optional passes  each is switched off; without the one at fault the results agree
    specialize_step  its graphs are run one by one on the reference's own cached values
    backend          what is left if the same program agrees when it is run operator by operator
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxmask import reference
from fxmask.errors import InputError
from fxmask.ir.combine import coefficient_dtype
from fxmask.ir.forecast import Cache, Forecast, Slot
from fxmask.ir.mask import Mask
from fxmask.ir.outputs import flatten_output
from fxmask.ir.plan import Plan, StepPlan
from fxmask.ir.program import Program
from fxmask.passes import observer
from fxmask.passes import rectify as rectify_pass
from fxmask.passes import specialize as specialize_pass
from fxmask.passes.step_graph import StepGraph
from fxmask.runtime.model import AcceleratedModel
from fxmask.tools.diagnosis_runs import (
    Calls,
    Comparison,
    Failure,
    Runner,
    check_accelerated,
    checked_calls,
    run_eagerly,
    runners_of,
)
from fxmask.tools.naive_planner import plan_faults

__all__ = ["Diagnosis", "Failure", "diagnose", "run_eagerly"]

logger = logging.getLogger(__name__)
Entry = tuple[int, str]
SHOWN = 12  # faults and entries that are printed; more are counted


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with a masked program.

    Attributes:
        failure: the first wrong result with the mask as it was given.
        culprit: ``"rectify"``, an optional pass, ``"specialize_step"`` or ``"backend"``; ``None`` if it is none of them, so
            that the fault is in what runs the steps.
        plan_faults: what the plan gets wrong, in sentences, if ``rectify`` is to blame.
        step_faults: which step graphs are wrong, in sentences, if ``specialize_step`` is to blame.
        full_mask_fails: whether even a mask of ones fails, so that no mask entry is to blame.
        loads: with ``blends`` the smallest set of mask entries that was found to fail: (step, block) that load; every other
            entry computes.
        blends: (step, block) that compute and are blended with other values.
        mask: the mask with just these entries.
        reduced_failure: the first wrong result with that mask.
        passes: the passes that ran with that mask, with their effect on the number of nodes.
        lanes: how many calls a step has.
        tested: how the reproducer makes what was tested, as Python; empty for the eager run.
        tolerance: as it was given.
    """

    failure: Failure
    culprit: str | None
    plan_faults: tuple[str, ...]
    step_faults: tuple[str, ...]
    full_mask_fails: bool
    loads: tuple[Entry, ...]
    blends: tuple[Entry, ...]
    mask: Mask
    reduced_failure: Failure
    passes: tuple[observer.PassRecord, ...]
    lanes: int = 1
    tested: str = ""
    tolerance: float | None = None

    @property
    def step(self) -> int | None:
        """The first step that is wrong; ``None`` if the program raised before it began one."""
        return self.failure.step

    @property
    def lane(self) -> int:
        """Which of the step's calls is wrong."""
        return self.failure.lane

    @property
    def difference(self) -> float | None:
        """Largest absolute difference there; ``None`` if the program raised."""
        return self.failure.difference

    @property
    def error(self) -> Exception | None:
        """What the program raised."""
        return self.failure.error

    def reproducer(self) -> str:
        """A program that shows the failure, given the ``model`` and the ``calls``."""
        terms = dict(self.mask.forecast.terms) if self.mask.forecast else None
        options = ([f"run={self.tested}"] if self.tested else []) + (
            [f"tolerance={self.tolerance!r}"] if self.tolerance is not None else []
        )
        return "\n".join(
            [
                "import torch",
                "import fxmask",
                "",
                "# model = ...; calls = a trajectory, or per step a dict of arguments or a list of them, one per lane",
                *(["# run = ... the function that was tested"] if self.tested == "run" else []),
                "program = fxmask.capture(model, fxmask.reference.steps_of(calls)[0][0])",
                f"blocks = {list(self.mask.blocks)!r}",
                f"rows = torch.ones({self.mask.num_steps}, len(blocks), dtype=torch.bool)",
                f"for step, block in {list(self.loads)!r}:",
                "    rows[step, blocks.index(block)] = False",
                f"mask = fxmask.Mask(rows, {list(self.mask.timesteps)!r}, blocks, {terms!r})",
                f"print(fxmask.diagnose({', '.join(['program', 'mask', 'calls', *options])}))",
            ]
        )

    def __str__(self) -> str:
        lines = [
            f"The masked program {self.failure.describe(self.lanes)}",
            f"Culprit: {self._blame()}",
            *(f"  - {fault}" for fault in _shortened([*self.plan_faults, *self.step_faults])),
        ]
        if self.full_mask_fails:
            lines.append("Mask entries: none is to blame, the mask that computes everything fails, too")
        else:
            entries = [*(f"step {i} loads {b}" for i, b in self.loads), *(f"step {i} blends {b}" for i, b in self.blends)]
            lines += ["Smallest failing set of mask entries:", *(f"  - {entry}" for entry in _shortened(entries))]
            lines.append(f"  with these alone the program {self.reduced_failure.describe(self.lanes)}")
        lines += ["Passes that ran:", *_pass_lines(self.passes)]
        lines += ["Reproducer:", *("    " + line for line in self.reproducer().splitlines())]
        return "\n".join(lines)

    def _blame(self) -> str:
        if self.culprit == "rectify":
            return "rectify; its plan is not the mask's:"
        if self.culprit == "specialize_step":
            return "specialize_step; given the right cached values:"
        if self.culprit == "backend":
            return "backend; the same program agrees when it is run eagerly, or planned and compiled anew"
        if self.culprit:
            return f"{self.culprit}; the results agree when it is switched off"
        return "what runs the steps: the plan and the step graphs are right, and no optional pass makes a difference"


def diagnose(
    program: Program,
    mask: Mask,
    calls: Calls | Any,
    *,
    run: Runner | AcceleratedModel | None = None,
    tolerance: float | None = None,
) -> Diagnosis | None:
    """Compare a masked program with the reference, and find what is to blame where they differ.

    Args:
        program: the captured denoiser.
        mask: of the program.
        calls: a recorded trajectory, or T steps, each a dict of the denoiser's arguments or a list of them, one per lane.
        run: what to test: a function ``(program, mask, steps) -> results per step`` that takes and returns what
            ``fxmask.reference.run`` does, or a model that was accelerated with this mask. By default the specialised
            program, operator by operator.
        tolerance: largest difference that is no failure, relative to the largest value of the reference's output. By
            default 0 for the eager run, which must agree bit for bit, and room for rounding in the output's type for any
            other.

    Returns:
        ``None`` if the results agree, else what is wrong.

    Raises:
        InputError: there is no program or mask, the calls have another form than the program was captured with, or
            ``run`` does not fit.
        MaskError: the mask does not fit the program or the number of steps.
        CaptureError: the program was captured without weights.
    """
    steps = checked_calls(program, mask, calls)
    if mask.lanes:
        if run is not None:
            raise InputError(
                "a mask with lanes is compared operator by operator only; leave run out, or test a mask whose lanes are alike"
            )
        mask, steps = mask.by_call, [[call] for step in steps for call in step]
    accelerated: Any = run if getattr(type(run), "is_accelerated", False) else None
    if accelerated is not None:
        check_accelerated(accelerated, program, mask, steps)
    elif run is not None and not callable(run):
        raise InputError(f"run is a {type(run).__name__}; pass a function (program, mask, steps) or an accelerated model")
    comparison = Comparison(program, steps, 0.0 if run is None and tolerance is None else tolerance)
    given, anew = runners_of(run)
    first = comparison.failure(given, mask)
    if first is None:
        return None
    # Where the eager run fails, too, the backend is not to blame: go on without it, which is faster.
    eager = run is None or comparison.failure(run_eagerly, mask) is not None
    found = _bisected(comparison, mask, first, None if eager else anew, accelerated)
    found = dataclasses.replace(found, tested="" if eager else _code_of(accelerated), tolerance=tolerance)
    logger.error("%s", found)
    return found


def _bisected(comparison: Comparison, mask: Mask, first: Failure, other: Runner | None, accelerated: Any) -> Diagnosis:
    """What is to blame for a failure of a mask, where ``other`` is tested or, without it, the eager run."""
    tried = other or run_eagerly
    entries = _minimise(_entries(mask), lambda kept: comparison.failure(tried, _with_entries(mask, kept)) is not None)
    reduced = _with_entries(mask, entries)
    with observer.observe() as records:
        last = comparison.failure(tried, reduced)
    faults = _faults_of_plan(comparison.program, mask, reduced, accelerated.plan if accelerated is not None else None)
    culprit = "rectify" if faults else None
    if culprit is None and last is not None:
        culprit = _optional_culprit(comparison, tried, reduced)
    step_faults = [] if culprit else _faults_of_steps(comparison, reduced)
    return Diagnosis(
        failure=first,
        culprit=culprit or ("specialize_step" if step_faults else "backend" if other else None),
        plan_faults=faults,
        step_faults=tuple(step_faults),
        full_mask_fails=not entries or comparison.failure(tried, _with_entries(mask, [])) is not None,
        loads=tuple((i, b) for i, b in entries if not reduced.compute[i, mask.blocks.index(b)]),
        blends=tuple((i, b) for i, b in entries if reduced.blends(i, b)),
        mask=reduced,
        reduced_failure=last or first,
        passes=tuple(records),
        lanes=max(map(len, comparison.steps)),
    )


# Who is to blame


def _faults_of_plan(program: Program, mask: Mask, reduced: Mask, plan: Plan | None) -> tuple[str, ...]:
    """What the plan of the smallest failing mask gets wrong, or else that of the mask as it was given."""
    if plan is not None:
        faults = plan_faults(program, mask, plan)
        if faults:
            return faults
    for tried in (reduced, mask):
        try:
            faults = plan_faults(program, tried, rectify_pass.rectify(program, tried))
        except Exception as error:
            faults = (f"rectify raises {type(error).__name__}: {error}",)
        if faults:
            return faults
    return ()


def _optional_culprit(comparison: Comparison, run: Runner, mask: Mask) -> str | None:
    """The optional pass without which a failing mask agrees. Not ``rectify``: its off switch shares most of its code."""
    for name in observer.optional_passes():
        if name != "rectify":
            with observer.switched_off(name):
                if comparison.failure(run, mask) is None:
                    return name
    return None


def _faults_of_steps(comparison: Comparison, mask: Mask) -> list[str]:
    """Steps whose graph differs from the reference although it is given the reference's cached values."""
    program = comparison.program
    plan = rectify_pass.rectify(program, mask)
    users: dict[Any, list[int]] = {}
    for i, planned in enumerate(plan.steps):
        users.setdefault(planned.key, []).append(i)
    graphs: dict[Any, StepGraph] = {}
    caches: dict[int, Cache] = {}
    faults: list[str] = []
    with observer.switched_off(*[name for name in observer.optional_passes() if name != "rectify"]), torch.no_grad():
        for i, step in enumerate(comparison.steps):
            key = plan.steps[i].key
            for k, call in enumerate(step):
                output = reference.run_step(program, mask, i, call, caches.setdefault(k, {}))
                where = f"the graph of step {i}" + (f", lane {k}," if len(step) > 1 else "")
                try:
                    if key not in graphs:
                        graphs[key] = specialize_pass.specialize_step(program, plan, users[key])
                    tensors = list(program.signature.bind((), call).tensors.values())
                    results = _run_graph(program, graphs[key], plan.steps[i], tensors, caches[k])
                except Exception as error:
                    faults.append(f"{where} raises {type(error).__name__}: {error}")
                    continue
                expected = {f"output {n}": x for n, x in enumerate(flatten_output(output)[0])}
                stored = [(f"the value that it stores of {b}[{v}]", caches[k].get(Slot(b, v, i))) for b, v in graphs[key].store]
                for (what, wanted), got in zip([*expected.items(), *stored], results, strict=False):
                    found = comparison.differ([got], [wanted], i, k) if wanted is not None else None
                    if found:
                        faults.append(f"{where} gets {what} wrong: {found.size}")
    return faults


def _run_graph(
    program: Program, graph: StepGraph, planned: StepPlan, tensors: Sequence[torch.Tensor], cache: Cache
) -> list[torch.Tensor]:
    """What one step graph returns, operator by operator; it takes no precomputed values."""
    coefficients = []
    for load in (planned.formed[k] for k in graph.coefficients):
        like = program.node(program.block(load.block).values[load.value]).meta["val"]
        terms = [c for _, c in load.terms]
        coefficients.append(torch.tensor(terms, dtype=coefficient_dtype(like.dtype), device=like.device))
    stored = [cache[slot] for load in planned.formed for slot in load.slots]
    return list(graph.graph_module(*[tensors[k] for k in graph.inputs], *coefficients, *stored))


# The smallest failing mask


def _entries(mask: Mask) -> list[Entry]:
    """What a mask does besides computing: loads and blends."""
    rows = mask.compute.tolist()
    cells = [(i, b, on) for i, row in enumerate(rows) for b, on in zip(mask.blocks, row, strict=True)]
    return [(i, b) for i, b, on in cells if not on or mask.blends(i, b)]


def _with_entries(mask: Mask, entries: Sequence[Entry]) -> Mask:
    """The mask with only these loads and blends; everything else is computed, and its forecasts go."""
    compute = torch.ones_like(mask.compute)
    for step, block in entries:
        column = mask.blocks.index(block)
        compute[step, column] = mask.compute[step, column]
    terms = {k: v for k, v in mask.forecast.terms.items() if k in set(entries)} if mask.forecast else {}
    return Mask(compute, mask.timesteps, mask.blocks, Forecast(terms) if terms else None, mask.fingerprint)


def _minimise(entries: list[Entry], fails: Callable[[list[Entry]], bool]) -> list[Entry]:
    """Delta debugging: a subset that fails, of which no chunk can be left out."""
    if not fails(entries):
        return entries
    if fails([]):
        return []
    pieces = 2
    while len(entries) >= 2:
        size = -(-len(entries) // pieces)
        chunks = [entries[i : i + size] for i in range(0, len(entries), size)]
        for chunk in chunks:
            rest = [entry for entry in entries if entry not in chunk]
            if fails(rest):
                entries, pieces = rest, max(2, pieces - 1)
                break
        else:
            if pieces >= len(entries):
                break
            pieces = min(len(entries), 2 * pieces)
    return entries


# Printing


def _code_of(accelerated: Any) -> str:
    """How a reproducer makes what was tested."""
    if accelerated is None:
        return "run"
    backend, mode = accelerated.how_compiled
    return f"fxmask.compile(program, fxmask.rectify(program, mask), backend={backend!r}, mode={mode!r})"


def _shortened(lines: Sequence[str]) -> list[str]:
    more = len(lines) - SHOWN
    return [*lines[:SHOWN], *([f"and {more} more"] if more > 0 else [])]


def _pass_lines(records: Sequence[observer.PassRecord]) -> list[str]:
    """One line per pass: how often it ran, and what it left of the nodes."""
    runs: dict[str, list[observer.PassRecord]] = {}
    for record in records:
        runs.setdefault(record.name, []).append(record)
    totals = {name: (sum(r.nodes_before for r in given), sum(r.nodes_after for r in given)) for name, given in runs.items()}
    return [f"  {name}: {len(runs[name])}x, {before} -> {after} nodes" for name, (before, after) in totals.items()]
