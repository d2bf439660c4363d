"""A journal of measurements: what was measured once is not measured again, also in a later process."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from fxmask.errors import InputError
from fxmask.learning.ranks import Group

logger = logging.getLogger(__name__)
VERSION = 1


class Worker(Protocol):
    """Whoever counts the work."""

    units: float


class Journal:
    """Results by key, in memory and in a JSON file that is replaced as a whole.

    Args:
        path: the file, or ``None`` for memory only.
        identity: of what is measured (program, trajectories, seed); a file with another one is refused.
        group: of ranks that learn together; all go on from the first one's file, which alone is written.

    Attributes:
        replayed: work that was not repeated because the file had it, in full sampling runs.

    Raises:
        InputError: the file is damaged, or belongs to another run.
    """

    def __init__(self, path: str | Path | None, identity: str, group: Group | None = None) -> None:
        group = group or Group.single()
        self.path = Path(path) if path is not None and group.rank == 0 else None
        self.identity = hashlib.sha256(identity.encode()).hexdigest()[:16]
        self.replayed = 0.0
        self._entries: dict[str, tuple[float, Any]] = {}
        self._fresh: set[str] = set()
        if self.path is not None and self.path.exists():
            try:
                state = json.loads(self.path.read_text(encoding="utf-8"))
                version, found, entries = state["version"], state["identity"], state["entries"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"checkpoint {self.path} is damaged ({error}); delete it to learn from the start") from error
            if version != VERSION or found != self.identity:
                raise InputError(
                    f"checkpoint {self.path} belongs to another run (model, scheduler, noise, seed, effort or limits differ); "
                    "delete it, or give another file"
                )
            self._entries = {key: (units, value) for key, (units, value) in entries.items()}
            logger.info("going on from %d measurements in %s", len(self._entries), self.path)
        self._entries = group.agree(self._entries)

    def get(self, key: str, measure: Callable[[], Any], worker: Worker) -> Any:
        """The result of that key; measured now if it is not known."""
        name = hashlib.sha256(key.encode()).hexdigest()[:24]
        if name not in self._entries:
            before = worker.units
            value = json.loads(json.dumps(measure()))  # what a later process will read, now
            self._entries[name] = (worker.units - before, value)
            self._fresh.add(name)
            self._save()
        elif name not in self._fresh:
            self.replayed += self._entries[name][0]
            self._fresh.add(name)
        return self._entries[name][1]

    def _save(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".tmp")
        state = {"version": VERSION, "identity": self.identity, "entries": self._entries}
        partial.write_text(json.dumps(state), encoding="utf-8")
        os.replace(partial, self.path)
