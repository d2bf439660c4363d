"""What is looked at of a ``.pt2`` file, a zip archive, before PyTorch unpacks it: its names may lead out of the folder."""

from __future__ import annotations

import re
import stat
import zipfile
from pathlib import Path

from fxmask.errors import BackendError

MOST_ENTRIES = 10_000
MOST_BYTES = 2 * 2**30  # unpacked
_NAME = re.compile(r"[\w.+=@-]+(/[\w.+=@-]+)*/?", re.ASCII)


def check_archive(path: Path) -> None:
    """Refuse an archive whose entries would be written elsewhere, or which unpacks to more than any package.

    Raises:
        BackendError: it is no such archive; names the entry.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            damaged = None if _problem(entries) else archive.testzip()
    except (OSError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile, EOFError) as error:
        raise BackendError(f"{path} cannot be loaded: it is no package ({error}); export it again") from error
    problem = _problem(entries) or (f"entry {damaged!r} is damaged" if damaged else None)
    if problem is not None:
        raise BackendError(f"{path} cannot be loaded: {problem}; copy the folder as a whole, or export it again")


def _problem(entries: list[zipfile.ZipInfo]) -> str | None:
    names = [entry.filename for entry in entries]
    if len(names) > MOST_ENTRIES or sum(entry.file_size for entry in entries) > MOST_BYTES:
        return f"it unpacks to {len(names)} files of {sum(entry.file_size for entry in entries)} bytes"
    if len(set(names)) != len(names):
        return "two of its entries have one name"
    wrong = next((entry.orig_filename for entry in entries if not _is_plain(entry)), None)
    return None if wrong is None else f"its entry {wrong!r} would not be written into its folder"


def _is_plain(entry: zipfile.ZipInfo) -> bool:
    """Whether an entry is a file or folder inside of the archive's folder."""
    link = stat.S_ISLNK(entry.external_attr >> 16)
    inside = _NAME.fullmatch(entry.orig_filename) is not None and not {".", ".."} & set(entry.orig_filename.split("/"))
    return inside and not link and entry.orig_filename == entry.filename
