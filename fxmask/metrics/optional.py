"""Libraries that only some metrics need."""

from __future__ import annotations

import importlib
from typing import Any

from fxmask.errors import InputError


def optional(name: str) -> Any:
    """A module of the extra ``evaluation``.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"this metric needs {name.split('.')[0]}: pip install 'fxmask[evaluation]' ({error})") from error
