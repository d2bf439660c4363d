"""The program that a saved plan was made for, captured again from the call that was saved with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fxmask._torch import pytree
from fxmask.errors import MaskError
from fxmask.files.foreign import foreign_errors_as
from fxmask.frontend.capture import capture
from fxmask.frontend.modules import module_device, module_dtype
from fxmask.ir.calls import Signature
from fxmask.ir.mask import Mask
from fxmask.ir.program import Program
from fxmask.storage.placed import placed_call
from fxmask.storage.plan_file import FOREIGN


def capture_saved(
    folder: str | Path, model: torch.nn.Module, mask: Mask, facts: Mapping[str, Any], example: Mapping[str, Any]
) -> Program:
    """Capture for a saved call, where the model is now, and in its type if it does not take the one that was saved.

    Args:
        folder: of the plan.
        model: to capture.
        mask: that was saved.
        facts: of the plan.
        example: arguments of the call by name.

    Raises:
        MaskError: the model cannot run the call, or is another one; says in what.
    """
    roles = {name.split(".")[0]: role for name, role in facts["roles"].items()}
    with foreign_errors_as(MaskError, f"this {type(model).__name__} cannot run the call saved in {folder}", FOREIGN):
        program, call = _captured(model, placed_call(example, module_device(model)), roles)
        if not _is_of(mask, program):
            # Some models make tables at their first call and keep them: plans were made of graphs that hold these.
            with torch.no_grad():
                model(**call)
            program = capture(model, call, roles=roles)
    refuse_other_program(folder, mask, facts, program)
    return program


def _captured(model: torch.nn.Module, call: dict[str, Any], roles: Mapping[str, str]) -> tuple[Program, dict[str, Any]]:
    dtype = module_dtype(model)
    sample = next((x for x in pytree.tree_leaves(call.get(Signature.of(model).sample)) if isinstance(x, torch.Tensor)), None)
    if sample is None or not sample.is_floating_point() or sample.dtype == dtype:
        return capture(model, call, roles=roles), call
    try:
        return capture(model, call, roles=roles), call
    except Exception:  # the model's own, of a call in another type
        was = sample.dtype
        cast: dict[str, Any] = pytree.tree_map_only(torch.Tensor, lambda x: x.to(dtype) if x.dtype == was else x, call)
        return capture(model, cast, roles=roles), cast


def _is_of(mask: Mask, program: Program) -> bool:
    return mask.fingerprint is not None and program.fits(mask.fingerprint)


def refuse_other_program(folder: str | Path, mask: Mask, facts: Mapping[str, Any], program: Program) -> None:
    """Refuse a program that a plan was not made for.

    Raises:
        MaskError: says what differs.
    """
    if _is_of(mask, program):
        return
    names = {b.name for b in program.all_blocks}
    missing = [name for name in mask.blocks if name not in names]
    raise MaskError(
        f"the plan in {folder} was made for another model: {facts['model']} with fingerprint {mask.fingerprint}, this "
        f"{type(program.model).__name__} has {program.fingerprint}"
        + (f"; it has no blocks {missing[:5]}" if missing else "; it has blocks of these names, but other operators")
    )
