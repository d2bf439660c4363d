"""A folder that holds a plan, at every look, beside whatever else lies in it.

    lock ─▶ note what will be written ─▶ write files under new names ─▶ replace plan.json ─▶ remove the old files

plan.json names every file that belongs to it, so replacing it is the one moment at which the plan changes. What was noted and
is not named by plan.json is removed: after an error at once, after a kill at the next save. Nothing else is ever removed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fxmask.errors import FxmaskError, MaskError
from fxmask.files.bounded import JSON_BYTES, digest_of, read_bounded
from fxmask.files.foreign import foreign_errors_as
from fxmask.files.lock import NOFOLLOW, locked
from fxmask.files.replace import replace_file, sync_folder, write_new
from fxmask.files.sealed import seal
from fxmask.storage.plan_file import owned_files
from fxmask.storage.schema import PARTS, PLAN, FileEntry, is_own_file

LOCK = ".fxmask.lock"
NOTES = ".fxmask.writing"  # names of files that may be removed where plan.json does not name them, one a line
PARTIAL = ".fxmask.partial"
MARKS = frozenset({LOCK, NOTES, PARTIAL})
SYSTEM = frozenset({"lost+found", ".DS_Store"})  # what a file system puts into an empty folder
ELSEWHERE = "check that there is room and that the folder may be written, or give another one"


class Exchange:
    """Files that are written beside the old ones, until ``commit``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.files: dict[str, FileEntry] = {}

    def add(self, name: str, content: bytes) -> None:
        """Write a file, or keep the one of that content; the digest is part of its name where the name is taken.

        Raises:
            OSError: it cannot be written.
        """
        digest = digest_of(content)
        stem, dot, suffix = name.rpartition(".")
        paths = (name, f"{stem}-{digest[:16]}{dot}{suffix}")
        kept = next((path for path in paths if _holds(self._folder / path, content)), None)
        path = kept or (paths[1] if os.path.lexists(self._folder / name) else name)
        self.files[name] = FileEntry(path, len(content), digest)
        if kept is None:
            _note(self._folder, path)
            self._write(self._folder / path, content)

    def _write(self, place: Path, content: bytes) -> None:
        place.parent.mkdir(exist_ok=True)
        place.unlink(missing_ok=True)
        write_new(place, content)

    def commit(self, state: Mapping[str, Any], others: Mapping[str, str] | None = None) -> None:
        """Make these files the plan.

        Args:
            state: what goes into plan.json.
            others: digests of what is in the other files, by name; see ``seal``.

        Raises:
            OSError: plan.json cannot be written; the old plan is still there.
        """
        for place in {(self._folder / entry.path).parent for entry in self.files.values()}:
            sync_folder(place)
        replace_file(self._folder / PLAN, seal(state, indent=1, others=others), self._folder / PARTIAL)


@contextlib.contextmanager
def exchange(folder: str | Path) -> Iterator[Exchange]:
    """Replace the plan in a folder; the block ends with ``commit``.

    Args:
        folder: is made if it is not there; a link to a folder is followed. Other files in it stay.

    Raises:
        MaskError: the folder holds something else, or cannot be written.
    """
    with foreign_errors_as(MaskError, f"{folder} cannot be written", ELSEWHERE):
        place = Path(os.path.realpath(folder))
        made = _make(place)
        try:
            with locked(place / LOCK):
                require_ours(place, folder)
                _sweep(place)  # of a save that was killed
                try:
                    for name in owned_files(place / PLAN):
                        _note(place, name)
                    yield Exchange(place)
                finally:
                    _sweep(place)
        finally:
            if made:
                with contextlib.suppress(OSError):
                    place.rmdir()  # if nothing came into it


def require_ours(place: Path, folder: str | Path | None = None) -> None:
    """Refuse to write into a folder that is something else's. What an interrupted save left there is ours.

    Raises:
        MaskError: there is a file in its place, or it has something in it and no plan of ours.
    """
    folder = place if folder is None else folder
    if (place / PARTS).is_symlink():
        raise MaskError(f"{place / PARTS} is a link, and what it leads to may be someone else's; give another folder")
    if (place / PLAN).exists():
        owned_files(place / PLAN)
    elif os.path.lexists(place) and (not place.is_dir() or _foreign(place)):
        raise MaskError(f"{folder} exists and holds no plan; give another folder")


def check_destination(folder: str | Path) -> None:
    """Refuse now what ``exchange`` would refuse, before the work is done.

    Raises:
        MaskError: the folder holds something else, or cannot be written.
    """
    with foreign_errors_as(MaskError, f"{folder} cannot be written", ELSEWHERE):
        place = Path(os.path.realpath(folder))
        require_ours(place, folder)
        nearest = next(parent for parent in (place, *place.parents) if parent.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise PermissionError(f"{nearest} is no folder that may be written")


def read_again(folder: Path, read: Callable[[], Any]) -> Any:
    """What ``read`` returns. Where it fails and the plan was replaced meanwhile, it reads the new one.

    Raises:
        FxmaskError: of ``read``, for a plan that stays as it is.
    """
    for _ in range(1000):
        before = _look(folder)
        try:
            return read()
        except FxmaskError:
            if _look(folder) == before:
                raise
    return read()


def _look(folder: Path) -> tuple[int, ...] | None:
    """Changes when plan.json is replaced, also by one that says the same."""
    with contextlib.suppress(OSError):
        found = (folder / PLAN).stat()
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    return None


def _make(place: Path) -> bool:
    """Make the folder; whether it was not there."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        place.mkdir()
    except FileExistsError:
        return False
    return True


def _foreign(place: Path) -> set[str]:
    """What lies in a folder besides what we noted down."""
    noted = {Path(name).parts[0] for name in _noted(place)}
    return {path.name for path in place.iterdir()} - MARKS - SYSTEM - noted


def _holds(path: Path, content: bytes) -> bool:
    """Whether a file of ours has that content already."""
    own = path.is_file() and not path.is_symlink()
    return own and path.stat().st_size == len(content) and path.read_bytes() == content


def _note(place: Path, name: str) -> None:
    opened = os.open(place / NOTES, os.O_WRONLY | os.O_CREAT | os.O_APPEND | NOFOLLOW, 0o666)
    with open(opened, "a", encoding="utf-8") as notes:
        notes.write(name + "\n")


def _noted(place: Path) -> set[str]:
    """Names that were noted down and are of the kind that we give."""
    with contextlib.suppress(OSError, ValueError):
        lines = read_bounded(place / NOTES, JSON_BYTES).decode("utf-8", "replace").splitlines()
        return {line for line in lines if is_own_file(line)}
    return set()


def _sweep(place: Path) -> None:
    """Remove what was noted down and does not belong to the plan, and then the notes."""
    kept = owned_files(place / PLAN) if (place / PLAN).exists() else set()
    with contextlib.suppress(OSError):
        for name in _noted(place) - kept:
            (place / name).unlink(missing_ok=True)
        (place / PARTIAL).unlink(missing_ok=True)
        if (place / PARTS).is_dir() and not any((place / PARTS).iterdir()):
            (place / PARTS).rmdir()
        (place / NOTES).unlink(missing_ok=True)
