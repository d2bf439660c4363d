"""Files that are on the disk before they count, and that take another's place at one moment."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_new(path: Path, content: bytes) -> None:
    """Write a file that is not there yet, down to the disk.

    Raises:
        OSError: it is there, or cannot be written.
    """
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes, partial: Path) -> None:
    """Give a file this content: whoever looks sees the old one or the new one.

    Args:
        path: the file.
        content: all of it.
        partial: where it is written first, in the same folder; what lies there is a leftover.

    Raises:
        OSError: it cannot be written; the old one is still there.
    """
    try:
        partial.unlink(missing_ok=True)
        write_new(partial, content)
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Names in the folder are on the disk, where the system can promise that."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
