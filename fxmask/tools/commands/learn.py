"""``fxmask learn NAME``: make a plan, measure it on fresh noise, and save it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch

from fxmask.api import accelerate, compile, learn, save
from fxmask.errors import InputError
from fxmask.learning.paper.options import PaperOptions
from fxmask.passes.rectify import rectify
from fxmask.pictures import save_scores, save_step_errors
from fxmask.runtime.model import AcceleratedModel
from fxmask.runtime.quality import Quality
from fxmask.settings.pipeline import accelerated_of
from fxmask.storage.folders import check_destination
from fxmask.tools.command_line import (
    AS_JSON,
    BACKEND,
    CALLS,
    FINE,
    INTERRUPTED,
    NAMED,
    OUTCOME,
    PLACE,
    Command,
    Interruption,
    Picture,
    as_json,
    noticing_interrupts,
    options,
    printed,
    said,
)
from fxmask.tools.commands.show import PICTURES, draw
from fxmask.tools.measure import measure, step_errors
from fxmask.tools.subjects import Subject, load_subject, seeded

logger = logging.getLogger(__name__)
EFFORTS = ("instant", "quick", "default")
HELD_OUT = 10_000  # seeds from here on are nobody's else


@click.command("learn", cls=Command, epilog=NAMED)
@click.argument("name", metavar="NAME")
@options(
    click.option("--output", type=click.Path(path_type=Path), required=True, help="folder that the plan is saved to"),
    CALLS,
    OUTCOME,
    click.option(
        "--effort", type=click.Choice(EFFORTS), default="quick", show_default=True, help="how much may be spent on learning"
    ),
    click.option(
        "--learner", type=click.Choice(("default", "paper")), default="default", help="of a denoiser; paper: arXiv 2603.19939"
    ),
    click.option(
        "--checkpoint",
        type=click.Path(path_type=Path),
        help="a file (a folder for a pipeline) that the same command goes on from",
    ),
    click.option("--held-out", type=int, default=4, show_default=True, help="calls with other seeds to measure on; 0: none"),
    BACKEND,
    PLACE,
    PICTURES,
    click.option("--scores", type=Picture(), help="draw how the scores of --learner paper are spread (Fig. 7 of the paper)"),
    click.option("--errors", type=Picture(), help="draw the error at each step"),
    AS_JSON,
)
def learn_command(name: str, json_wanted: bool, **given: Any) -> int:
    """Make a plan for a pipeline or a denoiser, measure it on fresh noise, and save it.

    A pipeline learns from its --call and --prompt. Ctrl-C ends learning early: the best plan so far is saved,
    and the exit status is 130.
    """
    check_destination(given["output"])
    if given["scores"] and given["learner"] != "paper":
        raise InputError("--scores draws what --learner paper leaves behind; the default learner has no scores")
    subject = load_subject(name, given["device"], given["dtype"]).with_calls(given["calls"], given["prompts"], given["steps"])
    with noticing_interrupts() as interruption:
        accelerated, target = _learn(subject, given, progress=not json_wanted)
    if not interruption.happened and given["held_out"]:
        measured_on(subject, target, given["seed"], given["held_out"], given["steps"])
    save(target, given["output"])
    _draw(subject, accelerated, given)
    _tell(accelerated, given["output"], interruption, json_wanted)
    return INTERRUPTED if interruption.happened else FINE


def _learn(subject: Subject, given: Mapping[str, Any], progress: bool) -> tuple[AcceleratedModel, Any]:
    """The accelerated denoiser, and what is to be saved: it, or its pipeline."""
    outcome = {name: given[name] for name in ("speedup", "macs", "max_error", "max_graphs", "backend")}
    if subject.pipe is not None:
        named = ["scores"] if given["scores"] else ["learner"] if given["learner"] != "default" else []
        if named:
            raise InputError(f"--{named[0]} is for a denoiser; a pipeline learns from its own calls")
        return learn_pipeline(subject, {**outcome, "checkpoint": given["checkpoint"]}, given["effort"], given["seed"], progress)
    made = (
        _learn_paper(subject, outcome, given, progress)
        if given["learner"] == "paper"
        else accelerate(
            subject.model,
            subject.required_scheduler(),
            num_inference_steps=given["steps"] or 50,
            example_inputs=subject.inputs or None,
            effort=given["effort"],
            checkpoint=given["checkpoint"],
            seed=given["seed"],
            progress=progress,
            **outcome,
        )
    )
    return made, made


def _learn_paper(subject: Subject, outcome: Mapping[str, Any], given: Mapping[str, Any], progress: bool) -> AcceleratedModel:
    """The paper's learner, stage by stage, since its scores are wanted."""
    run = subject.recorded(given["seed"], given["steps"])
    program = subject.program(run)
    scores = PaperOptions(on_scores=(lambda x: _draw_scores(x, given["scores"])) if given["scores"] else None)
    asked = {name: value for name, value in outcome.items() if name != "backend"}
    effort = "quick" if given["effort"] == "instant" else given["effort"]
    mask = learn(
        program,
        run,
        learner="paper",
        effort=effort,
        checkpoint=given["checkpoint"],
        options=scores,
        seed=given["seed"],
        progress=progress,
        **asked,
    )
    made = compile(program, rectify(program, mask), given["backend"])
    return made if given["backend"] == "eager" else made.compile_all(progress=progress)


def learn_pipeline(
    subject: Subject, outcome: Mapping[str, Any], effort: str, seed: int, progress: bool
) -> tuple[AcceleratedModel, Any]:
    """Record the calls, and learn from them; the accelerated denoiser and the pipeline."""
    pipe = accelerate(subject.pipe, example_calls=list(subject.calls), effort=effort, seed=seed, progress=progress, **outcome)
    return accelerated_of(pipe), pipe


def measured_on(subject: Subject, target: Any, seed: int, count: int, steps: int | None) -> Quality:
    """Compare with images made in full, with other seeds than were learned from."""
    seeds = range(HELD_OUT + seed, HELD_OUT + seed + count)
    if subject.pipe is None:
        return measure(target, [subject.recorded(s, steps) for s in seeds])
    return measure(target, [{**subject.calls[k % len(subject.calls)], "generator": seeded(s)} for k, s in enumerate(seeds)])


def _draw_scores(scores: torch.Tensor, path: Path) -> None:
    save_scores(scores, path)


def _draw(subject: Subject, accelerated: AcceleratedModel, given: Mapping[str, Any]) -> None:
    draw(accelerated.mask, given["heat_map"], given["counts"])
    if given["errors"]:
        run = subject.recorded(HELD_OUT + given["seed"], given["steps"])
        save_step_errors(step_errors(accelerated, run), given["errors"], kept=accelerated.plan.kept_per_step)


def _tell(accelerated: AcceleratedModel, folder: Path, interruption: Interruption, json_wanted: bool) -> None:
    report = accelerated.report()
    if json_wanted:
        as_json({"folder": str(folder), "interrupted": interruption.happened, **report.to_dict()})
        return
    printed(str(report))
    printed(f"\nsaved to {folder}; fxmask show {folder}")
    if interruption.happened:
        said("fxmask: interrupted; the best plan so far was saved, and not measured")
