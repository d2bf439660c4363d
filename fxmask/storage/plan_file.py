"""Reading plan.json and the files that it names."""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec

from fxmask.errors import MaskError
from fxmask.files.bounded import JSON_BYTES, TENSOR_BYTES, check_json, digest_of, file_digest, read_bounded
from fxmask.files.foreign import foreign_errors_as
from fxmask.files.sealed import differing, fields_in, head_of, parse, unseal
from fxmask.storage.schema import (
    CONSTANTS,
    FORMAT,
    PACKAGE,
    PARTS,
    PLAN,
    TENSORS,
    VERSION,
    FileEntry,
    PackageFile1,
    PlanFile,
    PlanFile1,
    is_file_of,
    is_own_file,
)
from fxmask.storage.tensors import tensor_digests

FOREIGN = "copy the folder as a whole, or save it again"


def read_plan_file(folder: Path) -> PlanFile:
    """plan.json, whatever its version.

    Raises:
        MaskError: there is none, it is damaged, or of a version that this fxmask does not know.
    """
    if not (folder / PLAN).is_file():
        raise MaskError(f"{folder} holds no plan: it needs {PLAN} and {TENSORS}, as written by save()")
    with foreign_errors_as(MaskError, f"{folder / PLAN} is damaged", FOREIGN):
        raw = read_bounded(folder / PLAN, JSON_BYTES)
        head = head_of(raw)
        if head.version not in (1, VERSION):
            raise MaskError(
                f"{folder} has version {head.version} of the format, this fxmask reads versions 1 and {VERSION}; update fxmask"
            )
        state = unseal(raw, PlanFile) if head.version == VERSION else _of_version_1(folder, parse(raw, PlanFile1))
        wrong = [name for name, entry in state.files.items() if not is_file_of(name, entry.path)]
        if wrong or TENSORS not in state.files:
            raise ValueError(f"its files {wrong[:3] or list(state.files)[:3]} are not those of a plan")
        return state


def file_of(folder: Path, state: PlanFile, name: str, limit: int) -> Path:
    """A file that the plan names, once it is seen to be the one that was written.

    Raises:
        MaskError: it is missing, larger than ``limit`` bytes, or another one.
    """
    path = _path_of(folder, state, name, limit)
    with _same_file(path):
        if file_digest(path) != state.files[name].digest:
            raise ValueError("its digest is another")
    return path


def content_of(folder: Path, state: PlanFile, name: str, limit: int = TENSOR_BYTES) -> bytes:
    """The same file's content.

    Raises:
        MaskError: it is not the one that was written.
    """
    path = _path_of(folder, state, name, limit)
    with _same_file(path):
        raw = read_bounded(path, limit)
        if digest_of(raw) != state.files[name].digest:
            raise ValueError(f"its digest is another{_changed_tensors(folder, name, raw)}")
        return raw


def _changed_tensors(folder: Path, name: str, raw: bytes) -> str:
    """Which tensors of a file are not those that plan.json was written with, as far as that can be told."""
    said = {k: v for k, v in fields_in(read_bounded(folder / PLAN, JSON_BYTES)).items() if k.startswith(f"{name}: ")}
    found = tensor_digests(name, raw)
    return differing(said, found) if said and found else ""


def _path_of(folder: Path, state: PlanFile, name: str, limit: int) -> Path:
    """Where a file of the plan lies, if it has the size that it was written with."""
    entry = state.files.get(name)
    path = folder / (entry.path if entry else name)
    with _same_file(path):
        if entry is None:
            raise ValueError(f"{PLAN} does not name it")
        if entry.size > limit:
            raise ValueError(f"it has {entry.size} bytes, more than the {limit} that such a file may have")
        found = path.stat().st_size
        if not path.is_file() or found != entry.size:
            raise ValueError(f"it has {found} bytes, not {entry.size}")
        return path


def _same_file(path: Path) -> contextlib.AbstractContextManager[None]:
    return foreign_errors_as(MaskError, f"{path} is not the file that {PLAN} was written with", FOREIGN)


def owned_files(path: Path) -> set[str]:
    """Names of the files that belong to a plan.json; none if there is no plan.json.

    Raises:
        MaskError: it is something else's, or so damaged that nobody can tell.
    """
    if not path.exists():
        return set()
    with foreign_errors_as(MaskError, f"{path} is no plan of fxmask", "give another folder, or remove that file"):
        raw = read_bounded(path, JSON_BYTES)
        head = head_of(raw)
        if head.format == FORMAT:
            files = parse(raw, _Owner).files.values()
            return {entry.path for entry in files if is_own_file(entry.path)}
        if head.version != 1 or head.format:
            raise ValueError(f"it says version {head.version} of {head.format or 'no format'}")
        parse(raw, PlanFile1)
        return {TENSORS, *_package_names_1(path.parent)}


class _Owner(msgspec.Struct, frozen=True):
    """Of a plan.json of whatever version after the first, the files."""

    files: dict[str, FileEntry]


def _package_names_1(folder: Path) -> set[str]:
    """The files of a package of version 1 beside its plan, if it is one."""
    with contextlib.suppress(OSError, ValueError):  # whose else it is: it stays
        package = parse(read_bounded(folder / PACKAGE, JSON_BYTES), PackageFile1)
        names = {PACKAGE, CONSTANTS, *(f"{PARTS}/{name}.pt2" for name in package.parts)}
        return {name for name in names if is_own_file(name)}
    return set()


def _of_version_1(folder: Path, old: PlanFile1) -> PlanFile:
    """A plan of version 1 as one of this version."""
    files = {TENSORS: FileEntry(TENSORS, (folder / TENSORS).stat().st_size, old.digest)}
    if (folder / PACKAGE).is_file():
        raw = check_json(read_bounded(folder / PACKAGE, JSON_BYTES))
        package = parse(raw, PackageFile1)
        files[PACKAGE] = FileEntry(PACKAGE, len(raw), digest_of(raw))
        named = {CONSTANTS: package.constants, **{f"{PARTS}/{name}.pt2": part.digest for name, part in package.parts.items()}}
        for name, digest in named.items():
            if is_own_file(name) and (folder / name).is_file():
                files[name] = FileEntry(name, (folder / name).stat().st_size, digest)
    return PlanFile(FORMAT, VERSION, files, old.blocks, old.program, old.forecast, old.facts, old.example)
