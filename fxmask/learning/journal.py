"""A journal of measurements: what was measured once is not measured again, also in a later process."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import msgspec
from msgspec import Meta

from fxmask.errors import InputError
from fxmask.files.bounded import JSON_BYTES, read_bounded
from fxmask.files.foreign import foreign_errors_as
from fxmask.files.lock import locked
from fxmask.files.replace import replace_file
from fxmask.files.sealed import head_of, parse, seal, unseal
from fxmask.learning.ranks import Group

logger = logging.getLogger(__name__)
FORMAT = "fxmask checkpoint"
VERSION = 2

_Units = Annotated[float, Meta(ge=0)]
_Entries = dict[str, tuple[_Units, Any]]


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: Literal["fxmask checkpoint"]
    version: Literal[2]
    identity: str
    entries: _Entries


class _File1(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Version 1 had no digest, and knew little of what it belongs to."""

    version: Literal[1]
    identity: str
    entries: _Entries


class Worker(Protocol):
    """Whoever counts the work."""

    units: float


class Journal:
    """Results by key, in memory and in a JSON file that is replaced as a whole.

    Several learners of the same run may share the file: each keeps what the others measured. Where the file cannot be written,
    one warning says so, and learning goes on.

    Args:
        path: the file, or ``None`` for memory only.
        identity: of what is measured (model, weights, recorded runs, options); a file with another one is refused.
        group: of ranks that learn together; all go on from the first one's file, which alone is written.
        old_identity: what version 1 of the format called it.

    Attributes:
        replayed: work that was not repeated because the file had it, in full sampling runs.

    Raises:
        InputError: the file is damaged, or belongs to another run.
    """

    def __init__(
        self, path: str | Path | None, identity: str, group: Group | None = None, old_identity: str | None = None
    ) -> None:
        group = group or Group.single()
        self.path = Path(os.path.realpath(path)) if path is not None and group.rank == 0 else None
        self.identity = hashlib.sha256(identity.encode()).hexdigest()
        self._old = None if old_identity is None else hashlib.sha256(old_identity.encode()).hexdigest()[:16]
        self.replayed = 0.0
        self._entries: dict[str, tuple[float, Any]] = {}
        self._fresh: set[str] = set()
        self._seen: tuple[int, ...] | None = None  # the file that was read or written last
        self._warned = False
        if self.path is not None and self.path.exists():
            self._entries = self._read(self.path)
            logger.info("going on from %d measurements in %s", len(self._entries), self.path)
        self._entries = group.agree(self._entries)

    def get(self, key: str, measure: Callable[[], Any], worker: Worker, share: float = 1.0) -> Any:
        """The result of that key; measured now if it is not known.

        Args:
            key: of the result.
            measure: returns it, as JSON has it.
            worker: whose units it takes.
            share: of the images that are learned from, which those are that the worker's units are of.

        Raises:
            InputError: the file has become another run's.
        """
        name = hashlib.sha256(key.encode()).hexdigest()[:24]
        if name not in self._entries:
            before = worker.units
            value = json.loads(json.dumps(measure()))  # what a later process will read, now
            self._entries[name] = (worker.units - before, value)
            self._fresh.add(name)
            self._save()
        elif name not in self._fresh:
            self.replayed += self._entries[name][0] * share
            self._fresh.add(name)
        return self._entries[name][1]

    def _save(self) -> None:
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with locked(self.path.with_name(f".{self.path.name}.lock")):
                self._merge(self.path)
                self._write(self.path)
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            self._warn(error)

    def _merge(self, path: Path) -> None:
        """Take over what another learner wrote since."""
        if path.exists() and _stamp(path) != self._seen:
            self._entries = {**self._read(path), **self._entries}

    def _write(self, path: Path) -> None:
        entries = {key: (units, _to_json(value)) for key, (units, value) in self._entries.items()}
        state = {"format": FORMAT, "version": VERSION, "identity": self.identity, "entries": entries}
        replace_file(path, seal(state), path.with_name(f".{path.name}.partial"))
        self._seen = _stamp(path)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"checkpoint {self.path} cannot be written ({error}); learning goes on, but what is measured from now on is "
                "measured again if it is interrupted",
                stacklevel=2,
            )

    def _read(self, path: Path) -> dict[str, tuple[float, Any]]:
        with foreign_errors_as(InputError, f"checkpoint {path} is damaged", "delete it to learn from the start"):
            stamp, raw = _stamp(path), read_bounded(path, JSON_BYTES)
            version = head_of(raw).version
            state = parse(raw, _File1) if version == 1 else unseal(raw, _File) if version == VERSION else None
            if state is None:
                raise InputError(f"checkpoint {path} has version {version} of the format; update fxmask, or delete it")
            if state.identity != (self._old if version == 1 else self.identity):
                raise InputError(
                    f"checkpoint {path} belongs to another run (model, weights, recorded runs, scheduler, noise, seed, effort "
                    "or limits differ); delete it, or give another file"
                )
            if version == 1:
                logger.warning(
                    "checkpoint %s is of an older fxmask; delete it if weights or recorded runs are others now", path
                )
            self._seen = stamp
            return {key: (units, _from_json(value)) for key, (units, value) in state.entries.items()}


def _stamp(path: Path) -> tuple[int, ...]:
    """Changes when the file is replaced."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _to_json(value: Any) -> Any:
    """Results with numbers that JSON has no form for."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, Mapping):
        return {"mapping": [[key, _to_json(item)] for key, item in value.items()]}
    return [_to_json(item) for item in value] if isinstance(value, (list, tuple)) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        ((kind, inner),) = value.items()
        return {key: _from_json(item) for key, item in inner} if kind == "mapping" else float(inner)
    return [_from_json(item) for item in value] if isinstance(value, list) else value
