"""Plans that last: a folder with PLAN for what is decided and safetensors for what is numeric.

    plan.json          version, fingerprints of program and scheduler, steps, blocks, forecast sources, backend, shapes
    plan.safetensors   compute bool [T, B]; timesteps float64 [T]; coefficients float64 [N]; example.*: the captured call

No pickle. A folder is written under a temporary name and renamed, so that what was there before stays whole until the new
one is complete. A program or scheduler that differs is refused with what differs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fxmask.errors import MaskError
from fxmask.ir.forecast import Forecast
from fxmask.ir.mask import Mask
from fxmask.storage.folders import PLAN, digest, new_folder
from fxmask.storage.plain import from_plain, to_plain

VERSION = 1
TENSORS = "plan.safetensors"


def save_mask(folder: str | Path, mask: Mask, facts: Mapping[str, Any], example: Mapping[str, Any]) -> None:
    """Write a mask, facts about what it belongs to, and the call that the program was captured with.

    Args:
        folder: is replaced if it holds a plan; any other folder with something in it is refused.
        mask: to save.
        facts: plain data, returned by ``load_plan``.
        example: arguments of a call by name: tensors and plain data, nested.

    Raises:
        MaskError: the folder holds something else, or the call holds an argument that cannot be saved.
    """
    with new_folder(folder) as partial:
        write_mask(partial, mask, facts, example)


def write_mask(folder: Path, mask: Mask, facts: Mapping[str, Any], example: Mapping[str, Any]) -> None:
    """The same into a folder that is there."""
    terms = sorted((mask.forecast.terms if mask.forecast else {}).items())
    flat = [c for _, pairs in terms for _, c in pairs]
    state = {
        "version": VERSION,
        "blocks": list(mask.blocks),
        "program": mask.fingerprint,
        "forecast": [[step, block, [source for source, _ in pairs]] for (step, block), pairs in terms],
        "facts": dict(facts),
    }
    examples: dict[str, torch.Tensor] = {}
    state["example"] = to_plain(dict(example), examples, "example")
    tensors = {
        **examples,
        "compute": mask.compute,
        "timesteps": torch.tensor(mask.timesteps, dtype=torch.float64),
        "coefficients": torch.tensor(flat, dtype=torch.float64),
    }
    save_file(tensors, folder / TENSORS)
    state["digest"] = digest(folder / TENSORS)
    (folder / PLAN).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def load_plan(folder: str | Path) -> tuple[Mask, dict[str, Any], dict[str, Any]]:
    """Read a mask, its facts, and the example call.

    Raises:
        MaskError: there is no plan, it is damaged, or of a version that this fxmask does not know.
    """
    folder = Path(folder)
    if not (folder / PLAN).is_file() or not (folder / TENSORS).is_file():
        raise MaskError(f"{folder} holds no plan: it needs {PLAN} and {TENSORS}, as written by save()")
    try:
        state = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        version = state["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise MaskError(f"{folder / PLAN} is damaged: {error}") from error
    if version != VERSION:
        raise MaskError(f"{folder} has version {version} of the format, this fxmask reads version {VERSION}; update fxmask")
    if state.get("digest") != digest(folder / TENSORS):
        raise MaskError(f"{folder / TENSORS} is not the file that {PLAN} was written with; copy the folder as a whole")
    tensors = load_file(folder / TENSORS)
    values = iter(tensors["coefficients"].tolist())
    terms = {(step, block): tuple((source, next(values)) for source in sources) for step, block, sources in state["forecast"]}
    mask = Mask(
        tensors["compute"],
        tuple(tensors["timesteps"].tolist()),
        tuple(state["blocks"]),
        Forecast(terms) if terms else None,
        state["program"],
    )
    return mask, state["facts"], from_plain(state["example"], tensors)
