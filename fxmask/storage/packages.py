"""Accelerated models that last: a saved plan, and beside it all that running it needs except the weights; see ``schema``.

The weights are the model's own: one copy, whatever the number of packages, and a change in place is seen by all.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from tqdm.auto import tqdm

from fxmask._torch import pytree
from fxmask.backends.package import Package, Packages
from fxmask.errors import InputError, MaskError
from fxmask.files.bounded import JSON_BYTES, check_json
from fxmask.files.foreign import foreign_errors_as
from fxmask.files.sealed import parse
from fxmask.frontend.assemble import role_of
from fxmask.frontend.modules import module_device
from fxmask.frontend.subject import Subject
from fxmask.frontend.verify import ROUNDING, run_model
from fxmask.ir.block import Block
from fxmask.ir.calls import Signature
from fxmask.ir.fingerprint import fingerprint_1, fingerprint_of
from fxmask.ir.mask import Mask
from fxmask.ir.outputs import OutputSpec
from fxmask.ir.program import Program
from fxmask.storage.folders import exchange
from fxmask.storage.graph_data import graph_from_data, graph_to_data
from fxmask.storage.machine import machine_facts, refuse_other_machine
from fxmask.storage.package_weights import read_attributes, weights_to_data
from fxmask.storage.plan_file import FOREIGN, content_of, file_of, read_plan_file
from fxmask.storage.plans import facts_of, mask_to_data, plan_of, write_mask
from fxmask.storage.recompute import check_values
from fxmask.storage.schema import (
    CONSTANTS,
    PACKAGE,
    PARTS,
    VERSION,
    BlockData,
    PackageFile,
    PackageFile1,
    PartData,
    PlanFile,
    ProgramData,
    SignatureData,
)
from fxmask.storage.tensors import tensors_from_bytes, tensors_to_bytes

PART_BYTES = 2 * 2**30

# Compiled graphs round differently from the model, by at most so many times what another capture may.
COMPILED_ROUNDING = {dtype: min(100 * rounding, 0.1) for dtype, rounding in ROUNDING.items()}


def is_package(folder: str | Path) -> bool:
    """Whether a folder was written by ``export``, not only by ``save``.

    Raises:
        MaskError: it holds no plan, or a damaged one.
    """
    return PACKAGE in read_plan_file(Path(folder)).files


def write_package(
    folder: str | Path, program: Program, mask: Mask, facts: Mapping[str, Any], packages: Mapping[str, Package]
) -> None:
    """Write a package.

    Args:
        folder: its plan is replaced, other files in it stay. One without a plan and with something in it is refused.
        program: the captured denoiser.
        mask: of the plan, as it was given.
        facts: about the plan, see ``fxmask.storage.plans.save_mask``.
        packages: the compiled parts of its step graphs.

    Raises:
        MaskError: the folder holds something else, or the program holds something that cannot be stored.
    """
    weights, constants = weights_to_data(program)
    data = {
        "version": VERSION,
        "machine": machine_facts(module_device(program.model)),
        "parts": {name: {"strides": package.strides} for name, package in packages.items()},
        "program": _program_to_data(program, weights),
    }
    with foreign_errors_as(MaskError, "the program cannot be stored", "save its plan instead"):
        text = check_json(json.dumps(data, allow_nan=False).encode() + b"\n")
    state, tensors = mask_to_data(mask, facts, program.example.arguments)
    with exchange(folder) as files:
        for name, package in packages.items():
            files.add(f"{PARTS}/{name}.pt2", package.path.read_bytes())
        files.add(CONSTANTS, tensors_to_bytes(constants))
        files.add(PACKAGE, text)
        write_mask(files, state, tensors)


def _program_to_data(program: Program, weights: Mapping[str, Any]) -> dict[str, Any]:
    signature = program.signature
    fields = [f.name for f in dataclasses.fields(signature) if f.name != "parameters"]
    return {
        "inputs": program.inputs,
        "roles": dict(program.roles),
        "blocks": [dataclasses.asdict(block) for block in program.all_blocks],
        "macs": program.macs,
        "attention_macs": program.attention_macs,
        "rung": program.rung,
        "signature": {name: getattr(signature, name) for name in fields},
        "weights": weights,
        "graph": graph_to_data(program.graph_module.graph),
    }


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
            if not agrees(got, wanted):
                raise MaskError(
                    f"the package computes something else than this {type(self.program.model).__name__}: output {k} of the "
                    "exported call differs by more than rounding, so the model's code is not what was exported; export it again"
                )


def agrees(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether a tensor is what was wanted but for the rounding of compiled code."""
    same = got.shape == wanted.shape and got.dtype == wanted.dtype
    return same and torch.allclose(got, wanted, 0, _rounding(wanted), equal_nan=True)


def _rounding(x: torch.Tensor) -> float:
    finite = x[torch.isfinite(x)] if x.is_floating_point() else x
    largest = float(finite.abs().max()) if finite.numel() else 0.0
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
    state = read_plan_file(folder)
    mask, facts, example = plan_of(folder, state)
    facts = facts_of(folder, mask, facts)
    device = module_device(model)
    content = content_of(folder, state, PACKAGE, JSON_BYTES)
    constants = content_of(folder, state, CONSTANTS)
    with foreign_errors_as(MaskError, f"{folder / PACKAGE} is damaged", FOREIGN):
        data = _parse(folder, content)
        refuse_other_machine(folder, data.machine, device)
        packages = dict(_check_parts(folder, state, data.parts, progress))
        attributes = read_attributes(folder, data.program.weights, tensors_from_bytes(constants), model, device)
        program = _program(data.program, mask, facts, model, attributes, device, example)
        with torch.no_grad():
            subject = Subject(model, device.type)
            outputs, expected = run_model(subject, program.example)
    program = dataclasses.replace(program, outputs=outputs, state=subject.snapshot, ambient=subject.ambient)
    return LoadedPackage(program, mask, facts, Packages(packages, device, closed=True), expected)


class _Version(msgspec.Struct, frozen=True):
    version: int


def _parse(folder: Path, content: bytes) -> PackageFile:
    """package.json, whatever its version."""
    version = parse(content, _Version).version
    if version == 1:
        old = parse(content, PackageFile1)
        return PackageFile(VERSION, old.machine, {k: PartData(v.strides) for k, v in old.parts.items()}, old.program)
    if version != VERSION:
        raise MaskError(
            f"{folder} has version {version} of the format, this fxmask reads versions 1 and {VERSION}; update fxmask"
        )
    return parse(content, PackageFile)


def _check_parts(folder: Path, state: PlanFile, parts: Mapping[str, PartData], progress: bool) -> Iterator[tuple[str, Package]]:
    for name, part in tqdm(parts.items(), desc="reading packages", unit="package", disable=not progress):
        path = file_of(folder, state, f"{PARTS}/{name}.pt2", PART_BYTES)
        yield name, Package(path, tuple(tuple(strides) for strides in part.strides))


def _program(
    data: ProgramData,
    mask: Mask,
    facts: Mapping[str, Any],
    model: torch.nn.Module,
    attributes: dict[str, torch.Tensor],
    device: torch.device,
    example: Mapping[str, Any],
) -> Program:
    """The captured program; how its outputs are put together is not known yet."""
    module = graph_from_data(data.graph, attributes, device)
    listed = tuple(map(_block, data.blocks))
    blocks = tuple(block for block in listed if block.kind != "stream")
    fingerprint = fingerprint_of(module, blocks)
    if mask.fingerprint not in (fingerprint, fingerprint_1(module, blocks)):
        raise ValueError(f"its graph does not have the plan's fingerprint {mask.fingerprint}")
    _check_blocks(module, listed)
    signature = _signature(data.signature, model)
    try:
        bound = signature.bind((), pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), example))
    except InputError as error:
        raise MaskError(f"the package was exported for another model: {error}") from error
    if list(bound.tensors) != data.inputs:
        raise MaskError(f"the package was exported for another model: its inputs are {data.inputs}, now {list(bound.tensors)}")
    roles = {name: role_of(name, signature, facts["roles"]) for name in bound.tensors}
    if roles != data.roles:
        raise ValueError(f"its inputs have the roles {roles}, not {data.roles}")
    check_values(module, list(bound.tensors.values()))
    return Program(
        graph_module=module,
        inputs=tuple(bound.tensors),
        example=bound,
        signature=signature,
        outputs=OutputSpec({}),
        roles=data.roles,
        blocks=blocks,
        macs=data.macs,
        attention_macs=data.attention_macs,
        model=model,
        rung=data.rung,
        verified=True,  # it was when it was captured; ``LoadedPackage.compare`` does it again
        fingerprint=fingerprint,
        weights=attributes,
        streams=tuple(block for block in listed if block.kind == "stream"),
    )


def _block(data: BlockData) -> Block:
    fields = msgspec.structs.asdict(data)
    return Block(**{**fields, "values": tuple(data.values)})


def _signature(data: SignatureData, model: torch.nn.Module) -> Signature:
    fields = msgspec.structs.asdict(data)
    return Signature(inspect.signature(model.forward), **{**fields, "fixed": tuple(data.fixed)})


def _check_blocks(module: torch.fx.GraphModule, blocks: Sequence[Block]) -> None:
    """Every block is one or more values of the graph, and no name is that of two."""
    nodes = {node.name: node for node in module.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)}
    lost = [block.name for block in blocks if not block.values or any(value not in nodes for value in block.values)]
    if lost or len({block.name for block in blocks}) != len(blocks):
        raise ValueError(f"blocks {lost[:3]} are no values of its graph, or a name is repeated")
