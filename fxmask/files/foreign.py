"""One place where whatever reading damaged files leads to becomes an error of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from fxmask.errors import FxmaskError

LONG = 300  # characters of a message that are enough


@contextlib.contextmanager
def foreign_errors_as(kind: type[FxmaskError], what: Any, remedy: str) -> Iterator[None]:
    """Errors of ours pass; any other becomes ``kind``.

    Args:
        kind: of the error.
        what: file or folder, and what is the matter with it: ``"plan.json is damaged"``.
        remedy: what to do.

    Raises:
        FxmaskError: of that kind, from whatever was raised inside.
    """
    try:
        yield
    except FxmaskError:
        raise
    except Exception as error:
        raise kind(f"{what}: {_in_short(error)}; {remedy}") from error


def _in_short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= LONG else text[: LONG - 3] + "..."
