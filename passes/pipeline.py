"""Every pass, in the order in which a program goes through them. One list, to be read from top to bottom.

A pass is a function in the module of its name; what it requires, ensures and whether it can be switched off is declared there
(``observer.graph_pass``). Tests compare this list with what an observer sees.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxmask.passes import (
    choose_layouts,
    find_blocks,
    functionalize,
    insert_soft_mask,
    lift_weights,
    merge_common,
    precompute,
    rectify,
    remove_dead,
    specialize,
    split_regions,
)
from fxmask.passes.observer import DECLARED, PassInfo


@dataclass(frozen=True)
class Phase:
    """Passes that run together.

    Attributes:
        name: of the phase.
        how_often: in words.
        passes: in order; those in parentheses run inside the one before them.
    """

    name: str
    how_often: str
    passes: tuple[str, ...]


PIPELINE = (
    Phase(
        "capture", "once per form of call", ("functionalize", "(remove_dead)", "find_blocks", "find_streams", "choose_layouts")
    ),
    Phase("learn (paper)", "once", ("insert_soft_mask",)),
    Phase("learn", "once per set of formed blocks", ("(merge_common)", "(remove_dead)")),
    Phase("plan", "once per mask and start", ("rectify",)),
    Phase(
        "precompute",
        "once per plan",
        (
            "hoist_conditioning",
            "(merge_common)",
            "(remove_dead)",
            "fold_timestep",
            "(merge_common)",
            "(remove_dead)",
        ),
    ),
    Phase("specialise", "once per distinct step graph", ("specialize_step", "(merge_common)", "(remove_dead)")),
    Phase("compile", "once per distinct step graph", ("segments_of", "lift_weights")),
)

_MODULES = (
    choose_layouts,
    find_blocks,
    functionalize,
    insert_soft_mask,
    lift_weights,
    merge_common,
    precompute,
    rectify,
    remove_dead,
    specialize,
    split_regions,
)


def passes_in_order() -> list[PassInfo]:
    """Every pass once, at its first place in the pipeline."""
    names = dict.fromkeys(name.strip("()") for phase in PIPELINE for name in phase.passes)
    return [DECLARED[name] for name in names]


def describe_pipeline() -> str:
    """The pipeline as text, with what each pass requires and ensures, and which can be switched off."""
    lines = []
    for phase in PIPELINE:
        lines.append(f"{phase.name}: {phase.how_often}")
        for name in phase.passes:
            info = DECLARED[name.strip("()")]
            inside = "    " if name.startswith("(") else ""
            off = ", can be switched off" if info.optional else ""
            needs, gives = ", ".join(info.requires) or "nothing", ", ".join(info.ensures) or "nothing"
            lines.append(f"    {inside}{info.name}: requires {needs}; ensures {gives}{off}")
    return "\n".join(lines)
