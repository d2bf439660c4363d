"""Folders of plans that lie on a hub: ``owner/name``, or ``owner/name@revision``."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

from fxmask.errors import MaskError
from fxmask.storage.about import HUB_NAME

NAME = re.compile(rf"(?P<name>{HUB_NAME.pattern})(@(?P<revision>[\w./-]+))?")
PLANS = ["*.json", "*.safetensors", "*/*.json", "*/*.safetensors", "README.md"]
COMPILED = ["parts/*.pt2"]  # machine code: fetched only where it may run


def local_folder(folder: str | Path, *, allow_compiled: bool = False) -> Path:
    """The folder itself, or where a copy of one on the hub lies.

    Args:
        folder: a folder, or ``owner/name`` on the hub.
        allow_compiled: also fetch the machine code of a package.

    Raises:
        MaskError: there is no such folder, and the hub does not have it or cannot be reached; says what to do.
    """
    named = NAME.fullmatch(folder) if isinstance(folder, str) else None
    if named is None or Path(folder).exists():
        return Path(folder)
    try:
        hub: Any = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise MaskError(
            f"there is no folder {folder!r} here, and a name on the hub needs huggingface_hub: pip install huggingface_hub"
        ) from error
    try:
        wanted = [*PLANS, *(COMPILED if allow_compiled else [])]
        return Path(hub.snapshot_download(named["name"], revision=named["revision"], allow_patterns=wanted))
    except Exception as error:  # of the network, of the hub, of its cache
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise MaskError(
            f"there is no folder {folder!r} here, and the hub did not hand it out ({type(error).__name__}: {reason}). Check "
            "the name and the connection; for a private one log in with `hf auth login`; or fetch it elsewhere with "
            f"`hf download {named['name']} --local-dir FOLDER` and give that folder"
        ) from error
