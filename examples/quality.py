"""Quality at equal MACs: fxmask beside fewer steps, fixed reuse, fixed forecasts and the paper's learner.

    python examples/quality.py                            # everything; an interrupted run goes on where it was
    python examples/quality.py --families dit --steps 20  # some cells
    python examples/quality.py --table                    # only writes the table of what is there

Measurements are kept in build/quality, one file per cell; a copy of them ships beside the table, so that a fresh clone goes on
from there. Noise for evaluation is never used for learning. With the
stochastic sampler the noise of fewer steps is the variance-weighted sum of the full sampler's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from digits import captions_of, load_classifier, load_model, load_pipeline, load_scheduler

import fxmask
from fxmask.candidates import Level, evenly, levels_of
from fxmask.learning import EFFORTS, Limits, Search
from fxmask.metrics import psnr
from fxmask.paper import PaperOptions
from fxmask.student import Student
from fxmask.trajectory import Trajectory

FAMILIES = ("ddpm", "dit", "ldm", "pixart")
RATIOS = (1.5, 2.0, 3.0)
TRAINING, TRAINING_RUNS = 16, 3  # images in a recorded run; the last run is held out
EVALUATION = 128  # images of fresh noise
CONVERGED = 1000
PAPER = {
    "paper's learner": PaperOptions(),
    "paper, Gumbel-Softmax": PaperOptions(gumbel=True),
    "paper, no timestep scaling": PaperOptions(weighted=False),
    "paper, no bi-modal term": PaperOptions(bimodal=0.0),
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One family, number of steps and sampler."""

    family: str
    steps: int
    eta: float

    @property
    def name(self) -> str:
        """For file names."""
        return f"{self.family}-{self.steps}-{'stochastic' if self.eta else 'deterministic'}"

    @cached_property
    def model(self) -> torch.nn.Module:
        """The shipped denoiser."""
        return load_model(self.family)

    @property
    def batches(self) -> list[int]:
        """Batch sizes of the evaluation: the U-Nets take another path from 64 on, which would be another program."""
        size = 32 if self.family in ("ddpm", "ldm") else 64
        return [size] * (EVALUATION // size)

    def scheduler(self, kind: str = "DDIMScheduler") -> Any:
        """The shipped noise schedule."""
        folder = "latent_scheduler" if self.family in ("ldm", "pixart") else "scheduler"
        return load_scheduler(kind, folder=folder)

    @cached_property
    def _prompts(self) -> Callable[[int, torch.Generator], dict[str, Any]]:
        from digits import encode_captions

        captions = [caption for digit in range(10) for caption in captions_of(digit)]
        with torch.no_grad():
            encoded = encode_captions(load_pipeline(self.family).text_encoder, captions)

        def draw(batch_size: int, generator: torch.Generator) -> dict[str, Any]:
            chosen = torch.randint(len(captions), (batch_size,), generator=generator)
            return {key: value[chosen] if isinstance(value, torch.Tensor) else value for key, value in encoded.items()}

        return draw

    def conditioning(self, batch_size: int, generator: torch.Generator) -> dict[str, Any]:
        """Random classes or captions."""
        if self.family == "ddpm":
            return {}
        if self.family == "dit":
            return {"class_labels": torch.randint(10, (batch_size,), generator=generator)}
        return self._prompts(batch_size, generator)

    def record(self, seed: int, images: int, scheduler: Any = None, steps: int | None = None) -> Trajectory:
        """A sampling run of the unaccelerated model."""
        options = {"eta": self.eta} if self.eta and scheduler is None else None
        scheduler = scheduler or self.scheduler()
        return fxmask.record(self.model, scheduler, steps or self.steps, images, self.conditioning, options, seed)

    @cached_property
    def decode(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Samples to images [N, 1, 16, 16]."""
        if self.family in ("ddpm", "dit"):
            return lambda samples: samples
        vae = load_model("autoencoder")

        @torch.no_grad()
        def decode(latents: torch.Tensor) -> torch.Tensor:
            image: torch.Tensor = vae.decode(latents / vae.config.scaling_factor).sample
            return image.clamp(-1, 1)

        return decode


class Results:
    """Rows of one cell in a JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Row] = json.loads(path.read_text()) if path.exists() else {}

    def has(self, key: str) -> bool:
        """Whether a row is there."""
        return key in self.rows

    def samples(self, key: str) -> Path:
        """Where the images of a row are kept."""
        return self.path.parent / "samples" / self.path.stem / f"{key.replace(' ', '_').replace('/', '_')}.pt"

    def put(self, key: str, row: Row) -> None:
        """Keep a row."""
        images = row.pop("images")
        self.rows[key] = row
        self.samples(key).parent.mkdir(parents=True, exist_ok=True)
        torch.save(images, self.samples(key))
        partial = self.path.with_suffix(".tmp")
        partial.write_text(json.dumps(self.rows, indent=1))
        os.replace(partial, self.path)


class Evaluation:
    """Fresh noise of one cell, and how close other samples come to the full sampler's."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.runs = [cell.record(100_000 + k, size) for k, size in enumerate(cell.batches)]
        self.program = fxmask.capture(cell.model, self.runs[0].calls[0][0])
        self.student = Student(self.program, self.runs)
        self.reference = cell.decode(torch.cat([t.final for t in self.runs]))
        self.classifier = load_classifier()
        self.classes = self._classes(self.reference)

    @torch.no_grad()
    def _classes(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(images).argmax(1)

    def row(self, samples: Sequence[torch.Tensor], ratio: float, own: bool = True, **more: Any) -> Row:
        """One line of the table. The samples are kept for what is computed later (``converged``)."""
        images = self.cell.decode(torch.cat(list(samples)))
        row: Row = {"ratio": ratio, "images": images, **more}
        if own:
            quality = psnr(images, self.reference).clamp(max=100)
            row["psnr"], row["p10"] = float(quality.mean()), float(quality.quantile(0.1))
            row["agreement"] = float((self._classes(images) == self.classes).float().mean())
        return row

    def of_mask(self, mask: fxmask.Mask, **more: Any) -> Row:
        """The accelerated model's line."""
        plan = fxmask.rectify(self.program, mask)
        accelerated = fxmask.compile(self.program, plan, "eager")
        samples = [t.rollout(accelerated) for t in self.runs]
        return self.row(samples, plan.mac_ratio, graphs=plan.distinct_graphs, **more)


@torch.no_grad()
def coarse_ddim(model: torch.nn.Module, fine: Trajectory, timesteps: Sequence[int], eta: float) -> torch.Tensor:
    """DDIM at chosen timesteps with the noise of a finer run.

    Song et al., "Denoising Diffusion Implicit Models", 2021, Eq. 12 and 16. Noise ``z`` of fine steps within a coarse one
    adds up with weights ``sigma_i sqrt(alpha_end / alpha_i)``, as it would if the fine steps ran.
    """
    scheduler = fine.scheduler
    alphas = scheduler.alphas_cumprod.double()

    def alpha(t: float) -> torch.Tensor:
        return alphas[int(t)] if t >= 0 else torch.as_tensor(scheduler.final_alpha_cumprod).double()

    def sigma(now: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return eta * ((1 - after) / (1 - now) * (1 - now / after)).clamp_min(0).sqrt()

    grid = [*fine.timesteps, -1.0]
    x = fine.initial_noise.clone()
    for t, after in zip(timesteps, [*timesteps[1:], -1], strict=True):
        call = {**fine.calls[0][0], fine.sample: x}
        call["timestep"] = torch.as_tensor(int(t)).expand(torch.as_tensor(call["timestep"]).shape)
        output = model(**call)
        epsilon = output[0] if not isinstance(output, torch.Tensor) else output
        if epsilon.shape[1] == 2 * x.shape[1]:
            epsilon = epsilon.chunk(2, dim=1)[0]
        a, b = alpha(t), alpha(after)
        start = (x - (1 - a).sqrt() * epsilon) / a.sqrt()
        if scheduler.config.clip_sample:
            start = start.clamp(-scheduler.config.clip_sample_range, scheduler.config.clip_sample_range)
        s = sigma(a, b)
        x = b.sqrt() * start + (1 - b - s**2).clamp_min(0).sqrt() * epsilon
        if eta:
            inside = [i for i in range(len(grid) - 1) if after < grid[i] <= t]
            weights = [sigma(alpha(grid[i]), alpha(grid[i + 1])) * (b / alpha(grid[i + 1])).sqrt() for i in inside]
            total = torch.stack(weights).norm() if weights else torch.tensor(0.0)
            if total > 0:
                noise = sum(w * fine.noises[i][0] for w, i in zip(weights, inside, strict=True)) / total
                x = x + s * noise
        x = x.to(fine.initial_noise.dtype)
    return x


def rivals(evaluation: Evaluation, training: Sequence[Trajectory]) -> Iterator[tuple[str, Callable[[float], Row | None]]]:
    """Every rival: its name, and a function from a MAC ratio to its line."""
    cell, runs, model = evaluation.cell, evaluation.runs, evaluation.cell.model
    teacher = Student(fxmask.capture(model, training[0].calls[0][0]), training[:-1])
    levels = levels_of(teacher, 0)

    def own_grid(ratio: float) -> Row:
        steps = max(1, round(cell.steps / ratio))
        scheduler = cell.scheduler()
        scheduler.set_timesteps(steps)
        timesteps = scheduler.timesteps.tolist()
        return evaluation.row([coarse_ddim(model, t, timesteps, cell.eta) for t in runs], cell.steps / steps)

    def same_grid(ratio: float) -> Row:
        steps = max(1, round(cell.steps / ratio))
        timesteps = [int(runs[0].timesteps[round(k * cell.steps / steps)]) for k in range(steps)]
        return evaluation.row([coarse_ddim(model, t, timesteps, cell.eta) for t in runs], cell.steps / steps)

    def fixed(level: Level) -> Callable[[float], Row | None]:
        def row(ratio: float) -> Row | None:
            schedule = evenly(teacher, level, 1 / ratio)
            if schedule is None or abs(teacher.spent(schedule) * ratio - 1) > 0.12:
                return None
            return evaluation.of_mask(teacher.mask(schedule, teacher.rollout(schedule).coefficients))

        return row

    def deepest(ratio: float) -> Row | None:
        found = [fixed(level)(ratio) for level in levels if "stage" in level.name and level.history == 1]
        return max((row for row in found if row), key=lambda row: row["psnr"], default=None)

    def solver(ratio: float) -> Row:
        steps = max(1, round(cell.steps / ratio))
        scheduler = cell.scheduler("DPMSolverMultistepScheduler")
        samples = [cell.record(100_000 + k, size, scheduler, steps).final for k, size in enumerate(cell.batches)]
        return evaluation.row(samples, cell.steps / steps, own=False)

    def named(name: str, history: int) -> Level:
        return next(level for level in levels if level.name == name and level.history == history)

    yield "fewer steps, scheduler's grid", own_grid
    yield "fewer steps, same grid", same_grid
    yield "FORA: all branches reused", fixed(named("branches", 1))
    if cell.family in ("ddpm", "ldm"):
        yield "DeepCache: best stage reused", deepest
    yield "whole output held", fixed(named("output", 1))
    yield "branches, fitted forecast", fixed(named("branches", 3))
    yield "whole output, fitted forecast", fixed(replace(named("output", 3), samples=2 if cell.eta else 0))
    if not cell.eta:
        yield "DPM-Solver++, fewer steps", solver


def run_cell(cell: Cell, folder: Path, paper: bool) -> None:
    """Measure what is missing in one cell."""
    results = Results(folder / f"{cell.name}.json")
    evaluation = Evaluation(cell)
    training = [cell.record(seed, TRAINING) for seed in range(TRAINING_RUNS)]
    for effort in ("quick", "default"):
        label = "fxmask" if effort == "default" else "fxmask quick"
        if all(results.has(f"{label} {ratio}") for ratio in RATIOS):
            continue
        program = fxmask.capture(cell.model, training[0].calls[0][0])
        journal = folder / f"{cell.name}-{effort}.journal.json"
        journal.parent.mkdir(parents=True, exist_ok=True)
        search = Search(program, training, EFFORTS[effort], Limits(), 0, True, journal)
        for ratio in (2.0, 1.5, 3.0):
            started = time.perf_counter()
            point = search.best(1 / ratio)
            seconds = time.perf_counter() - started
            row = evaluation.of_mask(point.mask, units=point.units, kind=point.kind, seconds=seconds)
            results.put(f"{label} {ratio}", row)
            print(f"{cell.name} {label} {ratio}: {row}", flush=True)
    for name, measure in rivals(evaluation, training):
        for ratio in RATIOS:
            if results.has(f"{name} {ratio}"):
                continue
            row = measure(ratio)
            if row is not None:
                results.put(f"{name} {ratio}", row)
                print(f"{cell.name} {name} {ratio}: {row}", flush=True)
    if paper and cell.family in ("ddpm", "dit") and cell.steps == 20:
        program = fxmask.capture(cell.model, training[0].calls[0][0])
        for name, options in PAPER.items():
            for ratio in (2.0,):
                if results.has(f"{name} {ratio}"):
                    continue
                started = time.perf_counter()
                mask = fxmask.learn(program, training[0], speedup=ratio, learner="paper", options=options)
                row = evaluation.of_mask(mask, seconds=time.perf_counter() - started)
                # one epoch is a forward and a backward pass of every step, 3 units of the one recorded run
                row["units"] = 3.0 * options.epochs
                results.put(f"{name} {ratio}", row)
                print(f"{cell.name} {name} {ratio}: {row}", flush=True)


def compare_with_converged(family: str, folder: Path) -> None:
    """PSNR of the kept images against 1,000 deterministic steps from the same noise, for every deterministic cell."""
    path = folder / f"converged-{family}.pt"
    cell = Cell(family, 20, 0.0)
    if not path.exists():
        runs = [cell.record(100_000 + k, size) for k, size in enumerate(cell.batches)]
        steps = CONVERGED - runs[0].scheduler.config.steps_offset  # the offset would lead beyond the last timestep
        images = cell.decode(torch.cat([t.with_steps(cell.model, steps).final for t in runs]))
        torch.save(images, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
    converged = torch.load(path, weights_only=True)
    for file in folder.glob(f"{family}-*-deterministic.json"):
        results = Results(file)
        for key, row in results.rows.items():
            if not results.samples(key).exists():
                continue  # measured elsewhere
            images = torch.load(results.samples(key), weights_only=True)
            results.put(key, {**row, "images": images, "converged": float(psnr(images, converged).clamp(max=100).mean())})


def main() -> None:
    """Runs what was asked for, then writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--steps", nargs="+", type=int, default=[20, 50])
    parser.add_argument("--samplers", nargs="+", default=["deterministic", "stochastic"])
    parser.add_argument("--folder", type=Path, default=Path("build/quality"))
    parser.add_argument("--no-paper", action="store_true", help="leave the paper's learner out")
    parser.add_argument("--converged", action="store_true", help="also compare with 1,000 steps")
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "quality.md")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    shipped = options.output.parent / "quality"
    for path in shipped.glob("*.json"):
        if not (options.folder / path.name).exists():
            shutil.copy(path, options.folder / path.name)
    for steps in options.steps if not options.table else ():
        for family in options.families:
            for sampler in options.samplers:
                run_cell(Cell(family, steps, float(sampler == "stochastic")), options.folder, not options.no_paper)
    for family in options.families if options.converged else ():
        compare_with_converged(family, options.folder)
    write_table(options.folder, options.output)
    shipped.mkdir(parents=True, exist_ok=True)
    for path in options.folder.glob("*stic.json"):
        shutil.copy(path, shipped / path.name)


OURS = ("fxmask", "fxmask quick", "branches, fitted forecast", "whole output, fitted forecast")
INTRODUCTION = f"""# Quality at equal MACs

Made by `python examples/quality.py` (`--converged` for that column). {EVALUATION} samples per row, noise that
learning has not seen, PSNR per image in dB against the same sampler with the same noise: mean and 10th percentile.
*Converged*: mean PSNR against {CONVERGED:,} deterministic steps from the same noise. *Classes*: share of samples that the
shipped classifier puts in the class of the full sampler's. *Units*: learning, in full sampling runs of the
{(TRAINING_RUNS - 1) * TRAINING} images that are learned from; the ratios of a cell share what is measured, 2x comes first and
pays for it. *Graphs*: distinct step graphs. Fixed plans (reuse, forecasts) are fitted on the same images as fxmask's. Denoisers
are sampled without guidance; `ldm` and `pixart` are compared after decoding. With the stochastic sampler (DDIM, eta = 1) fewer
steps get the variance-weighted sum of the full sampler's noise.
"""


def write_table(folder: Path, output: Path) -> None:
    """All cells as Markdown: fxmask's lead over the best rival that is no plan of ours, then every row."""
    cells = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*stic.json"))}
    every = [Cell(family, steps, eta).name for steps in (20, 50) for family in FAMILIES for eta in (0.0, 1.0)]
    missing = [name for name in every if len(cells.get(name, ())) < len(RATIOS) * 7]
    lines = [INTRODUCTION]
    if missing:
        lines += ["Not measured yet, or not in full: " + ", ".join(missing) + ".", ""]
    lines += ["## fxmask (default) and the best of the rivals", ""]
    lines += ["| cell | asked | fxmask | best rival | lead | best fixed plan of ours |", "|---|---|---|---|---|---|"]
    for name, rows in cells.items():
        for ratio in RATIOS:
            here = _at(rows, ratio)
            rivals = {key: row["psnr"] for key, row in here.items() if key not in OURS and "psnr" in row and "paper" not in key}
            fixed = {key: row["psnr"] for key, row in here.items() if key in OURS[2:]}
            if "fxmask" not in here or not rivals:
                continue
            ours, best = here["fxmask"]["psnr"], max(rivals, key=lambda key: rivals[key])
            fixed_best = f"{max(fixed.values()):.1f}" if fixed else ""
            lines.append(
                f"| {name} | {ratio:g}x | {ours:.1f} | {rivals[best]:.1f} {best} | {ours - rivals[best]:+.1f} | {fixed_best} |"
            )
    for name, rows in cells.items():
        lines += ["", f"## {name}", ""]
        lines += ["| plan | asked | MAC ratio | PSNR | 10th pct | converged | classes | units | graphs |"]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        for ratio in RATIOS:
            for key, row in sorted(_at(rows, ratio).items(), key=lambda item: -item[1].get("psnr", 0.0)):
                line = [key, f"{ratio:g}x", f"{row['ratio']:.2f}"]
                line += [f"{row[column]:.1f}" if column in row else "" for column in ("psnr", "p10", "converged")]
                line += [f"{row['agreement']:.0%}" if "agreement" in row else ""]
                line += [f"{row['units']:.0f}" if "units" in row else "", str(row.get("graphs", ""))]
                lines.append("| " + " | ".join(line) + " |")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _at(rows: dict[str, Row], ratio: float) -> dict[str, Row]:
    return {key.removesuffix(f" {ratio}"): row for key, row in rows.items() if key.endswith(f" {ratio}")}


if __name__ == "__main__":
    main()
