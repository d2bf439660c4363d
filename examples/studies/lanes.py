"""What rows of their own add for the lanes of guidance: the same learning with them and without, on fresh images.

    python examples/studies/lanes.py [--families dit-4 ...] [--ratios 1.5 ...] [--write]
    python examples/studies/lanes.py --time [--backend inductor] [--device cuda] [--write]

The shipped pipelines at their usual guidance, 20 DDIM steps. 24 recorded images to learn from, default effort; plans are judged
on 32 fresh images of other noise and prompts. ``--time`` measures steps of one batch that holds both lanes: whole, and with one
part computed and the other formed; on a GPU those of two large denoisers, too. What was learned is kept, and not learned again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import speed
import torch
from few_images import FAMILIES, RESULTS, Judge, keep, known, recorder

import fxmask
from fxmask.timing import timed
from fxmask.tools.place import require_device

RATIOS = (1.33, 1.5, 2.0)
RUNS, IMAGES, STEPS = 3, 8, 20
KEPT = RESULTS / "lanes.json"
FORMS = {
    "whole batch": (True, True),
    "first lane computed, second formed": (True, False),
    "second lane computed, first formed": (False, True),
    "both formed": (False, False),
}


def measure(family: str, ratios: list[float], device: torch.device, folder: Path) -> None:
    """Fill in what is missing of one family."""
    rows = known(KEPT)
    wanted = [ratio for ratio in ratios if f"{family} {ratio}" not in rows]
    if not wanted:
        return
    record = recorder(family, device)
    judge, runs = Judge(family, record), [record(IMAGES, seed) for seed in range(RUNS)]
    program = fxmask.capture(runs[0].denoiser, runs[0].calls[0][0], runs[0].roles)
    folder.mkdir(parents=True, exist_ok=True)
    for ratio in wanted:
        row: dict[str, Any] = {"fewer": judge.of_steps(round(STEPS / ratio))}
        for lanes in ("alike", "own"):
            started, file = time.monotonic(), folder / f"{family}-{ratio}.journal.json"
            (point,) = fxmask.pareto(program, runs, speedups=[ratio], checkpoint=file, lanes=lanes, progress=False)
            row[lanes] = {
                "psnr": judge.of_mask(program, point.mask),
                "ratio": round(point.mac_ratio, 3),
                "kind": point.kind,
                "has lanes": bool(point.mask.lanes),
                "units": round(point.units, 1),
                "seconds": round(time.monotonic() - started),
            }
        rows = {**known(KEPT), f"{family} {ratio}": row}
        keep(rows, KEPT)
        print(family, ratio, row, flush=True)


Timed = tuple[torch.nn.Module, list[dict[str, Any]], tuple[float, ...], Any]


def shipped(family: str, device: torch.device) -> Timed:
    """A shipped denoiser, two calls of its pipeline, their timesteps and the roles of their arguments."""
    run = recorder(family, device)(4, 0)
    return run.denoiser, [step[0] for step in run.calls[:2]], run.timesteps[:2], run.roles


def large(make: Callable[[], tuple[torch.nn.Module, dict[str, Any]]]) -> Timed:
    """The same of a large denoiser, with random weights."""
    model, call = make()
    sample = call["hidden_states"]
    call["hidden_states"] = torch.cat([sample[: len(sample) // 2]] * 2)  # with guidance each is there twice
    later = {**call, "timestep": torch.full_like(call["timestep"], 450)}
    return model.eval(), [call, later], (500.0, 450.0), None


LARGE = {"DiT-XL/2 (256 px, bfloat16, batch 8)": speed.dit_xl, "PixArt-Sigma (1,024 px, bfloat16, batch 2)": speed.pixart_sigma}


def time_steps(name: str, subject: Timed, backend: str, device: torch.device, repeats: int = 15) -> None:
    """Seconds of a step by what it does with the lanes, relative to the unaccelerated step, and MACs likewise."""
    denoiser, calls, timesteps, roles = subject
    program = fxmask.capture(denoiser, calls[0], roles)
    output = next(block.name for block in program.blocks if block.kind == "output")
    plain = torch.compile(denoiser, dynamic=False, mode="reduce-overhead" if backend == "cudagraph" else None)
    ways: dict[str, Any] = {"torch.compile": (plain, 1.0)}
    for form, computes in FORMS.items():
        compute = torch.ones(2, 2, 1, dtype=torch.bool)
        compute[1, :, 0] = torch.tensor(computes)
        mask = fxmask.Mask(compute, timesteps, (output,), None, program.fingerprint, lanes=("0", "1"), batched=True)
        plan = fxmask.rectify(program, mask)
        share = sum(plan.macs_per_step[2:]) / (2 * plan.full_macs)
        ways[form] = fxmask.compile(program, plan, backend=backend, progress=False), share
    seconds: dict[str, list[float]] = {form: [] for form in ways}
    with torch.no_grad():
        for turn in range(repeats + 3):
            for form, (model, _) in ways.items():
                with getattr(model, "generation", torch.no_grad)():
                    model(**calls[0])
                    took = timed(lambda model=model: model(**calls[1]))[0]
                if turn > 2:
                    seconds[form].append(took)
    followed = {form: model.report().runs[-1].followed for form, (model, _) in ways.items() if form in FORMS}
    if not all(followed.values()):
        raise RuntimeError(f"{name}: calls did not follow the plan, nothing to measure: {followed}")
    base = statistics.median(seconds["torch.compile"])
    row = {form: [round(statistics.median(seconds[form]) / base, 3), round(share, 3)] for form, (_, share) in ways.items()}
    where = torch.cuda.get_device_name(device).removeprefix("NVIDIA ") if device.type == "cuda" else "cpu"
    rows = {**known(KEPT), f"{name} time {backend}": {"device": where, "steps": row, "milliseconds": round(1000 * base, 3)}}
    keep(rows, KEPT)
    print(name, row, f"{1000 * base:.2f} ms", flush=True)


TRIED = """
Quick effort tries them for 6 units more; on the DiT at guidance 4, fresh images, that gave 1.1 dB at 2x (26.7 instead
of 25.6; 12 units gave no more) and nothing at 1.5x, where the plan was as good as the default effort's. In earlier
trials with quick effort, judged on held-out images, lanes apart gained 0.9 dB at 1.5x and 0.5 to 0.6 dB at 2x, most
of it from coefficients of each lane that read the other one's present value: the best rows were the same for both
lanes, or nearly. Full steps at equal distances with one lane rarer were 7 to 15 dB behind rows dense early at 1.5x.
Rows that are chosen by the moments of the recorded calls need the weights of guidance as they are without clipping (-3 and 4
here); with weights measured by larger steps they were up to 4 dB worse. Attention that one lane computes for both at half of
the full steps, which pays for one full step more, was up to 5 dB worse at equal MACs on held-out images, never better (eight
plans at 1.5x and 2x). Where alike lanes are refined by the default effort, little is left to gain: their coefficients
taken apart, with the other lane's values added at 0, and refined by adjoints through the lanes gained -0.2 to 0.4 dB on
held-out images (six plans of the DiT at 1.5 and 4 and of the latent U-Net, 1.5x and 2x). So lanes apart are left
after their first rollouts (about 10 units) where the best of these is more than 0.25 dB behind the best of lanes alike; of
twelve cells that were searched to the end, the three in which they had won pass this. From few images quick effort
gains more by them, see [few images](few_images.md).
"""

NOISE = """
## With injected noise

What was injected since, only a lane that is computed knows, so steps may compute one lane and hold its difference to the
other (DDIM, eta = 1, through our own loop). Errors of one such step, and of one that computes neither lane, on the 32 images
that are learned from, 20 steps: the DiT at guidance 1.5 -49 to -58 and -32 to -38 dB over most of the run, at guidance 4 -27
to -39 and -26 to -34 dB. So they serve weak guidance and moderate speed-ups best. On fresh images, default effort
([quality](quality.md#the-same-with-guidance)): at guidance 1.5, 1.5x, 35.5 to 45.8 dB (20 steps) and 39.8 to 47.9 dB (50
steps), 2x, 31.4 to 32.8 dB (20 steps) and nothing at 50; at guidance 4, 20 steps, 1.5x, 27.1 to 28.0 dB, and nothing else on
the DiT. Quick effort of 8 images, guidance 1.5, 20 steps, 1.5x: 33.7 to 45.3 dB for 4 units more.

Which lane is computed matters. Formed are lanes that come after it, and a batch has the unconditional one first: with parts
in that order the conditional one had to be formed, which guidance weighs most. At 1.33x and guidance 1.5, half steps at about
every second step, not refined, had 32.8 dB on the recorded images in that order and have 43.5 in the other; whole steps left
out have 30.4. Nor may what is reused of one lane be older than what is reused of the other: at guidance 4 a step that
computes neither, after one that computes one, made plans 7 dB worse than without half steps; what the other lane has changed
by is added there too now.
"""


def table(rows: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Lanes with rows of their own",
        "",
        "`python examples/studies/lanes.py`: the shipped pipelines (of the DiT the name says the guidance, others are at 4),",
        f"DDIM, {STEPS} steps, default effort on {RUNS * IMAGES} recorded images; mean PSNR in dB on 32 fresh images of other",
        'noise and prompts. *Alike*: all lanes follow the same rows (`fxmask.learn(..., lanes="alike")`). *Own*: the same',
        "measurements, and besides plans in which the lanes differ, for 60 units more; of both the one that is better on",
        "held-out images is taken. Parts of the batch were computed in their order, the unconditional one first.",
        "",
        "| pipeline | asked | fewer steps | alike | own | gain | what was taken |",
        "|" + "---|" * 7,
    ]
    gains = []
    for family in FAMILIES:
        for ratio in RATIOS:
            row = rows.get(f"{family} {ratio}")
            if row is None:
                continue
            alike, own = row["alike"], row["own"]
            gains.append(own["psnr"] - alike["psnr"])
            shown = f"{alike['psnr']:.1f} ({alike['ratio']:.2f}x) | {own['psnr']:.1f} ({own['ratio']:.2f}x) | {gains[-1]:+.1f}"
            lines.append(f"| {family} | {ratio}x | {row['fewer']:.1f} | {shown} | {own['kind']} |")
    missing = [f"{family} {ratio}x" for family in FAMILIES for ratio in RATIOS if f"{family} {ratio}" not in rows]
    if missing:
        lines += ["", f"Not measured here: {', '.join(missing)}."]
        lines += ["Both at 1.5x, 2x and 3x through our own loop: [quality](quality.md#the-same-with-guidance)."]
    lines += [*TRIED.rstrip().splitlines(), *NOISE.rstrip().splitlines()]
    timed_rows = {key: row for key, row in rows.items() if " time " in key}
    if timed_rows:
        lines += [
            "",
            "## Steps of a batch that holds both lanes",
            "",
            "Seconds of one step over those of the same model under torch.compile (CUDA graphs on both sides or neither), and",
            "its MACs over the full ones; medians of interleaved repeats. A part is a batch of half the size. Of shipped ones",
            "four images with both lanes are a batch of 8.",
            "",
            "| pipeline | " + " | ".join(FORMS) + " |",
            "|" + "---|" * (1 + len(FORMS)),
        ]
        for key, row in timed_rows.items():
            cells = [f"{row['steps'][name][0]:.2f} (MACs {row['steps'][name][1]:.2f})" for name in FORMS]
            lines.append(f"| {key.replace(' time ', ', ')}, {row['device']} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--ratios", nargs="+", type=float, choices=RATIOS, default=list(RATIOS))
    parser.add_argument("--time", action="store_true", help="measure steps instead of plans")
    parser.add_argument("--backend", default="inductor", help="of the steps that are timed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", action="store_true", help="keep the table in the results")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    device = require_device(options.device)
    for family in options.families:
        if options.time:
            time_steps(family, shipped(family, device), options.backend, device)
        else:
            measure(family, options.ratios, device, Path("build/lanes"))
    if options.time and device.type == "cuda":
        for name, make in LARGE.items():
            time_steps(name, large(make), options.backend, device)
    print(table(known(KEPT)))
    if options.write:
        (RESULTS / "lanes.md").write_text(table(json.loads(KEPT.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
