"""Warnings that point at the user's own line, once per cause."""

from __future__ import annotations

import sys
import sysconfig
import warnings
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent.parent
_LIBRARIES = tuple(
    {str(Path(sysconfig.get_path(name)).resolve()) for name in ("purelib", "platlib", "stdlib")}
    | {str(_PACKAGE), str(_PACKAGE.parent / "passes"), str(_PACKAGE.parent / "backends")}
)


class Warner:
    """Warns once per cause."""

    def __init__(self) -> None:
        self._said: set[Any] = set()

    def __call__(self, cause: Any, message: str) -> None:
        """Warn, unless it was said already, at the caller's line outside of this and other libraries."""
        if cause not in self._said:
            self._said.add(cause)
            warnings.warn(message, stacklevel=users_level())

    def forget(self, cause: Any) -> None:
        """Say it again next time."""
        self._said.discard(cause)


def users_level() -> int:
    """``stacklevel`` for a warning that the caller of this function gives, to point at the user's line."""
    frame = sys._getframe(1)
    level = 1
    while frame is not None:
        if not frame.f_code.co_filename.startswith(_LIBRARIES) and not frame.f_code.co_filename.startswith("<frozen"):
            return level
        if frame.f_back is None:
            break
        frame, level = frame.f_back, level + 1
    return level
