"""Editing saved plans and packages so that their digests fit again: what somebody does who means to."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from fxmask.storage.schema import PACKAGE, PLAN


def plan_state(folder: Path) -> dict[str, Any]:
    """plan.json without its digest."""
    return {key: value for key, value in json.loads((folder / PLAN).read_text()).items() if key != "digest"}


def place_of(folder: Path, name: str) -> Path:
    """Where a file of the plan lies."""
    return folder / plan_state(folder)["files"][name]["path"]


def reseal(folder: Path, **changes: Any) -> None:
    """Change entries of plan.json, and make every size and digest fit what is there."""
    state = {**plan_state(folder), **changes}
    for entry in state["files"].values():
        if (folder / entry["path"]).is_file():
            content = (folder / entry["path"]).read_bytes()
            entry.update(size=len(content), digest=hashlib.sha256(content).hexdigest())
    write_sealed(folder / PLAN, json.dumps(state))


def write_sealed(path: Path, text: str) -> None:
    """A file whose digest fits, whatever else is in it."""
    rest = " " + text.lstrip()[1:]
    path.write_text(f'{{"digest": "{hashlib.sha256(rest.encode()).hexdigest()}",{rest}')


def edit_package(folder: Path, **changes: Any) -> None:
    """Change entries of package.json likewise."""
    path = place_of(folder, PACKAGE)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    reseal(folder)
