"""Why is a result wrong? Bisect it to a pass and to the smallest failing set of mask entries.

A masked program is right if it agrees with the reference interpreter. If it does not, each optimisation is switched off
in turn, and loads are turned into computes as long as the failure stays (Zeller and Hildebrandt, "Simplifying and
Isolating Failure-Inducing Input", 2002).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxmask import reference
from fxmask.calls import flatten_output
from fxmask.executor import Cache, Executor, GraphStore
from fxmask.mask import Forecast, Mask
from fxmask.passes import observer
from fxmask.passes.rectify import rectify
from fxmask.program import Program

logger = logging.getLogger(__name__)

Calls = Sequence[Mapping[str, Any]]
Runner = Callable[[Program, Mask, Calls], Sequence[Any]]
Entry = tuple[int, str]


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with a masked program.

    Attributes:
        step: the first step whose result differs from the reference.
        difference: largest absolute difference there.
        culprit: the optimisation without which the results agree; ``None`` if it is none of them.
        loads: the smallest set of (step, block) loads that was found to fail; every other entry computes.
        mask: the mask with just these loads.
        passes: the passes that ran, with their effect on the number of nodes.
    """

    step: int
    difference: float
    culprit: str | None
    loads: tuple[Entry, ...]
    mask: Mask
    passes: tuple[observer.PassRecord, ...]

    def reproducer(self) -> str:
        """A program that shows the failure, given the ``model`` and the ``calls``."""
        terms = dict(self.mask.forecast.terms) if self.mask.forecast else None
        return "\n".join(
            [
                "import torch",
                "import fxmask",
                "from fxmask.diagnosis import diagnose",
                "",
                "# model = ...; calls = [{...}, ...]  one dict of arguments per step",
                "program = fxmask.capture(model, calls[0])",
                f"blocks = {list(self.mask.blocks)!r}",
                f"rows = torch.ones({self.mask.num_steps}, len(blocks), dtype=torch.bool)",
                f"for step, block in {list(self.loads)!r}:",
                "    rows[step, blocks.index(block)] = False",
                f"mask = fxmask.Mask(rows, {list(self.mask.timesteps)!r}, blocks, {terms!r})",
                "print(diagnose(program, mask, calls))",
            ]
        )

    def __str__(self) -> str:
        lines = [
            f"results differ from the reference at step {self.step}, by {self.difference:.3g}",
            f"optimisation at fault: {self.culprit or 'none of ' + ', '.join(observer.OPTIONAL)}",
            f"smallest failing set of loads: {list(self.loads)}",
            *(f"  {r.name}: {r.nodes_before} -> {r.nodes_after} nodes" for r in self.passes),
            "reproducer:",
            *("    " + line for line in self.reproducer().splitlines()),
        ]
        return "\n".join(lines)


def run_eagerly(program: Program, mask: Mask, calls: Calls) -> list[list[torch.Tensor]]:
    """Outputs of the rectified, specialised program, per step."""
    executor = Executor(rectify(program, mask), GraphStore(program, "eager"))
    cache: Cache = {}
    results = []
    with torch.no_grad():
        for i, call in enumerate(calls):
            results.append(executor.run_step(i, list(program.signature.bind((), call).tensors.values()), cache))
    return results


def diagnose(program: Program, mask: Mask, calls: Calls, run: Runner = run_eagerly, tolerance: float = 0.0) -> Diagnosis | None:
    """Compare a masked program with the reference, and bisect what differs.

    Args:
        program: the captured denoiser.
        mask: of the program.
        calls: T dicts of arguments, in the shapes that the program was captured with.
        run: what to test; by default the specialised program, eagerly, which must agree bit for bit.
        tolerance: largest absolute difference that is no failure.

    Returns:
        ``None`` if the results agree, else what is wrong.
    """
    first = _difference(program, mask, calls, run, tolerance)
    if first is None:
        return None
    loads = [(i, b) for i, row in enumerate(mask.compute.tolist()) for b, on in zip(mask.blocks, row, strict=True) if not on]
    smallest = _minimise(loads, lambda kept: _difference(program, _with_loads(mask, kept), calls, run, tolerance) is not None)
    reduced = _with_loads(mask, smallest)
    culprit = None
    for name in observer.OPTIONAL:
        with observer.switched_off(name):
            if _difference(program, reduced, calls, run, tolerance) is None:
                culprit = name
                break
    with observer.observe() as records:
        final = _difference(program, reduced, calls, run, tolerance) or first
    found = Diagnosis(final[0], final[1], culprit, tuple(smallest), reduced, tuple(records))
    logger.error("%s", found)
    return found


def _difference(program: Program, mask: Mask, calls: Calls, run: Runner, tolerance: float) -> tuple[int, float] | None:
    """(step, largest difference) of the first wrong result. A failure to run counts as infinitely wrong."""
    expected = [flatten_output(x)[0] for x in reference.run(program, mask, calls)]
    try:
        got = [flatten_output(x)[0] for x in run(program, mask, calls)]
    except Exception as error:
        logger.warning("the program could not be run: %s: %s", type(error).__name__, error)
        return 0, float("inf")
    for step, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        for a, b in zip(ours, theirs, strict=True):
            difference = float((a.double() - b.double()).abs().nan_to_num(float("inf")).max()) if a.numel() else 0.0
            if difference > tolerance and not torch.equal(a, b):
                return step, difference
    return None


def _with_loads(mask: Mask, loads: Sequence[Entry]) -> Mask:
    """The mask with only these loads; forecasts of the others go."""
    compute = torch.ones_like(mask.compute)
    for step, block in loads:
        compute[step, mask.blocks.index(block)] = False
    terms = {k: v for k, v in mask.forecast.terms.items() if k in set(loads)} if mask.forecast else {}
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
