"""What learning makes of one, two, four or eight recorded images: instant plans, quick and default effort, fewer steps.

    python examples/studies/few_images.py [--families ldm ...] [--images 1 2 4 8] [--default] [--device cuda] [--write]

The shipped latent U-Net and PixArt at guidance 4, and the DiT at 1.5 and 4, each through its diffusers pipeline, with DDIM and
20 steps. Every recorded image is a call of the pipeline; plans for 1.5x and 2x are made of these and judged on 32 fresh images,
of other noise and other prompts. ``--default`` adds default effort, ``--minutes`` stops before a cell that would begin later.

Measurements go to ``examples/results/few_images.json``, what is there is not measured again, and ``--write`` makes
``examples/results/few_images.md`` of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from digits import captions_of, load_model, load_pipeline, load_scheduler

import fxmask
from fxmask.learning.instant.plans import InstantLearner, formed_share
from fxmask.learning.outcome import Outcome
from fxmask.tools.place import require_device

RESULTS = Path(__file__).resolve().parents[1] / "results"
FAMILIES = {"ldm": ("ldm", 4.0), "pixart": ("pixart", 4.0), "dit-1.5": ("dit", 1.5), "dit-4": ("dit", 4.0)}
IMAGES, RATIOS, STEPS = (1, 2, 4, 8), (1.5, 2.0), 20
FRESH, BATCH = 32, 16
Record = Callable[..., fxmask.PipelineTrajectory]


def pipeline_of(name: str) -> tuple[Any, Callable[[int, int], dict[str, Any]]]:
    """A shipped pipeline with DDIM, and the arguments of its call for (images, seed)."""
    if name == "dit":
        vae = diffusers.AutoencoderKL(  # its weights do not matter: nothing is judged after it
            block_out_channels=(4,), norm_num_groups=2, latent_channels=1, in_channels=1, out_channels=1
        )
        pipe = diffusers.DiTPipeline(load_model("dit"), vae, load_scheduler())
        return pipe, lambda count, seed: {"class_labels": [(3 * seed + i) % 10 for i in range(count)]}
    pipe = load_pipeline(name)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    captions = [caption for digit in range(10) for caption in captions_of(digit)]
    extra = {"use_resolution_binning": False, "clean_caption": False} if name == "pixart" else {}

    def arguments(count: int, seed: int) -> dict[str, Any]:
        return {"prompt": [captions[(31 * seed + 7 * i) % len(captions)] for i in range(count)], **extra}

    return pipe, arguments


def recorder(family: str, device: torch.device) -> Record:
    """Records calls of a family's pipeline: (images, seed, steps) -> trajectory."""
    name, guidance = FAMILIES[family]
    pipe, arguments = pipeline_of(name)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)

    def record(count: int, seed: int, steps: int = STEPS) -> fxmask.PipelineTrajectory:
        given = {"guidance_scale": guidance, "num_inference_steps": steps, "output_type": "latent"}
        return fxmask.record_pipeline(pipe, **arguments(count, seed), **given, generator=torch.Generator().manual_seed(seed))

    return record


class Judge:
    """Mean PSNR on fresh images, relative to the range of pixels, or of latents."""

    def __init__(self, family: str, record: Record) -> None:
        self._record = record
        self._seeds = [1000 + n for n in range(FRESH // BATCH)]
        self._runs = [record(BATCH, seed) for seed in self._seeds]
        self._reference = torch.cat([run.final for run in self._runs])
        latents = float(self._reference.max() - self._reference.min())
        self._range = 2.0 if family.startswith("dit") else latents

    def _psnr(self, finals: Sequence[torch.Tensor]) -> float:
        errors = (torch.cat(list(finals)) - self._reference).square().flatten(1).mean(dim=1)
        return round(float((10 * (self._range**2 / errors).log10()).mean()), 2)

    def of_mask(self, program: fxmask.Program, mask: fxmask.Mask) -> float:
        accelerated = fxmask.compile(program, fxmask.rectify(program, mask), backend="eager")
        return self._psnr([run.rollout(accelerated) for run in self._runs])

    def of_steps(self, steps: int) -> float:
        return self._psnr([self._record(BATCH, seed, steps).final for seed in self._seeds])


def measure(
    family: str, counts: Sequence[int], efforts: Sequence[str], rows: dict[str, Any], ends: float, place: Path, device: Any
) -> None:
    """Fill in what is missing of one family, as long as there is time."""
    wanted = [(count, effort) for effort in efforts for count in counts if key_of(family, count, RATIOS[0], effort) not in rows]
    if not wanted or time.monotonic() > ends:
        return
    record = recorder(family, device)
    judge, whole = Judge(family, record), [record(1, seed) for seed in range(max(counts))]
    program = fxmask.capture(whole[0].denoiser, whole[0].calls[0][0], whole[0].roles)
    for ratio in RATIOS:
        rows[key_of(family, 0, ratio, "fewer steps")] = {"psnr": judge.of_steps(round(STEPS / ratio))}
    for count, effort in wanted:
        if time.monotonic() > ends:
            return
        runs, start = whole[:count], time.monotonic()
        if effort == "instant":
            learner = InstantLearner(runs)
            plans = [learner.best(Outcome(speedup=ratio), formed_share(program)) for ratio in RATIOS]
            made = [(plan.mask(program, runs[0], None), {}) for plan in plans]
        else:
            points = fxmask.pareto(program, runs, speedups=RATIOS, effort=effort, progress=False)
            made = [(p.mask, {"units": round(p.units, 1), "kind": p.kind, "estimate": p.decibels}) for p in points]
        seconds = round((time.monotonic() - start) / len(RATIOS), 1)
        for ratio, (mask, facts) in zip(RATIOS, made, strict=True):
            row = {"psnr": judge.of_mask(program, mask), "seconds": seconds, **facts}
            rows[key_of(family, count, ratio, effort)] = row
            print(key_of(family, count, ratio, effort), row, flush=True)
        keep(rows, place)


def key_of(family: str, count: int, ratio: float, what: str) -> str:
    return f"{family} {ratio}x {what}" + (f" {count}" if count else "")


def known(path: Path) -> dict[str, Any]:
    """What was measured before."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def keep(rows: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def table(rows: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Plans from few images",
        "",
        "`studies/few_images.py`, on a CPU, torch 2.14. Shipped pipelines (of the DiT the name says the guidance,",
        f"the others are at 4), DDIM, {STEPS} steps. PSNR in dB on {FRESH} fresh images of other noise and prompts; units are",
        "full sampling runs of the images that are learned from. `fewer steps`: the scheduler's own grid at the same cost.",
        "Below 16 images, half of them are held out, and both halves judge by turns; of one image, a second run with other",
        "noise is recorded. Plans marked *lanes* have rows of their own for the lanes of guidance.",
        "",
        "| pipeline | speed-up | images | fewer steps | instant | quick | units | default | units |",
        "|" + "---|" * 9,
    ]
    behind: list[float] = []
    for family in FAMILIES:
        for ratio in RATIOS:
            for count in IMAGES:
                cells = [rows.get(key_of(family, count, ratio, effort), {}) for effort in ("instant", "quick", "default")]
                if not any(cells):
                    continue
                fewer = rows[key_of(family, 0, ratio, "fewer steps")]["psnr"]
                shown = [f"{cells[0]['psnr']:.1f}" if cells[0] else ""]
                for cell in cells[1:]:
                    lanes = " *lanes*" if "lanes apart" in cell.get("kind", "") else ""
                    shown += [f"{cell['psnr']:.1f}{lanes}", f"{cell['units']:.0f}"] if cell else ["", ""]
                    behind += [cell["psnr"] - cells[0]["psnr"]] if cell and cells[0] else []
                lines.append(f"| {family} | {ratio} | {count} | {fewer:.1f} | {' | '.join(shown)} |")
    if behind:
        worse = sum(x < -0.5 for x in behind)
        lines += [
            "",
            f"Of {len(behind)} plans of quick or default effort, {worse} are more than 0.5 dB behind the instant plan of",
            f"the same images, by {max(0.0, -min(behind)):.1f} dB at most; the mean difference is "
            f"{sum(behind) / len(behind):+.1f} dB.",
        ]
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--images", nargs="+", type=int, choices=IMAGES, default=list(IMAGES))
    parser.add_argument("--default", action="store_true", help="default effort, too")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing later than this")
    parser.add_argument("--write", action="store_true", help="keep the table in the results")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS / "few_images.json", help="file of the measurements")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows, ends = known(options.results), time.monotonic() + 60 * options.minutes
    efforts, device = ["instant", "quick", *(["default"] if options.default else [])], require_device(options.device)
    for family in options.families:
        measure(family, options.images, efforts, rows, ends, options.results, device)
    print(table(rows))
    if options.write:
        (RESULTS / "few_images.md").write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
