"""What the files of plans and packages hold, in every version of the format. Anything else is refused.

    plan.json              ``PlanFile``: what is decided, and every other file of the folder with its size and digest
    plan.safetensors       compute bool [T, B]; timesteps float64 [T]; coefficients float64 [N]; example.*: the captured call
                           with lanes that have rows of their own: compute bool [T, L, B]; called bool [T, L]
    package.json           ``PackageFile``; only in packages, like the files below
    package.safetensors    tensors that the graph holds and the model does not
    parts/<name>.pt2       AOTInductor packages

Version 1 had a digest of plan.safetensors in plan.json, and those of the package's files in package.json.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

FORMAT: Final = "fxmask plan"
VERSION: Final = 2
PLAN = "plan.json"
TENSORS = "plan.safetensors"
PACKAGE = "package.json"
CONSTANTS = "package.safetensors"
PARTS = "parts"

# Where a file lies: under its own name, or beside the one that it replaces with the beginning of its digest.
_AGAIN = r"(-[0-9a-f]{16})?"
OWN_FILE = re.compile(rf"(plan|package){_AGAIN}\.safetensors|package{_AGAIN}\.json|parts/\w+{_AGAIN}\.pt2", re.ASCII)

Count = Annotated[int, Meta(ge=0, le=2**62)]
Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Sizes = list[Count]
Terms = list[int | tuple[str, int]]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Nothing missing, nothing unknown, nothing of another type."""


class FileEntry(_Strict, frozen=True):
    """A file that belongs to a plan: where it lies in the folder, bytes, SHA-256."""

    path: str
    size: Count
    digest: Digest


class PlanFile(_Strict, frozen=True):
    """plan.json. With lanes the steps of its forecast are calls, counted over all lanes."""

    format: Literal["fxmask plan"]
    version: Literal[2]
    files: dict[str, FileEntry]
    blocks: list[str]
    program: str | None
    forecast: list[tuple[Count, str, Terms]]
    facts: dict[str, Any]
    example: Any
    lanes: list[str] = []
    batched: bool = False
    parts: list[int] = []


class PlanFile1(_Strict, frozen=True):
    """plan.json of version 1."""

    version: Literal[1]
    blocks: list[str]
    program: str | None
    forecast: list[tuple[Count, str, Terms]]
    facts: dict[str, Any]
    example: Any
    digest: Digest


class Facts(msgspec.Struct, frozen=True):
    """What ``save`` says of a plan, among other things."""

    model: str
    roles: dict[str, Literal["sample", "timestep", "conditioning", "step"]]
    start: Count
    backend: str
    mode: str | None = None
    scheduler: dict[str, Any] | None = None
    num_inference_steps: Count | None = None
    scheduler_kwargs: dict[str, Any] | None = None
    step_kwargs: dict[str, Any] | None = None
    scheduler_timesteps: list[float] | None = None
    learned: dict[str, Any] | None = None
    measured: dict[str, Any] | None = None
    plan: PlanNumbers | None = None
    versions: dict[str, str] | None = None


class PlanNumbers(msgspec.Struct, frozen=True):
    """What a plan saves, for those who read the folder; loading works it out again."""

    mac_ratio: float
    macs: Count
    full_macs: Count
    distinct_graphs: Count
    peak_cache_bytes: Count
    batch_size: Count


class SchedulerFacts(msgspec.Struct, frozen=True):
    """What a plan says of its scheduler."""

    config: dict[str, Any]
    class_: str = msgspec.field(name="class")


class PartData(_Strict, frozen=True):
    """A compiled part: strides of the arguments that it was compiled for."""

    strides: list[Sizes]


class PartData1(_Strict, frozen=True):
    """The same in version 1."""

    strides: list[Sizes]
    digest: Digest


class WeightData(_Strict, frozen=True):
    """A tensor that the graph holds. ``name`` is that of the model's own, ``None`` for a constant."""

    name: str | None
    shape: Sizes
    dtype: str
    stride: Sizes
    device: str


class BlockData(_Strict, frozen=True):
    """See ``fxmask.ir.block.Block``."""

    name: str
    kind: str
    values: list[str]
    macs: Count
    bytes: Count
    operator: str = ""
    place: str = ""
    depth: Count = 0


class SignatureData(_Strict, frozen=True):
    """See ``fxmask.ir.calls.Signature``."""

    sample: str
    timestep: str | None
    batched_timestep: bool = True
    one_timestep: bool = False
    timestep_type: str = ""
    fixed: list[str] = []


class ProgramData(_Strict, frozen=True):
    """The captured program. Nodes of the graph: op, name, target, args, kwargs, value."""

    inputs: list[str]
    roles: dict[str, str]
    blocks: list[BlockData]
    macs: Count
    attention_macs: Count
    rung: str
    signature: SignatureData
    weights: dict[str, WeightData]
    graph: list[tuple[str, str, str, Any, Any, Any]]


class PackageFile(_Strict, frozen=True):
    """package.json."""

    version: Literal[2]
    machine: dict[str, Any]
    parts: dict[str, PartData]
    program: ProgramData


class PackageFile1(_Strict, frozen=True):
    """package.json of version 1."""

    version: Literal[1]
    machine: dict[str, Any]
    parts: dict[str, PartData1]
    constants: Digest
    program: ProgramData


def is_own_file(path: str) -> bool:
    """Whether a name in a folder is one that only we give."""
    return OWN_FILE.fullmatch(path) is not None


def is_file_of(name: str, path: str) -> bool:
    """Whether ``path`` is where the file called ``name`` may lie."""
    stem, suffix = name.rsplit(".", 1)
    return is_own_file(path) and re.fullmatch(rf"{re.escape(stem)}{_AGAIN}\.{suffix}", path) is not None


def plain_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as JSON has them."""
    found: dict[str, Any] = msgspec.to_builtins(dict(facts), str_keys=True)
    return found
