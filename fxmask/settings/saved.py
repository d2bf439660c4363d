"""Plans of several settings in one folder: a saved plan each, in folders of their own, and a list of them.

folder/settings.json           the list, replaced last
folder/<digest of setting>/    what AcceleratedModel.save writes
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fxmask.errors import InputError, MaskError
from fxmask.files.bounded import JSON_BYTES, read_bounded
from fxmask.files.foreign import foreign_errors_as
from fxmask.files.replace import replace_file
from fxmask.frontend.capture import capture
from fxmask.frontend.modules import module_device
from fxmask.learning.effort import Limits
from fxmask.learning.outcome import Outcome
from fxmask.runtime.checks import Check, Checks
from fxmask.runtime.model import AcceleratedModel
from fxmask.settings.components import denoisers_of, original_of
from fxmask.settings.key import Setting
from fxmask.settings.known import Known
from fxmask.settings.pipeline import install
from fxmask.settings.session import Session
from fxmask.settings.together import joined
from fxmask.storage.placed import placed_call
from fxmask.storage.plan_file import FOREIGN
from fxmask.storage.plans import facts_of, load_plan, save_mask

LIST = "settings.json"
FORMAT, VERSION = "fxmask settings", 1


def save_settings(session: Session, folder: Path) -> None:
    """Write the plans of all settings that have one.

    Raises:
        InputError: none has.
        MaskError: the folder holds something else or cannot be written.
    """
    for setting in list(session.settings):
        session.plan_all(setting)
    if not any(known.mask is not None for part in session.parts for known in part.settings.values()):
        raise InputError("no setting has a plan yet: the first call of the pipeline at a setting is recorded. Call it first")
    folder.mkdir(parents=True, exist_ok=True)
    entries = [entry for part in session.parts for entry in _save_part(part, folder)]
    outcome = {name: value for name, value in vars(session.outcome).items() if value is not None}
    content = {"format": FORMAT, "version": VERSION, "outcome": outcome, "component": session.component, "settings": entries}
    if session.others:
        content["components"] = [part.component for part in session.parts]
    try:
        replace_file(folder / LIST, json.dumps(content, indent=1).encode(), folder / f"{LIST}.partial")
    except OSError as error:
        raise MaskError(f"the settings cannot be written to {folder}: {error}") from error


def _save_part(session: Session, folder: Path) -> list[dict[str, Any]]:
    """Write the plans of one denoiser; what the list says of each."""
    entries = []
    for setting, known in session.settings.items():
        data: dict[str, Any] = {"setting": setting.to_data()}
        if session.shared:
            data["component"] = session.component
        if known.mask is None:
            if known.unused:
                entries.append({**data, "unused": True})
            continue
        assert session.program is not None
        named = data["setting"] if not session.shared else [session.component, data["setting"]]
        name = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]
        facts = {
            **known.facts,
            "model": type(session.model.original).__name__,
            "roles": dict(session.given_roles()),
            "start": 0,
            "backend": session.backend,
            "mode": session.mode,
        }
        save_mask(folder / name, known.mask, facts, session.program.example.arguments)
        entries.append({"folder": name, **data, "effort": known.effort, "checks": _checks_to_data(known.checks)})
    return entries


def load_settings(folder: Path, pipe: Any, *, backend: str, mode: str | None, progress: bool) -> Any:
    """Accelerate a pipeline with what ``save_settings`` wrote; the pipeline is returned.

    Raises:
        MaskError: the folder holds nothing of that kind, or the plans are of another model.
    """
    data = _read(folder)
    with foreign_errors_as(MaskError, f"{folder / LIST} is damaged", FOREIGN):
        names = [str(name) for name in data.get("components", [data["component"]])]
        outcome = Outcome(**{str(k): float(v) for k, v in data["outcome"].items()})
        entries = [(str(x.get("component", names[0])), Setting.from_data(x["setting"]), x) for x in data["settings"]]
    sessions = {
        name: Session(
            AcceleratedModel.without_plan(original_of(pipe, name)),
            name,
            outcome,
            limits=Limits(),
            backend=backend,
            mode=mode,
            progress=progress,
        )
        for name in denoisers_of(pipe, names)
    }
    for component, setting, entry in entries:
        if component not in sessions:
            raise MaskError(f"{folder / LIST} is damaged: {component!r} is none of {names}")
        _load_plan(folder, sessions[component], setting, entry)
    install(pipe, joined(list(sessions.values())))
    return pipe


def _load_plan(folder: Path, session: Session, setting: Setting, entry: Mapping[str, Any]) -> None:
    """Read the plan of one setting."""
    model = session.model.original
    if entry.get("unused") is True:
        session.settings[setting] = Known(unused=True)
        return
    with foreign_errors_as(MaskError, f"{folder / LIST} is damaged", FOREIGN):
        name, effort, checks = str(entry["folder"]), str(entry["effort"]), _checks_of(entry["checks"])
    if Path(name).name != name:
        raise MaskError(f"{folder / LIST} is damaged: {name!r} is no folder beside it")
    place = folder / name
    mask, facts, example = load_plan(place)
    facts = facts_of(place, mask, facts)
    if session.program is None:
        roles = {key.split(".")[0]: role for key, role in facts["roles"].items()}
        with foreign_errors_as(MaskError, f"this {type(model).__name__} cannot run the call saved in {place}", FOREIGN):
            session.program = capture(model, placed_call(example, module_device(model)), roles=roles)
    if mask.fingerprint is None or not session.program.fits(mask.fingerprint):
        raise MaskError(f"the plans in {folder} were made for another model than this {type(model).__name__}")
    about = {k: v for k, v in facts.items() if k not in ("model", "roles", "start", "backend", "mode")}
    session.settings[setting] = Known(mask=mask, checks=checks, facts=about, effort=effort)


def _read(folder: Path) -> Any:
    place = folder / LIST
    if not place.is_file():
        raise MaskError(f"{folder} holds no plans of a pipeline; fxmask.save(pipe, folder) writes them")
    with foreign_errors_as(MaskError, f"{place} is damaged", FOREIGN):
        data = json.loads(read_bounded(place, JSON_BYTES))
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']!r}")
        if data["version"] != VERSION:
            raise ValueError(f"its version is {data['version']}, and this fxmask knows {VERSION}")
        return data


def _checks_to_data(checks: Checks | None) -> Any:
    if checks is None:
        return None
    steps = [[k, list(c.sources), list(c.coefficients), c.expected, c.share] for k, c in checks.by_step.items()]
    return {"steps": steps, "error": checks.error, "lanes": list(checks.lanes), "max_error": checks.max_error}


def _checks_of(data: Any) -> Checks | None:
    if data is None:
        return None
    by_step = {
        int(k): Check(tuple(map(int, sources)), tuple(map(float, coefficients)), float(expected), float(share))
        for k, sources, coefficients, expected, share in data["steps"]
    }
    bound = data["max_error"]
    return Checks(by_step, float(data["error"]), tuple(map(float, data["lanes"])), None if bound is None else float(bound))
