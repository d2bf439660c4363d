"""Plans of several settings in one folder: a saved plan each, in folders of their own, and a list of them.

folder/settings.json           the list, with the digest of each plan; replaced last
folder/<digest of setting>/    what AcceleratedModel.save writes
folder/README.md, *.png        for people

Version 1 of the list had no digests.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxmask._torch import pytree
from fxmask.errors import InputError, MaskError
from fxmask.files.bounded import JSON_BYTES, digest_of, file_digest, read_bounded
from fxmask.files.foreign import foreign_errors_as
from fxmask.files.replace import replace_file
from fxmask.files.sealed import differing, fields_in, fields_now, head_of, parse, seal, unseal
from fxmask.frontend.offloading import onloaded
from fxmask.learning.effort import Limits
from fxmask.learning.outcome import Outcome
from fxmask.passes.rectify import rectify
from fxmask.runtime.checks import Check, Checks
from fxmask.runtime.model import AcceleratedModel
from fxmask.runtime.quality import MEASURED, Quality
from fxmask.settings.components import denoisers_of, original_of
from fxmask.settings.key import MAIN, Setting, setting_around, unlike
from fxmask.settings.known import Known
from fxmask.settings.pipeline import install, restore
from fxmask.settings.session import Session
from fxmask.settings.together import joined
from fxmask.storage.about import LEARNED, PLAN_FACTS, VERSIONS, base_model, kept_facts, plan_facts, versions
from fxmask.storage.card import Entry, write_card
from fxmask.storage.plan_file import FOREIGN
from fxmask.storage.plans import facts_of, load_plan, save_mask
from fxmask.storage.saved_program import capture_saved, refuse_other_program
from fxmask.storage.schema import PLAN

logger = logging.getLogger(__name__)
LIST = "settings.json"
FORMAT, VERSION = "fxmask settings", 2


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
    shown: list[Entry] = []
    entries = [entry for part in session.parts for entry in _save_part(part, folder, shown)]
    outcome = {name: value for name, value in vars(session.outcome).items() if value is not None}
    content = {"format": FORMAT, "version": VERSION, "outcome": outcome, "component": session.component, "settings": entries}
    if session.others:
        content["components"] = [part.component for part in session.parts]
    try:
        replace_file(folder / LIST, seal(content, indent=1), folder / f"{LIST}.partial")
    except OSError as error:
        raise MaskError(f"the settings cannot be written to {folder}: {error}") from error
    models = list(dict.fromkeys(type(part.model.original).__name__ for part in session.parts))
    write_card(folder, shown, model=" and ".join(models), component=session.component)


def _save_part(session: Session, folder: Path, shown: list[Entry]) -> list[dict[str, Any]]:
    """Write the plans of one denoiser; what the list says of each. For the card they are added to ``shown``."""
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
        facts = _facts(session, setting, known)
        save_mask(folder / name, known.mask, facts, session.program.example.arguments)
        raw = read_bounded(folder / name / PLAN, JSON_BYTES)
        found = {"folder": name, "plan": digest_of(raw), "plan_fields": fields_in(raw), **data}
        entries.append({**found, "effort": known.effort, "checks": _checks_to_data(known.checks)})
        title = f"{session.component}: {setting}" if session.shared else str(setting)
        shown.append(Entry(title, known.mask, facts, f"{name}.png"))
    return entries


def _facts(session: Session, setting: Setting, known: Known) -> dict[str, Any]:
    """What a plan says of itself."""
    assert known.mask is not None
    assert session.program is not None
    facts = {
        **known.facts,
        **_learned(session, setting, known),
        "model": type(session.model.original).__name__,
        "roles": dict(session.given_roles()),
        "start": 0,
        "backend": session.backend,
        "mode": session.mode,
        PLAN_FACTS: plan_facts(rectify(session.program, known.mask), session.program.batch_size),
        VERSIONS: versions(),
        **base_model(session.model.original),
    }
    if Quality.of_facts(facts, known.mask) is None:
        facts.pop(MEASURED, None)  # of another plan
    return facts


def _learned(session: Session, setting: Setting, known: Known) -> dict[str, Any]:
    """What a plan was learned on, as far as it is known here; of a plan that was loaded, what its folder said."""
    if not known.runs:
        return {}
    asked = {name: value for name, value in vars(session.outcome).items() if value is not None}
    asked = asked or {"speedup": 1 / session.outcome.budget}
    seeds = sorted({seed for run in known.runs for seed in seeds_of(run)})
    said = {name: value for name, value in setting.arguments if name in MAIN and value is not None}
    images = sum(run.batch_size for run in known.runs)
    learned = {"runs": len(known.runs), "images": images, "seeds": seeds, "effort": known.effort, "asked": asked, **said}
    return {LEARNED: {name: value for name, value in learned.items() if value not in ([], {})}}


def seeds_of(run: Any) -> list[int]:
    """Seeds of the generators that a recorded call was given."""
    arguments = getattr(getattr(run, "run", None), "arguments", None)
    given = [] if arguments is None else pytree.tree_leaves((list(arguments.args), dict(arguments.kwargs)))
    return [x.initial_seed() for x in given if isinstance(x, torch.Generator)]


def load_settings(folder: Path, pipe: Any, *, backend: str, mode: str | None, progress: bool) -> Any:
    """Accelerate a pipeline with what ``save_settings`` wrote; the pipeline is returned.

    Raises:
        MaskError: the folder holds nothing of that kind, or the plans are of another model.
    """
    names, outcome, entries = read_settings(folder)
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
    unknown = next((entry.component for entry in entries if entry.component not in sessions), None)
    if unknown is not None:
        raise MaskError(f"{folder / LIST} is damaged: {unknown!r} is none of {names}")
    install(pipe, joined(list(sessions.values())))
    try:
        for entry in entries:
            with onloaded(sessions[entry.component].model):
                _load_plan(folder, sessions[entry.component], entry)
    except BaseException:
        restore(pipe)
        raise
    now = setting_around(pipe, [session.model.original for session in sessions.values()])
    news = unlike([entry.setting for entry in entries], now, arguments=False)
    if news:
        logger.warning("no plan in %s is for this pipeline as it is now, so it is recorded and planned anew: %s", folder, news)
    return pipe


def _load_plan(folder: Path, session: Session, entry: SavedSetting) -> None:
    """Read the plan of one setting."""
    model, place = session.model.original, entry.place
    if place is None:
        session.settings[entry.setting] = Known(unused=True)
        return
    mask, facts, example = load_plan(place)
    facts = facts_of(place, mask, facts)
    if session.program is None:
        session.program = capture_saved(place, model, mask, facts, example)
    refuse_other_program(place, mask, facts, session.program)
    session.settings[entry.setting] = Known(mask=mask, checks=entry.checks, facts=kept_facts(facts), effort=entry.effort)


@dataclass(frozen=True)
class SavedSetting:
    """What the list says of one setting.

    Attributes:
        component: name of the denoiser.
        setting: of the pipeline.
        place: folder of its plan; ``None`` if the denoiser is not called at this setting.
        effort: that the plan was made with.
        checks: of its full steps.
    """

    component: str
    setting: Setting
    place: Path | None
    effort: str = "instant"
    checks: Checks | None = None


def read_settings(folder: Path) -> tuple[list[str], Outcome, list[SavedSetting]]:
    """The list of plans in a folder: names of the denoisers, what was asked for, and all settings.

    Raises:
        MaskError: there is none, it is damaged, or a plan is not the one that it was written with.
    """
    data = _read(folder)
    with foreign_errors_as(MaskError, f"{folder / LIST} is damaged", FOREIGN):
        names = [str(name) for name in data.get("components", [data["component"]])]
        outcome = Outcome(**{str(k): float(v) for k, v in data["outcome"].items()})
        return names, outcome, [_setting_of(folder, names, entry) for entry in data["settings"]]


def _setting_of(folder: Path, names: list[str], entry: Mapping[str, Any]) -> SavedSetting:
    component, setting = str(entry.get("component", names[0])), Setting.from_data(entry["setting"])
    if entry.get("unused") is True:
        return SavedSetting(component, setting, None)
    name, digest = str(entry["folder"]), entry.get("plan")
    if Path(name).name != name:
        raise MaskError(f"{folder / LIST} is damaged: {name!r} is no folder beside it")
    place = folder / name
    if digest is not None and (place / PLAN).is_file() and file_digest(place / PLAN) != digest:
        said = entry.get("plan_fields")
        changed = differing(said, fields_now(read_bounded(place / PLAN, JSON_BYTES))) if isinstance(said, dict) else ""
        what = f"the plan for {setting} in {place} is not the one that {folder / LIST} was written with"
        raise MaskError(f"{what}{changed}; {FOREIGN}")
    return SavedSetting(component, setting, place, str(entry["effort"]), _checks_of(entry["checks"]))


def _read(folder: Path) -> Any:
    place = folder / LIST
    if not place.is_file():
        raise MaskError(f"{folder} holds no plans of a pipeline; fxmask.save(pipe, folder) writes them")
    with foreign_errors_as(MaskError, f"{place} is damaged", FOREIGN):
        raw = read_bounded(place, JSON_BYTES)
        head = head_of(raw)
        if head.format != FORMAT:
            raise ValueError(f"its format is {head.format!r}")
        if head.version not in (1, VERSION):
            raise ValueError(f"its version is {head.version}, and this fxmask knows 1 and {VERSION}")
        return unseal(raw, dict) if head.version == VERSION else parse(raw, dict)


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
