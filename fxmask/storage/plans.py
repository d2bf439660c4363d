"""Plans that last: a folder with PLAN for what is decided and safetensors for what is numeric; see ``schema``.

No pickle. A folder holds a whole plan at every moment; see ``folders``. A program or scheduler that differs is refused with
what differs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch

from fxmask.errors import MaskError
from fxmask.files.foreign import foreign_errors_as
from fxmask.ir.forecast import Forecast, clean_source
from fxmask.ir.mask import Mask
from fxmask.storage.folders import Exchange, exchange, read_again
from fxmask.storage.plain import from_plain, to_plain
from fxmask.storage.plan_file import FOREIGN, content_of, read_plan_file
from fxmask.storage.schema import FORMAT, PLAN, TENSORS, VERSION, Facts, PlanFile, SchedulerFacts, plain_facts
from fxmask.storage.tensors import tensor_digests, tensors_from_bytes, tensors_to_bytes

MOST_STEPS = MOST_BLOCKS = 10_000
MOST_ENTRIES = 4_000_000  # steps times blocks
MOST_LANES = 64
LARGEST = 2.0**53  # of timesteps

Saved = tuple[Mask, dict[str, Any], dict[str, Any]]  # mask, facts, example call


def save_mask(folder: str | Path, mask: Mask, facts: Mapping[str, Any], example: Mapping[str, Any]) -> None:
    """Write a mask, facts about what it belongs to, and the call that the program was captured with.

    Args:
        folder: its plan is replaced, other files in it stay. One without a plan and with something in it is refused.
        mask: to save.
        facts: plain data, returned by ``load_plan``.
        example: arguments of a call by name: tensors and plain data, nested.

    Raises:
        MaskError: the folder holds something else or cannot be written, or the call holds an argument that cannot be saved.
    """
    state, tensors = mask_to_data(mask, facts, example)
    with exchange(folder) as files:
        write_mask(files, state, tensors)


def write_mask(files: Exchange, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write what ``mask_to_data`` made, after all other files, and make it the plan.

    Raises:
        OSError: the folder cannot be written.
    """
    content = tensors_to_bytes(tensors)
    files.add(TENSORS, content)
    entries = {name: msgspec.to_builtins(entry) for name, entry in files.files.items()}
    files.commit({"format": FORMAT, "version": VERSION, "files": entries, **state}, tensor_digests(TENSORS, content))


def mask_to_data(
    mask: Mask, facts: Mapping[str, Any], example: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What goes to PLAN and to TENSORS.

    Raises:
        MaskError: the call holds an argument that cannot be saved, or facts are no plain data.
    """
    calls = mask.by_call
    terms = sorted((calls.forecast.terms if calls.forecast else {}).items())
    tensors: dict[str, torch.Tensor] = {}
    state = {
        "blocks": list(mask.blocks),
        "program": mask.fingerprint,
        "forecast": [[step, block, [source for source, _ in pairs]] for (step, block), pairs in terms],
        "facts": facts_to_data(facts),
        "example": to_plain(dict(example), tensors, "example"),
        **({"lanes": list(mask.lanes), "batched": mask.batched} if mask.lanes else {}),
        **({"parts": list(mask.parts)} if mask.parts else {}),
    }
    tensors["compute"] = mask.compute
    if mask.called is not None:
        tensors["called"] = mask.called
    tensors["timesteps"] = torch.tensor(mask.timesteps, dtype=torch.float64)
    tensors["coefficients"] = torch.tensor([c for _, pairs in terms for _, c in pairs], dtype=torch.float64)
    return state, tensors


def facts_to_data(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as JSON has them.

    Raises:
        MaskError: they are no plain data.
    """
    with foreign_errors_as(MaskError, "what the plan was made for cannot be saved", "give plain data"):
        return plain_facts(facts)


def load_plan(folder: str | Path) -> Saved:
    """Read a mask, its facts, and the example call.

    Raises:
        MaskError: there is no plan, it is damaged, or of a version that this fxmask does not know.
    """
    found: Saved = read_again(Path(folder), lambda: plan_of(Path(folder), read_plan_file(Path(folder))))
    return found


def plan_of(folder: Path, state: PlanFile) -> Saved:
    """The same from a plan.json that was read.

    Raises:
        MaskError: it or the file of its tensors is damaged.
    """
    content = content_of(folder, state, TENSORS)
    with foreign_errors_as(MaskError, f"the plan in {folder} is damaged", FOREIGN):
        tensors = tensors_from_bytes(content)
        mask = _mask_of(state, tensors)
        example = from_plain(state.example, tensors)
        if not isinstance(example, dict):
            raise TypeError("the example is no call by name")
        return mask, dict(state.facts), example


def facts_of(folder: str | Path, mask: Mask, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of a plan that ``save`` or ``export`` wrote.

    Raises:
        MaskError: they do not say what the plan was made for.
    """
    what = f"the plan in {folder} does not say what it was made for"
    with foreign_errors_as(MaskError, what, f"write it with save(); {PLAN} is no plan of a model"):
        checked = msgspec.convert(dict(facts), Facts)
        if checked.scheduler is not None:
            msgspec.convert(checked.scheduler, SchedulerFacts)
        if checked.start >= len(mask.order):
            raise ValueError(f"it starts at step {checked.start} of {len(mask.order)}")
    return dict(facts)


def _mask_of(state: PlanFile, tensors: Mapping[str, torch.Tensor]) -> Mask:
    lanes = tuple(state.lanes)
    compute = _tensor(tensors, "compute", torch.bool, 3 if lanes else 2)
    timesteps = _tensor(tensors, "timesteps", torch.float64, 1)
    coefficients = _tensor(tensors, "coefficients", torch.float64, 1)
    steps, blocks = compute.shape[0], compute.shape[-1]
    if not (steps <= MOST_STEPS and blocks <= MOST_BLOCKS and compute.numel() <= MOST_ENTRIES and len(lanes) <= MOST_LANES):
        raise ValueError(f"{steps} steps and {blocks} blocks are more than a plan may have")
    if len(state.blocks) != blocks or len(timesteps) != steps:
        raise ValueError(f"{len(timesteps)} timesteps and {len(state.blocks)} blocks, but {steps} and {blocks} in its mask")
    if bool((timesteps.abs() > LARGEST).any()):
        raise ValueError("a timestep is beyond whole numbers")
    forecast = _forecast_of(state, coefficients.tolist())
    given = tuple(timesteps.tolist()), tuple(state.blocks)
    if not lanes:
        return Mask(compute, *given, forecast, state.program)
    called = _tensor(tensors, "called", torch.bool, 2) if "called" in tensors else None
    ones, parts = torch.ones_like(compute), tuple(state.parts)
    every = Mask(ones, *given, None, state.program, lanes=lanes, called=called, batched=state.batched, parts=parts)
    rows = torch.stack([compute[step, lane] for step, lane in every.order])
    return every.folded(Mask(rows, every.by_call.timesteps, every.blocks, forecast, state.program))


def _tensor(tensors: Mapping[str, torch.Tensor], name: str, dtype: torch.dtype, dims: int) -> torch.Tensor:
    found = tensors[name]
    if found.dtype != dtype or found.dim() != dims or not bool(torch.isfinite(found).all()):
        raise ValueError(f"{name} is {found.dtype} with {found.dim()} dimensions, or holds what is no number")
    return found


def _forecast_of(state: PlanFile, coefficients: list[float]) -> Forecast | None:
    """Entries in order of step and block, each once, with one coefficient for each source."""
    keys = [(step, block) for step, block, _ in state.forecast]
    if any(a >= b for a, b in itertools.pairwise(keys)):
        raise ValueError("entries of its forecast are repeated or out of order")
    if sum(len(sources) for _, _, sources in state.forecast) != len(coefficients):
        raise ValueError(f"its forecast has {len(coefficients)} coefficients, not one for each source")
    values = iter(coefficients)
    terms = {(k, b): tuple((clean_source(source, b), next(values)) for source in sources) for k, b, sources in state.forecast}
    return Forecast(terms) if terms else None
