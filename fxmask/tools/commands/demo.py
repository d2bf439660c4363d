"""``fxmask demo``: the main job, on the small trained checkpoint that is shipped."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file

from fxmask.api import accelerate
from fxmask.errors import InputError
from fxmask.metrics import psnr
from fxmask.pictures import save_samples
from fxmask.runtime.model import AcceleratedModel
from fxmask.sampling.sampler import Sampler
from fxmask.sampling.trajectory import record
from fxmask.timing import timed
from fxmask.tools.bench_shapes import diffusers_package
from fxmask.tools.command_line import AS_JSON, BACKEND, Command, Picture, as_json, console, options, printed
from fxmask.tools.commands.learn import HELD_OUT
from fxmask.tools.commands.show import PICTURES, draw, heat_map_text
from fxmask.tools.measure import measure

PACKAGE = Path(__file__).resolve().parents[2]
INSTALLED, IN_A_CLONE = PACKAGE / "checkpoints", PACKAGE.parent / "examples" / "checkpoints"
CHECKPOINTS = INSTALLED if INSTALLED.is_dir() else IN_A_CLONE
BATCH = 8
REPEATS = 5


@click.command("demo", cls=Command)
@options(
    click.option("--steps", type=click.IntRange(2), default=20, show_default=True, help="sampling steps"),
    click.option("--speedup", type=float, default=2.0, show_default=True, help="ratio of MACs"),
    click.option("--effort", type=click.Choice(("instant", "quick", "default")), default="quick", show_default=True),
    click.option("--batches", type=click.IntRange(1), default=4, show_default=True, help="batches of 8 images to compare on"),
    click.option(
        "--output", type=Picture(), default="fxmask-demo.png", show_default=True, help="picture of images before and after"
    ),
    click.option(
        "--checkpoints",
        type=click.Path(path_type=Path),
        default=CHECKPOINTS,
        help="folder of checkpoints, other than the shipped ones",
    ),
    BACKEND,
    PICTURES,
    AS_JSON,
)
def demo_command(
    steps: int,
    speedup: float,
    effort: str,
    batches: int,
    output: Path,
    checkpoints: Path,
    backend: str,
    heat_map: Path | None,
    counts: Path | None,
    json_wanted: bool,
) -> None:
    """Accelerate a small trained DDPM U-Net: learn, compile, sample with and without, compare, draw.

    It takes a minute or a few on two cores.
    """
    model, scheduler = shipped(checkpoints)
    began = time.perf_counter()
    accelerated = accelerate(
        model, scheduler, num_inference_steps=steps, speedup=speedup, effort=effort, backend=backend, progress=not json_wanted
    )
    spent = time.perf_counter() - began
    fresh = [record(model, scheduler, num_inference_steps=steps, batch_size=BATCH, seed=HELD_OUT + k) for k in range(batches)]
    quality = measure(accelerated, fresh)
    facts = {
        "steps": steps,
        "mac_ratio": accelerated.plan.mac_ratio,
        "step_graphs": accelerated.plan.distinct_graphs,
        "learning_and_compiling_seconds": spent,
        **_times(accelerated, fresh[0], backend),
        **quality.to_dict(),
        "picture": str(output),
    }
    _draw(accelerated, fresh[0], quality.fewer_steps, output)
    draw(accelerated.mask, heat_map, counts)
    if json_wanted:
        as_json(facts)
        return
    _tell(facts, accelerated)


def shipped(checkpoints: Path) -> tuple[torch.nn.Module, Any]:
    """The trained U-Net and its scheduler.

    Raises:
        InputError: they are not there, or diffusers is not installed.
    """
    package = diffusers_package()
    config, weights = checkpoints / "ddpm" / "config.json", checkpoints / "ddpm" / "model.safetensors"
    if not (config.is_file() and weights.is_file()):
        raise InputError(
            f"the shipped checkpoint is not in {checkpoints}: it is installed with fxmask, and in examples/checkpoints of a "
            "clone; leave --checkpoints out, or install fxmask again"
        )
    given = json.loads(config.read_text(encoding="utf-8"))
    kind = getattr(package, given["_class_name"])
    model = kind(**{name: value for name, value in given.items() if not name.startswith("_")})
    model.load_state_dict({name: value.float() for name, value in load_file(weights).items()})
    return model.eval().requires_grad_(False), package.DDIMScheduler.from_pretrained(checkpoints / "scheduler")


def _times(accelerated: AcceleratedModel, run: Sampler, backend: str) -> dict[str, float]:
    """Seconds of a run, medians of turns, beside the same compiler without a mask."""
    plain: Any = accelerated.original
    baseline = plain if backend == "eager" else torch.compile(plain, fullgraph=True, dynamic=False)
    with torch.no_grad():
        run.rollout(baseline)  # compiles
        turns = [(timed(run.rollout, baseline)[0], timed(run.rollout, accelerated)[0]) for _ in range(REPEATS)]
    full, fast = (statistics.median(times) for times in zip(*turns, strict=True))
    return {"baseline_seconds": full, "accelerated_seconds": fast, "speedup_against_baseline": full / fast}


@torch.no_grad()
def _draw(accelerated: AcceleratedModel, run: Any, fewer: int | None, path: Path) -> None:
    """Images made in full, with the plan, and with fewer steps at the same cost, from the same noise."""
    rows = {f"{run.num_steps} steps": run.final, f"fxmask, {accelerated.plan.mac_ratio:.2f}x": run.rollout(accelerated)}
    if fewer is not None:
        rows[f"{fewer} steps"] = run.with_steps(accelerated.original, fewer).final
    notes = {name: _decibels(x, run.final) for name, x in rows.items() if x is not run.final}
    save_samples(
        {name: x / 2 + 0.5 for name, x in rows.items()}, path, notes=notes, title="the same noise; PSNR against the first row"
    )


def _decibels(samples: torch.Tensor, reference: torch.Tensor) -> Sequence[str]:
    return [f"{x:.1f} dB" for x in psnr(samples, reference).tolist()]


def _tell(facts: dict[str, Any], accelerated: AcceleratedModel) -> None:
    against = "the model" if accelerated.how_compiled[0] == "eager" else "torch.compile"
    rows = {
        "steps": facts["steps"],
        "MAC ratio (ideal speed-up)": f"{facts['mac_ratio']:.2f}x",
        f"measured, against {against}": f"{facts['speedup_against_baseline']:.2f}x ({facts['baseline_seconds']:.3g} s, "
        f"{facts['accelerated_seconds']:.3g} s)",
        "PSNR against the full sampler": f"{facts['psnr']:.1f} dB mean, {facts['psnr_low']:.1f} dB 10th percentile",
    }
    if "fewer_psnr" in facts:
        low = facts["fewer_psnr_low"]
        rows[f"only {facts['fewer_steps']} steps instead"] = f"{facts['fewer_psnr']:.1f} dB mean, {low:.1f} dB 10th percentile"
    rows |= {
        "distinct step graphs": facts["step_graphs"],
        "learning and compiling": f"{facts['learning_and_compiling_seconds']:.0f} s",
        "picture": facts["picture"],
    }
    for name, value in rows.items():
        printed(f"{name:<32}{value}")
    console().print(heat_map_text(accelerated.mask), soft_wrap=True)
