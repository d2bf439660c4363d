"""Plans that last: a folder with JSON for what is decided and safetensors for what is numeric.

    plan.json          version, fingerprints of program and scheduler, steps, blocks, forecast sources, backend, shapes
    plan.safetensors   compute bool [T, B]; timesteps float64 [T]; coefficients float64 [N]; example.*: the captured call

No pickle. A folder is written under a temporary name and renamed, so that what was there before stays whole until the new
one is complete. A program or scheduler that differs is refused with what differs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fxmask.errors import MaskError
from fxmask.mask import Forecast, Mask

VERSION = 1
JSON, TENSORS = "plan.json", "plan.safetensors"


def scheduler_facts(scheduler: Any) -> dict[str, Any]:
    """What a plan depends on in a scheduler: its class and its configuration, as plain data."""
    config = getattr(scheduler, "config", None)
    items = dict(config).items() if isinstance(config, Mapping) else ()
    plain = {key: json.loads(json.dumps(value, default=repr)) for key, value in items if not key.startswith("_")}
    return {"class": type(scheduler).__name__, "config": plain}


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write to, which takes the place of ``folder`` once everything is in it.

    Args:
        folder: is replaced if it holds a plan; any other folder with something in it is refused.

    Raises:
        MaskError: the folder holds something else.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / JSON).exists())):
        raise MaskError(f"{folder} exists and holds no plan; give another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        old = folder.with_name(f"{folder.name}.{os.getpid()}.old.tmp")
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_mask(folder: str | Path, mask: Mask, facts: Mapping[str, Any], example: Mapping[str, Any]) -> None:
    """Write a mask, facts about what it belongs to, and the call that the program was captured with.

    Args:
        folder: is replaced if it holds a plan; any other folder with something in it is refused.
        mask: to save.
        facts: plain data, returned by ``load_plan``.
        example: arguments of a call by name: tensors and plain data, nested.

    Raises:
        MaskError: the folder holds something else, or the call holds an argument that cannot be saved.
    """
    with new_folder(folder) as partial:
        write_mask(partial, mask, facts, example)


def write_mask(folder: Path, mask: Mask, facts: Mapping[str, Any], example: Mapping[str, Any]) -> None:
    """The same into a folder that is there."""
    terms = sorted((mask.forecast.terms if mask.forecast else {}).items())
    flat = [c for _, pairs in terms for _, c in pairs]
    state = {
        "version": VERSION,
        "blocks": list(mask.blocks),
        "program": mask.fingerprint,
        "forecast": [[step, block, [source for source, _ in pairs]] for (step, block), pairs in terms],
        "facts": dict(facts),
    }
    examples: dict[str, torch.Tensor] = {}
    state["example"] = _to_plain(dict(example), examples, "example")
    tensors = {
        **examples,
        "compute": mask.compute,
        "timesteps": torch.tensor(mask.timesteps, dtype=torch.float64),
        "coefficients": torch.tensor(flat, dtype=torch.float64),
    }
    save_file(tensors, folder / TENSORS)
    state["digest"] = digest(folder / TENSORS)
    (folder / JSON).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def load_plan(folder: str | Path) -> tuple[Mask, dict[str, Any], dict[str, Any]]:
    """Read a mask, its facts, and the example call.

    Raises:
        MaskError: there is no plan, it is damaged, or of a version that this fxmask does not know.
    """
    folder = Path(folder)
    if not (folder / JSON).is_file() or not (folder / TENSORS).is_file():
        raise MaskError(f"{folder} holds no plan: it needs {JSON} and {TENSORS}, as written by save()")
    try:
        state = json.loads((folder / JSON).read_text(encoding="utf-8"))
        version = state["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise MaskError(f"{folder / JSON} is damaged: {error}") from error
    if version != VERSION:
        raise MaskError(f"{folder} has version {version} of the format, this fxmask reads version {VERSION}; update fxmask")
    if state.get("digest") != digest(folder / TENSORS):
        raise MaskError(f"{folder / TENSORS} is not the file that {JSON} was written with; copy the folder as a whole")
    tensors = load_file(folder / TENSORS)
    values = iter(tensors["coefficients"].tolist())
    terms = {(step, block): tuple((source, next(values)) for source in sources) for step, block, sources in state["forecast"]}
    mask = Mask(
        tensors["compute"],
        tuple(tensors["timesteps"].tolist()),
        tuple(state["blocks"]),
        Forecast(terms) if terms else None,
        state["program"],
    )
    return mask, state["facts"], _from_plain(state["example"], tensors)


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two nested dictionaries, as readable lines."""
    lines = []
    for key in sorted({*saved, *now}):
        a, b = saved.get(key), now.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: saved {_short(a)}, now {_short(b)}")
    return lines


def _to_plain(value: Any, tensors: dict[str, torch.Tensor], name: str) -> Any:
    """Nested arguments as JSON, tensors aside."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"mapping": [[str(key), _to_plain(item, tensors, f"{name}.{key}")] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_to_plain(item, tensors, f"{name}.{k}") for k, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise MaskError(
        f"argument {name.removeprefix('example.')} of the captured call is a {type(value).__name__}, which cannot be saved"
    )


def _from_plain(state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    ((kind, value),) = state.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "mapping":
        return {key: _from_plain(item, tensors) for key, item in value}
    if kind in ("tuple", "list"):
        return (tuple if kind == "tuple" else list)(_from_plain(item, tensors) for item in value)
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
