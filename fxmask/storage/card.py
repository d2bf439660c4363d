"""README.md of saved plans: a model card in the form that hubs know, and pictures of the masks beside it.

Only what the plans say of themselves is in it. Someone else's README.md stays as it is.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxmask.errors import FxmaskError
from fxmask.files.replace import replace_file
from fxmask.ir.mask import Mask
from fxmask.ir.summary import human_count
from fxmask.ir.text import mask_text
from fxmask.pictures import save_heat_map
from fxmask.storage.about import BASE, HUB_NAME, LEARNED, PLAN_FACTS, VERSIONS

logger = logging.getLogger(__name__)
CARD = "README.md"
OURS = "<!-- made by fxmask.save; remove this line to keep what you write here -->"
MOST_PICTURES = 16


@dataclass(frozen=True)
class Entry:
    """One plan of a folder.

    Attributes:
        title: of its setting; empty for a model's only plan.
        mask: as it was saved.
        facts: as they were saved.
        picture: name of its heat map in the folder.
    """

    title: str
    mask: Mask
    facts: Mapping[str, Any]
    picture: str


def write_card(folder: Path, entries: Sequence[Entry], *, model: str, component: str | None = None) -> None:
    """Write README.md and heat maps into a folder of plans; where that fails, the plans are saved all the same.

    Args:
        folder: holds the plans.
        entries: of these, one at least.
        model: class of the denoiser.
        component: its name in the pipeline, for plans of a pipeline.
    """
    place = folder / CARD
    try:
        if place.exists() and OURS not in place.read_text(encoding="utf-8", errors="replace"):
            logger.warning("%s is not of fxmask, and stays as it is", place)
            return
        drawn = {entry.picture for entry in entries[:MOST_PICTURES] if _draw(folder / entry.picture, entry)}
        text = card_of(entries, drawn, model=model, component=component)
        replace_file(place, text.encode(), folder / f".{CARD}.{os.getpid()}.partial")
    except OSError as error:
        logger.warning("%s cannot be written (%s); the plan is saved", place, error)


def card_of(entries: Sequence[Entry], drawn: set[str], *, model: str, component: str | None = None) -> str:
    """The text of the card."""
    base = next((x for entry in entries for x in [entry.facts.get(BASE)] if isinstance(x, str) and HUB_NAME.fullmatch(x)), None)
    head = [
        "library_name: fxmask",
        "tags:",
        "- fxmask",
        "- diffusion",
        "- acceleration",
        *([f"base_model: {base}"] if base else []),
    ]
    what = "pipe" if component else "model"
    lines = ["---", *head, "---", OURS, "", f"# Plans for {model}" if component else f"# A plan for {model}", ""]
    lines += [
        "Which part of the denoiser runs at which sampling step, and which part reuses cached values. No weights are here.",
        "",
        "```python",
        "import fxmask",
        "",
        f'{what} = fxmask.load("owner/name", {what})  # this folder, or its name on a hub',
        "```",
        "",
    ]
    for entry in entries:
        lines += _section(entry, entry.picture in drawn)
    return "\n".join(lines)


def _section(entry: Entry, drawn: bool) -> list[str]:
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows_of(entry)]
    lines = [f"## {entry.title}", ""] if entry.title else []
    lines += ["| | |", "|---|---|", *rows, ""]
    if drawn:
        return [*lines, f"![computed (dark), forecast and reused blocks at each step]({entry.picture})", ""]
    return [*lines, "```text", mask_text(entry.mask), "```", ""]


def rows_of(entry: Entry) -> list[tuple[str, str]]:
    """What is known of a plan; what is not is left out."""
    facts, steps = entry.facts, entry.mask.num_steps
    plan, learned, measured = (facts.get(name) or {} for name in (PLAN_FACTS, LEARNED, "measured"))
    scheduler = facts.get("scheduler") or {}
    rows: list[tuple[str, Any]] = [("steps", steps)]
    if scheduler:
        rows += [("scheduler", scheduler.get("class")), ("its settings", _settings(scheduler.get("config") or {}))]
    rows += [(name.replace("_", " "), _plain(value)) for name, value in learned.items()]
    if plan:
        rows.append(
            (
                "MACs of a run",
                f"{human_count(plan['macs'])}, {human_count(plan['full_macs'])} in full: {plan['mac_ratio']:.2f}x fewer",
            )
        )
        rows.append(("step graphs", plan["distinct_graphs"]))
        whose = "for all lanes" if entry.mask.lanes else "per lane"
        rows.append(("cache", f"{plan['peak_cache_bytes'] / 2**20:.2f} MiB {whose} at batch {plan['batch_size']}"))
    rows += _measured(measured)
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in (facts.get(VERSIONS) or {}).items())))
    return [(name, str(value)) for name, value in rows if value not in (None, "")]


def _measured(measured: Mapping[str, Any]) -> list[tuple[str, Any]]:
    if not measured:
        return []
    rows = [
        (
            "held-out PSNR",
            f"{measured['psnr']:.1f} dB mean, {measured['psnr_low']:.1f} dB 10th percentile ({measured['images']} images)",
        ),
        ("relative error", f"{measured['error']:.3g}"),
    ]
    if "fewer_psnr" in measured:
        low = f", {measured['fewer_psnr_low']:.1f} dB 10th percentile" if "fewer_psnr_low" in measured else ""
        rows.append((f"{measured['fewer_steps']} steps instead", f"{measured['fewer_psnr']:.1f} dB mean{low}"))
    if "seconds" in measured and "full_seconds" in measured:
        where = f" ({measured['device']})" if "device" in measured else ""
        rows.append(("seconds of a call", f"{measured['seconds']:.3g}, {measured['full_seconds']:.3g} in full{where}"))
    return rows


def _settings(config: Mapping[str, Any]) -> str:
    """A scheduler's settings in one line; lists of betas and names of files are no settings that anyone reads."""
    shown = {name: value for name, value in config.items() if value is not None and not isinstance(value, (list, dict))}
    return ", ".join(f"{name}={value}" for name, value in sorted(shown.items()))


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _cell(value: Any) -> str:
    """Text in one cell of a table, whatever is in it: a plan may come from anyone."""
    text = re.sub(r"\s+", " ", str(value)).replace("|", "\\|")
    return text.replace("<", "&lt;").replace("`", "'")


def _draw(path: Path, entry: Entry) -> bool:
    """Whether the heat map could be drawn; without matplotlib the card holds the mask as text."""
    with contextlib.suppress(FxmaskError):
        save_heat_map(entry.mask, path)
        return True
    return False
