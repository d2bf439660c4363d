"""``fxmask inspect NAME``: what is there to skip."""

from __future__ import annotations

from typing import Any

import click
from rich.table import Table

from fxmask.frontend.capture import capture
from fxmask.ir.program import Program
from fxmask.ir.summary import human_count
from fxmask.sampling.sampler import Sampler
from fxmask.tools.bench_cases import load_case
from fxmask.tools.command_line import AS_JSON, CALLS, NAMED, PLACE, Command, as_json, console, options, printed
from fxmask.tools.subjects import Subject, load_subject

FEW_STEPS = 2  # of the call that a pipeline is recorded with, if no other number is asked for


@click.command("inspect", cls=Command, epilog=NAMED)
@click.argument("name", metavar="NAME")
@options(
    CALLS, PLACE, click.option("--top", type=int, default=20, show_default=True, help="blocks to list; 0: all of them"), AS_JSON
)
def inspect_command(
    name: str,
    calls: Any,
    prompts: Any,
    steps: int | None,
    seed: int,
    device: str,
    dtype: str | None,
    top: int,
    json_wanted: bool,
) -> None:
    """Show blocks, MACs and lanes of a denoiser.

    A pipeline is called once, with two steps unless --steps says otherwise.
    """
    subject = load_subject(name, device, dtype).with_calls(calls, prompts, steps)
    run = subject.recorded(seed, steps or FEW_STEPS) if subject.pipe is not None else None
    program = subject.program(run)
    facts = facts_of_program(program, subject, run)
    if json_wanted:
        as_json(facts)
        return
    _show(program, facts, top)


def facts_of_program(program: Program, subject: Subject, run: Sampler | None) -> dict[str, Any]:
    """What is known of a captured denoiser, fit for JSON."""
    blocks = [
        {"name": b.name, "kind": b.kind, "macs": b.macs, "share": b.macs / max(1, program.macs), "bytes": b.bytes}
        for b in program.blocks
    ]
    return {
        "model": type(program.model).__name__,
        "pipeline": None if subject.pipe is None else type(subject.pipe).__name__,
        "component": None if subject.pipe is None else subject.component,
        "parameters": sum(p.numel() for p in program.model.parameters()),
        "batch_size": program.batch_size,
        "macs": program.macs,
        "attention_macs": program.attention_macs,
        "skippable": {"branches": program.coverage(("branch",)), "branches and stages": program.coverage()},
        "captured_by": program.rung,
        "roles": dict(program.roles),
        "lanes": None if run is None else len(run.calls[0]),
        "injects_noise": None if run is None else run.stochastic,
        "blocks": blocks,
    }


def _show(program: Program, facts: dict[str, Any], top: int) -> None:
    lanes = facts["lanes"]
    head = {
        "denoiser": f"{facts['model']}, {human_count(facts['parameters']).strip()} parameters",
        "pipeline": facts["pipeline"] and f"{facts['pipeline']}.{facts['component']}",
        "MACs of a call": f"{human_count(program.macs).strip()} at batch {program.batch_size}, "
        f"{human_count(program.attention_macs).strip()} of these in attention",
        "lanes": lanes and f"{lanes}: the denoiser is called {'once' if lanes == 1 else f'{lanes} times'} in each step",
        "skippable": f"{program.coverage(('branch',)):.1%} of the MACs in branches, {program.coverage():.1%} with stages",
        "arguments": ", ".join(f"{leaf} ({role})" for leaf, role in program.roles.items()),
        "captured by": program.rung,
    }
    for label, value in head.items():
        if value:
            printed(f"{label:<16}{value}")
    blocks = sorted(program.blocks, key=lambda b: -b.macs)
    shown = blocks[:top] if top > 0 else blocks
    table = Table(
        "block", "kind", "MACs", "share", "bytes per sample", title=f"the {len(shown)} largest of {len(blocks)} blocks"
    )
    for column in table.columns[2:]:
        column.justify = "right"
    for b in shown:
        table.add_row(b.name, b.kind, human_count(b.macs), f"{b.macs / max(1, program.macs):.1%}", f"{b.bytes:,}")
    console().print(table)


@click.command("summary", hidden=True)
@click.argument("model")
def summary_command(model: str) -> None:
    """The blocks of a denoiser in the order in which they are computed; see inspect."""
    case, call = load_case(model)
    printed(capture(case, call).summary())
