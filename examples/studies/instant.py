"""Plans from one image, without learning: quality beside fewer steps and beside fixed reuse, on fresh images and prompts.

    python examples/studies/instant.py --cell ldm-ddim-20 [--device cuda] [--images 48]   # one cell, to build/instant/
    python examples/studies/instant.py --all                                             # all of them, one after the other
    python examples/studies/instant.py --table                                           # examples/results/instant.md

The shipped pipelines at their usual guidance. One image is recorded as its user would make it; the plan is fitted on that
alone. PSNR in dB of final samples against the full sampler's, mean over fresh images with other prompts and other noise.
Fewer steps: the pipeline with ``num_inference_steps`` that cost the same; with noise injected (eta = 1) that has no meaning,
and plans are compared with fixed reuse at equal or more MACs: of the whole output, of all branches, of the best stage
(DeepCache). "Plain fit": least squares on the last three predictions, evenly or bent, whichever is better in the end, from
the same image.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from digits import captions_of, load_model, load_pipeline, load_scheduler

import fxmask
from fxmask.ir.outputs import first_tensor
from fxmask.learning.instant.fitting import Rule, fitted, spaced
from fxmask.learning.instant.moments import Moments
from fxmask.learning.levels import evenly, levels_of
from fxmask.learning.student import Student
from fxmask.tools.place import require_device

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "examples" / "results"
SOLVERS = {"ddim": diffusers.DDIMScheduler, "dpm": diffusers.DPMSolverMultistepScheduler}
CLIPPED = 4.0  # square of the span of samples in [-1, 1]


@dataclass(frozen=True)
class Cell:
    """A pipeline, its guidance, its sampler."""

    family: str
    guidance: float
    solver: str
    steps: int
    eta: float = 0.0

    @property
    def name(self) -> str:
        guidance = f"{self.guidance:g}-" if self.guidance else ""
        return f"{self.family}-{guidance}{self.solver}{'-eta1' if self.eta else ''}-{self.steps}"

    @property
    def ratios(self) -> tuple[float, ...]:
        return (1.33, 1.6, 2.0) if self.steps <= 10 else (1.33, 1.5, 2.0, 3.0)


CELLS = {
    cell.name: cell
    for cell in [
        *(Cell(f, 4.0, "ddim", t) for f in ("ldm", "pixart") for t in (20, 50)),
        *(Cell(f, 4.0, "dpm", t) for f in ("ldm", "pixart") for t in (6, 8, 20)),
        *(Cell("dit", g, "ddim", t) for g in (1.5, 4.0) for t in (20, 50)),
        *(Cell("ddpm", 0.0, "ddim", t) for t in (20, 50)),
        *(Cell(f, 4.0, "ddim", t, 1.0) for f in ("ldm", "pixart") for t in (20, 50)),
        *(Cell("ddpm", 0.0, "ddim", t, 1.0) for t in (20, 50)),
        *(Cell("dit", 0.0, "ddim", t, 1.0) for t in (20, 50)),
    ]
}
Record = Callable[..., fxmask.Sampler]


def recorder(cell: Cell, device: torch.device) -> Record:
    """A function (images, seed, steps) -> recorded run of the pipeline."""
    if cell.family == "dit" and cell.eta:  # DiTPipeline hands no eta on
        model, scheduler = load_model("dit").to(device), load_scheduler()
        return lambda k, seed, steps=cell.steps: fxmask.record(
            model,
            scheduler,
            num_inference_steps=steps,
            batch_size=k,
            seed=seed,
            step_kwargs={"eta": cell.eta},
            example_inputs={"class_labels": torch.tensor([(seed * 3 + i) % 10 for i in range(k)], device=device)},
        )
    pipe: Any
    if cell.family == "dit":
        widths = {"block_out_channels": (4,), "norm_num_groups": 2, "latent_channels": 1, "in_channels": 1, "out_channels": 1}
        pipe = diffusers.DiTPipeline(load_model("dit"), diffusers.AutoencoderKL(**widths), load_scheduler())
    elif cell.family == "ddpm":
        pipe = diffusers.DDIMPipeline(load_model("ddpm"), load_scheduler())
    else:
        pipe = load_pipeline(cell.family)
        pipe.scheduler = SOLVERS[cell.solver].from_config(pipe.scheduler.config)
    pipe.to(device).set_progress_bar_config(disable=True)
    captions = [caption for digit in range(10) for caption in captions_of(digit)]

    def record(k: int, seed: int, steps: int = cell.steps) -> fxmask.Sampler:
        if cell.family == "dit":
            what: dict[str, Any] = {"class_labels": [(seed * 3 + i) % 10 for i in range(k)], "guidance_scale": cell.guidance}
        elif cell.family == "ddpm":
            what = {"batch_size": k, "eta": cell.eta}
        else:
            prompts = [captions[(seed * 31 + 7 * i) % len(captions)] for i in range(k)]
            what = {"prompt": prompts, "guidance_scale": cell.guidance, "eta": cell.eta, "output_type": "latent"}
            what |= {"use_resolution_binning": False, "clean_caption": False} if cell.family == "pixart" else {}
        return fxmask.record_pipeline(pipe, **what, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed))

    return record


class Bench:
    """Fresh images of one cell."""

    def __init__(self, cell: Cell, device: torch.device, images: int, batch: int) -> None:
        self.cell, self.batch = cell, batch
        self.record = recorder(cell, device)
        self.first = self.record(1, 0)
        batches = max(1, images // batch)
        self.fresh = [self.record(batch, 1000 + s) for s in range(batches)]
        reference = torch.cat([run.final for run in self.fresh])
        self.span = CLIPPED if cell.family in ("dit", "ddpm") else float(reference.max() - reference.min()) ** 2
        self.reference = reference

    def psnr(self, samples: torch.Tensor) -> float:
        """Mean over images."""
        error = (samples - self.reference).double().square().flatten(1).mean(dim=1).clamp_min(1e-15)
        return float(10 * torch.log10(self.span / error).mean())

    def of(self, denoiser: Callable[..., Any]) -> float:
        """With another denoiser."""
        return self.psnr(torch.cat([run.rollout(denoiser) for run in self.fresh]))

    def fewer(self, steps: int) -> float:
        """With fewer steps."""
        return self.psnr(torch.cat([self.record(self.batch, 1000 + s, steps).final for s in range(len(self.fresh))]))

    @torch.no_grad()
    def plain_fit(self, count: int) -> float:
        """Least squares on the last three predictions, at distances that are better in the end."""
        moments = Moments.of(self.first)
        model = getattr(self.first, "denoiser", None) or self.cell_model()
        found = []
        for bend in (1.0, 1.35):
            terms = fitted(moments, Rule(3), spaced(self.cell.steps, count, bend))
            finals = []
            for run in self.fresh:
                loop, outputs = run.loop(), []
                call = next(loop)
                try:
                    while True:
                        step = len(outputs)
                        if step in terms:
                            output = sum(c * outputs[j] for j, c in zip(*terms[step], strict=True))
                        else:
                            output = first_tensor(model(**call))
                        outputs.append(output)
                        call = loop.send(output)
                except StopIteration as end:
                    finals.append(end.value)
            found.append(self.psnr(torch.cat(finals)))
        return max(found)

    def cell_model(self) -> torch.nn.Module:
        """The denoiser, where the run does not know it."""
        return load_model(self.cell.family).to(self.first.final.device)


def measure(cell: Cell, device: torch.device, images: int, batch: int) -> dict[str, Any]:
    """All of one cell."""
    began = time.perf_counter()
    bench = Bench(cell, device, images, batch)
    model = getattr(bench.first, "denoiser", None) or bench.cell_model()
    program = fxmask.capture(model, bench.first.calls[0][0], getattr(bench.first, "roles", None))
    rows = []
    for ratio in cell.ratios:
        count = round(cell.steps / ratio)
        started = time.perf_counter()
        mask = fxmask.learn(program, bench.first, effort="instant", macs=count / cell.steps, progress=False)
        seconds = time.perf_counter() - started
        plan = fxmask.rectify(program, mask)
        row: dict[str, Any] = {"asked": ratio, "steps": count, "ratio": plan.mac_ratio, "seconds": seconds}
        row["computed"] = [i for i in range(cell.steps) if bool(mask.compute[i].all())]
        row["instant"] = bench.of(fxmask.compile(program, plan, backend="eager"))
        row["plain"] = bench.plain_fit(count)
        if cell.eta:
            row |= dict(fixed_reuse(bench, program, count / cell.steps))
        else:
            row["fewer"] = bench.fewer(count)
        rows.append(row)
        print(cell.name, {k: round(v, 2) for k, v in row.items() if isinstance(v, float)}, flush=True)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "cell": vars(cell),
        "images": len(bench.reference),
        "rows": rows,
        "device": where,
        "took": time.perf_counter() - began,
    }


def fixed_reuse(bench: Bench, program: fxmask.Program, budget: float) -> Iterator[tuple[str, float]]:
    """PSNR of values reused at equal distances, at no fewer MACs than the budget."""
    student = Student(program, [bench.first])
    found: dict[str, float] = {}
    for level in levels_of(student, 0):
        if level.history != 1:
            continue
        plans = [evenly(student, level, budget * more) for more in (1.0, 1.03, 1.06, 1.1, 1.15)]
        schedule = next((s for s in plans if s is not None and student.spent(s) >= 0.99 * budget), None)
        if schedule is None:
            continue
        kind = "stage" if "stage" in level.name else level.name
        model = fxmask.compile(program, fxmask.rectify(program, student.mask(schedule, {})), backend="eager")
        value = bench.of(model)
        found[kind] = max(found.get(kind, -math.inf), value)
    yield from found.items()


def table(results: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [*HEAD.splitlines(), ""]
    lines += [
        "## Without injected noise",
        "",
        "| cell | images | " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * (len(COLUMNS) + 2),
    ]
    for result in results:
        if not result["cell"]["eta"]:
            for row in result["rows"]:
                lead, beside = row["instant"] - row["fewer"], row["instant"] - row["plain"]
                lead_text = f"+{lead:.1f}" if lead >= 6 else f"**{lead:+.1f}**"
                beside_text = f"{beside:+.1f}" if beside >= -0.3 else f"**{beside:+.1f}**"
                lines.append(
                    f"| {Cell(**result['cell']).name} | {result['images']} | {row['asked']:g}x | {row['steps']} | "
                    f"{row['instant']:.1f} | {row['fewer']:.1f} | {lead_text} | {row['plain']:.1f} | {beside_text} | "
                    f"{row['seconds']:.1f} |"
                )
    lines += [
        "",
        "## With injected noise, eta = 1",
        "",
        "| cell | images | " + " | ".join(NOISY) + " |",
        "|" + "---|" * (len(NOISY) + 2),
    ]
    for result in results:
        if result["cell"]["eta"]:
            for row in result["rows"]:
                rivals = [row.get(name) for name in ("output", "branches", "stage")]
                lead = row["instant"] - max(x for x in rivals if x is not None)
                text = f"+{lead:.1f}" if lead >= 0 else f"**{lead:+.1f}**"
                cells = " | ".join("" if x is None else f"{x:.1f}" for x in rivals)
                lines.append(
                    f"| {Cell(**result['cell']).name} | {result['images']} | {row['asked']:g}x | {row['ratio']:.2f}x | "
                    f"{row['instant']:.1f} | {cells} | {text} | {row['plain']:.1f} | {row['seconds']:.1f} |"
                )
    return "\n".join(lines) + "\n" + NOTES


COLUMNS = ("asked", "full steps", "instant", "fewer steps", "lead", "plain fit", "beside it", "seconds to fit")
NOISY = (
    "asked",
    "MACs",
    "instant",
    "output held",
    "branches reused",
    "best stage reused",
    "lead",
    "plain fit",
    "seconds to fit",
)
HEAD = """# Plans from one image

`python examples/studies/instant.py`: one image is recorded as its user would make it (no further call of the denoiser), and a
plan is fitted on that alone (`effort="instant"`). PSNR in dB of final samples against the full sampler's from the same noise,
mean over fresh images with other prompts. Bold: less than 6 dB over fewer steps; more than 0.3 dB below the plain fit (the
last three predictions, evenly or bent, whichever turned out better, which nobody knows beforehand); or below fixed reuse.
"Seconds to fit" choose steps, sources and coefficients, on one thread of a shared machine. Cells of 50 steps and all with
injected noise were measured on an H200, the others on a CPU."""

NOTES = """
With injected noise a plan forecasts the whole output or reuses branches or a stage, whichever is estimated to be better, with
full steps at equal distances, denser at the beginning, or where forecasts would have them. In this study six calls of the
denoiser on the recorded image tell; in a pipeline in use the second image does, for none (`docs/guide/in-use.md`). The rivals
reuse at equal distances, and the best stage is the best of all after the fact, at up to 15 % more MACs than ours.

- On DDPM the best stage stays ahead by 0.2 to 1.9 dB in six rows: of several stages that cost about the same the estimate
  does not find the best one. Everywhere else plans are level with the best rival, or ahead by up to 13 dB.
- All lanes share coefficients: fitted for each lane alone they were 0.1 to 1.9 dB worse in seven of nine cells (latent U-Net
  and DiT with DDIM, PixArt with DPM-Solver++, 20 steps, 1.5x to 3x) and better in two, by 1.2 dB at most; one image tells too
  little of two lanes.
- With so few steps as 6 and 8 what is formed is one to four single predictions, and which ones is chosen by one image. The
  bold rows were not mended by a handicap for irregular placements, by shrinking more, or by replays in which the denoiser
  follows its sample (`gains_of`): each helped some rows and cost as much in others.
"""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", action="append", choices=tuple(CELLS), help="measure this cell; may be repeated")
    parser.add_argument("--all", action="store_true", help="measure every cell that is not there yet")
    parser.add_argument("--table", action="store_true", help="write the table of what is there")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=48, help="fresh images")
    parser.add_argument("--batch", type=int, default=16, help="how many of them at a time")
    parser.add_argument("--output", type=Path, help="folder of the measurements; default: build/instant")
    options = parser.parse_args()
    place = options.output or ROOT / "build" / "instant"
    place.mkdir(parents=True, exist_ok=True)
    device = require_device(options.device)
    torch.set_num_threads(1)
    for name in options.cell or (CELLS if options.all else ()):
        path = place / f"{name}.json"
        if options.all and path.exists():
            continue
        result = measure(CELLS[name], device, options.images, options.batch)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1), encoding="utf-8")
        partial.replace(path)
    if options.table:
        found = [
            json.loads((place / f"{name}.json").read_text(encoding="utf-8"))
            for name in CELLS
            if (place / f"{name}.json").exists()
        ]
        (RESULTS / "instant.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (RESULTS / "instant.md").write_text(table(found), encoding="utf-8")


if __name__ == "__main__":
    main()
