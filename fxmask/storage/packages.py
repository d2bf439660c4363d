"""Accelerated models that last: a saved plan, and beside it all that running it needs except the weights.

    plan.json, plan.safetensors    as ``plans`` writes them: such a folder is a saved plan too
    package.json                   version, what it was compiled with and for, the program's graph and blocks, weights by name
    package.safetensors            tensors that the graph holds and the model does not
    parts/<name>.pt2               AOTInductor packages of step graphs, or of parts of them, and of the timestep's table

The weights are the model's own: one copy, whatever the number of packages, and a change in place is seen by all.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

from fxmask._torch import pytree
from fxmask.backends.package import Package, Packages
from fxmask.errors import FxmaskError, InputError, MaskError
from fxmask.frontend.assemble import fingerprint_of
from fxmask.frontend.modules import module_device
from fxmask.frontend.subject import Subject
from fxmask.frontend.verify import ROUNDING, run_model
from fxmask.ir.block import Block
from fxmask.ir.calls import Signature
from fxmask.ir.mask import Mask
from fxmask.ir.outputs import OutputSpec
from fxmask.ir.program import Program
from fxmask.storage.folders import digest, new_folder
from fxmask.storage.graph_data import graph_from_data, graph_to_data
from fxmask.storage.machine import machine_facts, refuse_other_machine
from fxmask.storage.package_weights import CONSTANTS, FOREIGN, read_attributes, weights_to_data
from fxmask.storage.plans import load_plan, write_mask

VERSION = 1
PACKAGE = "package.json"
PARTS = "parts"


# Compiled graphs round differently from the model, by at most so many times what another capture may.
COMPILED_ROUNDING = {dtype: min(100 * rounding, 0.1) for dtype, rounding in ROUNDING.items()}


def is_package(folder: str | Path) -> bool:
    """Whether a folder was written by ``export``, not only by ``save``."""
    return (Path(folder) / PACKAGE).is_file()


def write_package(
    folder: str | Path, program: Program, mask: Mask, facts: Mapping[str, Any], packages: Mapping[str, Package]
) -> None:
    """Write a package.

    Args:
        folder: is replaced if it holds a plan; any other folder with something in it is refused.
        program: the captured denoiser.
        mask: of the plan, as it was given.
        facts: about the plan, see ``fxmask.storage.plans.save_mask``.
        packages: the compiled parts of its step graphs.

    Raises:
        MaskError: the folder holds something else, or the program holds something that cannot be stored.
    """
    graph = graph_to_data(program.graph_module.graph)
    weights, constants = weights_to_data(program)
    with new_folder(folder) as partial:
        write_mask(partial, mask, facts, program.example.arguments)
        (partial / PARTS).mkdir()
        parts = {}
        for name, package in packages.items():
            written = partial / PARTS / f"{name}.pt2"
            shutil.copyfile(package.path, written)
            parts[name] = {"strides": package.strides, "digest": digest(written)}
        save_file({name: x.detach().cpu().contiguous().clone() for name, x in constants.items()}, partial / CONSTANTS)
        signature = program.signature
        state = {
            "version": VERSION,
            "machine": machine_facts(module_device(program.model)),
            "parts": parts,
            "constants": digest(partial / CONSTANTS),
            "program": {
                "inputs": program.inputs,
                "roles": dict(program.roles),
                "blocks": [dataclasses.asdict(block) for block in program.blocks],
                "macs": program.macs,
                "attention_macs": program.attention_macs,
                "rung": program.rung,
                "signature": {
                    f.name: getattr(signature, f.name) for f in dataclasses.fields(signature) if f.name != "parameters"
                },
                "weights": weights,
                "graph": graph,
            },
        }
        (partial / PACKAGE).write_text(json.dumps(state, allow_nan=False) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class LoadedPackage:
    """What a package holds, for a model.

    Attributes:
        program: the denoiser, as it was captured.
        mask: of the plan, as it was given.
        facts: about the plan.
        compiler: loads the parts of step graphs, and compiles none.
        expected: what the model itself returns for the program's example.
    """

    program: Program
    mask: Mask
    facts: dict[str, Any]
    compiler: Packages
    expected: Sequence[torch.Tensor]

    def compare(self, outputs: Sequence[torch.Tensor]) -> None:
        """Compare what compiled code returns for the example with what the model does.

        Raises:
            MaskError: they differ by more than rounding.
        """
        for k, (got, wanted) in enumerate(zip(outputs, self.expected, strict=True)):
            same = got.shape == wanted.shape and got.dtype == wanted.dtype
            if not same or not torch.allclose(got, wanted, 0, _rounding(wanted), equal_nan=True):
                raise MaskError(
                    f"the package computes something else than this {type(self.program.model).__name__}: output {k} of the "
                    "exported call differs by more than rounding, so the model's code is not what was exported; export it again"
                )


def _rounding(x: torch.Tensor) -> float:
    largest = float(x.abs().max()) if x.numel() else 0.0
    return COMPILED_ROUNDING.get(x.dtype, 0.0) * largest


def read_package(folder: str | Path, model: torch.nn.Module, progress: bool = False) -> LoadedPackage:
    """Read a package for a model. Nothing is captured or compiled; the model runs on the exported call.

    Args:
        folder: written by ``AcceleratedModel.export``.
        model: has the weights, in eval mode.
        progress: show a progress bar.

    Raises:
        InputError: the model is in training mode, or no ``torch.nn.Module``.
        MaskError: the package is damaged, or the model's weights are not those that were exported; says in what.
        BackendError: the package was compiled for another PyTorch, device or processor.
    """
    folder = Path(folder)
    if not isinstance(model, torch.nn.Module) or model.training:
        raise InputError(f"model must be a torch.nn.Module in eval mode, got {type(model).__name__}; call model.eval() first")
    mask, facts, example = load_plan(folder)
    state = _read_state(folder)
    device = module_device(model)
    try:
        refuse_other_machine(folder, state["machine"], device)
        packages = dict(_check_parts(folder, state["parts"], progress))
        attributes = read_attributes(folder, state, model, device)
        program = _program(state["program"], mask, model, attributes, device, example)
    except FxmaskError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise MaskError(f"{folder / PACKAGE} is damaged: {error!r}; {FOREIGN}") from error
    with torch.no_grad():
        subject = Subject(model, device.type)
        outputs, expected = run_model(subject, program.example)
    program = dataclasses.replace(program, outputs=outputs, state=subject.snapshot, ambient=subject.ambient)
    return LoadedPackage(program, mask, facts, Packages(packages, device, closed=True), expected)


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((folder / PACKAGE).read_text(encoding="utf-8"))
        version = state["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MaskError(f"{folder / PACKAGE} is damaged: {error!r}; {FOREIGN}") from error
    if version != VERSION:
        raise MaskError(f"{folder} has version {version} of the format, this fxmask reads version {VERSION}; update fxmask")
    return state


def _check_parts(folder: Path, parts: Mapping[str, Any], progress: bool) -> Iterator[tuple[str, Package]]:
    for name, part in tqdm(parts.items(), desc="reading packages", unit="package", disable=not progress):
        path = folder / PARTS / f"{name}.pt2"
        if not path.is_file() or digest(path) != part["digest"]:
            raise MaskError(f"{path} is not the file that was exported; {FOREIGN}")
        yield name, Package(path, tuple(tuple(strides) for strides in part["strides"]))


def _program(
    data: Mapping[str, Any],
    mask: Mask,
    model: torch.nn.Module,
    attributes: dict[str, torch.Tensor],
    device: torch.device,
    example: Mapping[str, Any],
) -> Program:
    """The captured program; how its outputs are put together is not known yet."""
    module = graph_from_data(data["graph"], attributes, device)
    blocks = tuple(Block(**{**block, "values": tuple(block["values"])}) for block in data["blocks"])
    if fingerprint_of(module, blocks) != mask.fingerprint:
        raise ValueError(f"its graph does not have the plan's fingerprint {mask.fingerprint}")
    stored = data["signature"]
    signature = Signature(inspect.signature(model.forward), **{**stored, "fixed": tuple(stored["fixed"])})
    try:
        bound = signature.bind((), pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), example))
    except InputError as error:
        raise MaskError(f"the package was exported for another model: {error}") from error
    if list(bound.tensors) != data["inputs"]:
        raise MaskError(
            f"the package was exported for another model: its inputs are {data['inputs']}, now {list(bound.tensors)}"
        )
    return Program(
        graph_module=module,
        inputs=tuple(bound.tensors),
        example=bound,
        signature=signature,
        outputs=OutputSpec({}),
        roles=data["roles"],
        blocks=blocks,
        macs=data["macs"],
        attention_macs=data["attention_macs"],
        model=model,
        rung=data["rung"],
        verified=True,  # it was when it was captured; ``LoadedPackage.compare`` does it again
        fingerprint=str(mask.fingerprint),
        weights=attributes,
    )
