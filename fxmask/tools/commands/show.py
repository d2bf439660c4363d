"""``fxmask show FOLDER``: what a saved folder holds, without the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from fxmask.errors import InputError
from fxmask.ir.mask import Mask
from fxmask.ir.text import ABSENT, BLENDED, FORECAST, STATES
from fxmask.ir.text import FULL as COMPUTED
from fxmask.pictures.masks import grouped, names_of, save_counts, save_heat_map, states_of
from fxmask.runtime.quality import Quality
from fxmask.settings.saved import LIST, read_settings
from fxmask.storage.card import Entry, rows_of
from fxmask.storage.hub import local_folder
from fxmask.storage.plans import facts_of, load_plan
from fxmask.tools.command_line import AS_JSON, Command, Picture, as_json, console, options, printed

MARKS = {COMPUTED: ("█", "blue"), BLENDED: ("▓", "blue"), FORECAST: ("▒", "cyan"), 0: ("·", "bright_black"), ABSENT: (" ", "")}
LETTERS = {COMPUTED: "#", BLENDED: "%", FORECAST: "+", 0: ".", ABSENT: " "}
PLAIN = {state: (letter, MARKS[state][1]) for state, letter in LETTERS.items()}
WIDE = 100  # characters of a row of the map; beyond that, several steps share one
ROWS = 40
PICTURES = (
    click.option("--heat-map", type=Picture(), help="draw the mask: a PNG or SVG"),
    click.option("--counts", type=Picture(), help="draw how often each block computes in five steps (Fig. 6 of the paper)"),
)


@dataclass(frozen=True)
class Saved:
    """A saved plan.

    Attributes:
        title: of its setting, empty for a model's.
        mask: as it was saved.
        facts: as they were saved.
    """

    title: str
    mask: Mask
    facts: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        kept = [int(n) for n in self.mask.by_call.compute.sum(dim=0)]
        quality = Quality.of_facts(self.facts, self.mask)
        return {
            "setting": self.title,
            "steps": self.mask.num_steps,
            "timesteps": list(self.mask.timesteps),
            "lanes": list(self.mask.lanes),
            "computed_at": dict(zip(self.mask.blocks, kept, strict=True)),
            "forecasts": len(self.mask.forecast.terms) if self.mask.forecast else 0,
            "facts": {name: value for name, value in self.facts.items() if name != "roles"},
            "quality": None if quality is None else quality.to_dict(),
        }


@click.command("show", cls=Command)
@click.argument("folder")
@options(click.option("--plan", "number", type=click.IntRange(1), help="only this one of several"), PICTURES, AS_JSON)
def show_command(folder: str, number: int | None, heat_map: Path | None, counts: Path | None, json_wanted: bool) -> None:
    """Show what a saved FOLDER holds: what it was learned on, what was measured, and the mask.

    FOLDER is one of fxmask.save, or the name of one on the hub.
    """
    plans = read_plans(local_folder(folder))
    if number is not None and number > len(plans):
        raise InputError(f"--plan {number}: {folder} holds {len(plans)}")
    chosen = plans if number is None else plans[number - 1 : number]
    draw(chosen[0].mask, heat_map, counts)
    if json_wanted:
        as_json([plan.to_dict() for plan in chosen])
        return
    for plan in chosen:
        show_plan(plan)
    for path in (heat_map, counts):
        if path is not None:
            printed(f"picture: {path}" + (" (of the first plan; --plan chooses another)" if len(chosen) > 1 else ""))


def draw(mask: Mask, heat_map: Path | None, counts: Path | None) -> None:
    """The pictures of a mask that were asked for."""
    if heat_map is not None:
        save_heat_map(mask, heat_map)
    if counts is not None:
        save_counts(mask, counts)


def read_plans(folder: Path) -> list[Saved]:
    """The plans of a folder, of a model or of a pipeline.

    Raises:
        MaskError: there are none, or they are damaged.
    """
    if not (folder / LIST).is_file():
        mask, facts, _ = load_plan(folder)
        return [Saved("", mask, facts_of(folder, mask, facts))]
    found = []
    names, _, entries = read_settings(folder)
    for entry in entries:
        if entry.place is not None:
            mask, facts, _ = load_plan(entry.place)
            title = f"{entry.component}: {entry.setting}" if len(names) > 1 else str(entry.setting)
            found.append(Saved(title, mask, facts_of(entry.place, mask, facts)))
    return found


def show_plan(plan: Saved) -> None:
    """A table of what is known of a plan, and its mask as a heat map of characters."""
    out = console()
    table = Table("", "", title=plan.title or str(plan.facts["model"]), show_header=False)
    for name, value in rows_of(Entry(plan.title, plan.mask, plan.facts, "")):
        table.add_row(name, Text(value))
    out.print(table)
    out.print(heat_map_text(plan.mask), soft_wrap=True)


def heat_map_text(mask: Mask, rows: int = ROWS) -> Text:
    """A row for a block or a few neighbours, a character for a step or a few; what occurs most in them is shown."""
    states, text = states_of(mask), Text()
    marks = MARKS if console().encoding.lower().startswith("utf") else PLAIN
    every = -(-mask.num_steps // WIDE)
    names = names_of(mask)
    groups = grouped(names, rows) if len(names) > rows else [(b, b, x) for b, x in enumerate(names)]
    width = max(len(name) for _, _, name in groups)
    for first, last, name in groups:
        text.append(f"{name:>{width}} ")
        for k in range(0, mask.num_steps, every):
            state = int(states[first : last + 1, k : k + every].flatten().mode().values)
            text.append(marks[state][0], style=marks[state][1])
        text.append("\n")
    found = sorted(set(states.flatten().tolist()), reverse=True)
    text.append(" " * (width + 1) + "  ".join(f"{marks[k][0]} {STATES[k]}" for k in found))
    return text
