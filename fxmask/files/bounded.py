"""Bounds on what is read, checked before it is read or parsed."""

from __future__ import annotations

import hashlib
import re
import stat
from pathlib import Path

import numpy as np

MEBI = 2**20
JSON_BYTES = 32 * MEBI
JSON_DEPTH = 100
JSON_CONTAINERS = 2_000_000  # lists and objects: two bytes of text are up to 64 bytes of memory
TENSOR_BYTES = 1024 * MEBI

_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_OPENING, _CLOSING = frozenset(b"[{"), frozenset(b"]}")


def read_bounded(path: Path, limit: int) -> bytes:
    """All of a regular file.

    Raises:
        ValueError: it is larger than ``limit`` bytes, or no regular file.
        OSError: it cannot be read.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no regular file")
    if found.st_size > limit:
        raise ValueError(f"it has {found.st_size} bytes, more than the {limit} that such a file may have")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it has more than {limit} bytes")
    return content


def check_json(content: bytes) -> bytes:
    """The same text, if parsing it takes bounded memory and stack.

    Raises:
        ValueError: it is nested too deeply, has too many lists and objects, or is too long.
    """
    if len(content) > JSON_BYTES:
        raise ValueError(f"it has {len(content)} bytes, more than the {JSON_BYTES} that such a file may have")
    marks = np.frombuffer(_STRING.sub(b"", content), dtype=np.uint8)
    marks = marks[np.isin(marks, list(_OPENING | _CLOSING))]
    opens = np.isin(marks, list(_OPENING))
    if opens.sum() > JSON_CONTAINERS:
        raise ValueError(f"it holds more than {JSON_CONTAINERS} lists and objects")
    if len(opens) and np.cumsum(np.where(opens, 1, -1)).max() > JSON_DEPTH:
        raise ValueError(f"it is nested more than {JSON_DEPTH} deep")
    return content


def digest_of(content: bytes) -> str:
    """SHA-256 as text."""
    return hashlib.sha256(content).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in parts."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
