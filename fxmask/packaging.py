"""Accelerated models that last: a saved plan, and beside it all that running it needs except the weights.

    plan.json, plan.safetensors    as ``fxmask.saving`` writes them: such a folder is a saved plan too
    package.json                   version, what it was compiled with and for, the program's graph and blocks, weights by name
    package.safetensors            tensors that the graph holds and the model does not
    parts/<name>.pt2               AOTInductor packages of step graphs, or of parts of them, and of the timestep's table

The weights are the model's own: one copy, whatever the number of packages, and a change in place is seen by all.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from fxmask.backends.inductor import cpu_compiler_problem
from fxmask.backends.package import Package, Packages
from fxmask.calls import OutputSpec, Signature
from fxmask.errors import BackendError, FxmaskError, InputError, MaskError
from fxmask.executor import Executor, GraphStore
from fxmask.graph_data import graph_from_data, graph_to_data
from fxmask.inputs import module_device
from fxmask.mask import Mask, Plan
from fxmask.passes.functionalize import attribute_of, named_tensors
from fxmask.program import Block, Program
from fxmask.saving import differences, digest, load_plan, new_folder, write_mask
from fxmask.tracing import ROUNDING, fingerprint_of, run_model

VERSION = 1
JSON, CONSTANTS, PARTS = "package.json", "package.safetensors", "parts"
FOREIGN = "copy the folder as a whole, or export it again"

# Compiled graphs round differently from the model, by at most so many times what another capture may.
COMPILED_ROUNDING = {dtype: min(100 * rounding, 0.1) for dtype, rounding in ROUNDING.items()}


def is_package(folder: str | Path) -> bool:
    """Whether a folder was written by ``export``, not only by ``save``."""
    return (Path(folder) / JSON).is_file()


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What compiled code depends on: PyTorch, the kind of device, and what processor and GPU can do."""
    facts = {
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device.type,
        "cpu": {name: value for name, value in sorted(torch.cpu.get_capabilities().items()) if value},
    }
    if device.type == "cuda":
        facts["gpu"] = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return facts


def write_package(
    folder: str | Path, program: Program, mask: Mask, facts: Mapping[str, Any], packages: Mapping[str, Package]
) -> None:
    """Write a package.

    Args:
        folder: is replaced if it holds a plan; any other folder with something in it is refused.
        program: the captured denoiser.
        mask: of the plan, as it was given.
        facts: about the plan, see ``fxmask.saving.save_mask``.
        packages: the compiled parts of its step graphs.

    Raises:
        MaskError: the folder holds something else, or the program holds something that cannot be stored.
    """
    graph = graph_to_data(program.graph_module.graph)
    weights, constants = _weights_to_data(program)
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
        (partial / JSON).write_text(json.dumps(state, allow_nan=False) + "\n", encoding="utf-8")


def compile_packages(
    program: Program, plan: Plan, known: Mapping[str, Package], closed: bool = False, progress: bool = False
) -> Packages:
    """Compile what the steps of a plan run, and what runs once per generation. The first step's graph computes everything, so
    it also serves calls that the plan does not cover.

    Args:
        program: the captured denoiser.
        plan: of this program.
        known: packages that are not compiled again.
        closed: compile nothing else.
        progress: show a progress bar.

    Returns:
        The compiler, which holds the packages, in files that go when it goes.

    Raises:
        MaskError: the program holds something that cannot be stored.
        BackendError: there is no C++ compiler, or a step graph cannot be compiled ahead of time.
    """
    graph_to_data(program.graph_module.graph)  # refuse what cannot be stored before it is compiled
    _weights_to_data(program)
    device = module_device(program.model)
    problem = cpu_compiler_problem() if device.type == "cpu" and not closed else None
    if problem is not None:
        raise BackendError(f"exporting needs a C++ compiler: {problem}. Install g++ or clang, or set CXX, and export again")
    compiler = Packages(known, device, closed)
    with torch.no_grad():
        Executor(plan, GraphStore(program, "package", compiler=compiler)).compile_all(progress)
    return compiler


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
        _refuse_other_machine(folder, state["machine"], device)
        packages = dict(_check_parts(folder, state["parts"], progress))
        attributes = _attributes(folder, state, model, device)
        program = _program(state["program"], mask, model, attributes, device, example)
    except FxmaskError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise MaskError(f"{folder / JSON} is damaged: {error!r}; {FOREIGN}") from error
    with torch.no_grad():
        outputs, expected = run_model(model, program.example)
    program = dataclasses.replace(program, outputs=outputs)
    return LoadedPackage(program, mask, facts, Packages(packages, device, closed=True), expected)


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((folder / JSON).read_text(encoding="utf-8"))
        version = state["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MaskError(f"{folder / JSON} is damaged: {error!r}; {FOREIGN}") from error
    if version != VERSION:
        raise MaskError(f"{folder} has version {version} of the format, this fxmask reads version {VERSION}; update fxmask")
    return state


def _refuse_other_machine(folder: Path, exported: Mapping[str, Any], device: torch.device) -> None:
    """Refuse a package that was compiled for another PyTorch, device, or a processor that can do more than this one."""
    here = machine_facts(device)
    here["cpu"] = {name: here["cpu"].get(name) for name in exported["cpu"]}  # what else it can do does not matter
    found = [line.replace("saved", "exported for", 1) for line in differences(exported, here)]
    if found:
        lines = "\n  ".join(found)
        raise BackendError(
            f"the package in {folder} does not run here:\n  {lines}\n"
            "Compiled code belongs to one version of PyTorch, one kind of device and of processor. Load its plan with "
            "fxmask.load(folder, model, backend='inductor'), which captures and compiles, and export that"
        )


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


def _weights_to_data(program: Program) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Per graph attribute the name, shape, type and layout of the model's tensor; and the attributes that are constants.

    Raises:
        MaskError: the model's weights are no longer those that were captured.
    """
    named = named_tensors(program.model)
    names = {id(tensor): name for name, tensor in reversed(named)}
    own = {attribute_of(name) for name, _ in named}
    weights: dict[str, Any] = {}
    constants = {}
    for node in program.graph_module.graph.find_nodes(op="get_attr"):
        target, tensor, seen = str(node.target), program.weights[str(node.target)], node.meta["val"]
        name = names.get(id(tensor))
        moved = (tensor.shape, tensor.dtype, tensor.device) != (seen.shape, seen.dtype, seen.device)
        if moved or (name is None and (target in own or isinstance(tensor, torch.nn.Parameter))):
            raise MaskError(
                f"weight {target} was replaced, moved or converted after the model was captured; accelerate the model as it "
                "is now, and export that"
            )
        if name is None:
            constants[target] = tensor
        weights[target] = {"name": name, **_layout(tensor)}
    return weights, constants


def _attributes(
    folder: Path, state: Mapping[str, Any], model: torch.nn.Module, device: torch.device
) -> dict[str, torch.Tensor]:
    """What the graph holds: the model's own tensors, and constants.

    Raises:
        MaskError: the model's tensors are not those that were exported; lists up to ten differences.
    """
    if not (folder / CONSTANTS).is_file() or digest(folder / CONSTANTS) != state["constants"]:
        raise MaskError(f"{folder / CONSTANTS} is not the file that was exported; {FOREIGN}")
    constants = load_file(folder / CONSTANTS)
    tensors = dict(named_tensors(model))
    attributes: dict[str, torch.Tensor] = {}
    lines = []
    for target, expected in state["program"]["weights"].items():
        name = expected["name"]
        if name is None:
            kind = torch.device(expected["device"])
            attributes[target] = _strided(constants[target], expected["stride"]).to(
                device if device.type == kind.type else kind
            )
        elif name not in tensors:
            lines.append(f"{name}: exported {expected['dtype']}{expected['shape']}, now missing")
        else:
            now = {"name": name, **_layout(tensors[name])}
            lines += [line.replace("saved", "exported", 1) for line in differences(expected, now, f"{name}.")]
            attributes[target] = tensors[name]
    if lines:
        more = [f"and {len(lines) - 10} more"] if len(lines) > 10 else []
        raise MaskError(f"the package in {folder} was exported for another model:\n  " + "\n  ".join(lines[:10] + more))
    return attributes


def _layout(tensor: torch.Tensor) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"shape": list(tensor.shape), "dtype": dtype, "stride": list(tensor.stride()), "device": tensor.device.type}


def _strided(tensor: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    """A contiguous tensor in the memory layout that it had; where a stride is 0, one element stands for all."""
    distinct = tensor[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)]
    made = torch.empty_strided(distinct.shape, list(strides), dtype=tensor.dtype).copy_(distinct)
    return made.expand(tensor.shape)
