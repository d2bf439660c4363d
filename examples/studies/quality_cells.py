"""What `quality.py` measures: a cell (model, steps, sampler), its fresh noise, the rows that are kept, the learned masks."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where digits.py is

from digits import NULL_CLASS, captions_of, load_classifier, load_model, load_pipeline, load_scheduler

import fxmask
from fxmask.learning.effort import EFFORTS, Limits
from fxmask.learning.search import Search
from fxmask.metrics import psnr, ssim
from fxmask.sampling.trajectory import Trajectory
from fxmask.storage.plans import load_plan, save_mask

FAMILIES = ("ddpm", "dit", "ldm", "pixart")
GUIDED = {"dit-1.5": ("dit", 1.5), "dit-4": ("dit", 4.0), "ldm-4": ("ldm", 4.0), "pixart-4": ("pixart", 4.0)}
RATIOS = (1.5, 2.0, 3.0)
EVALUATION = 128  # images of fresh noise
CPU = torch.device("cpu")

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One family, number of steps and sampler, and the scale of guidance if there is some."""

    family: str
    steps: int
    eta: float
    guidance: float | None = None
    device: torch.device = CPU

    @classmethod
    def of(cls, name: str, steps: int, eta: float, device: torch.device = CPU) -> Cell:
        """The cell of a family, or of a family and a scale of guidance, such as ``dit-4``."""
        family, guidance = GUIDED.get(name, (name, None))
        return cls(family, steps, eta, guidance, device)

    @property
    def name(self) -> str:
        """For file names."""
        guidance = "" if self.guidance is None else f"-{self.guidance:g}"
        return f"{self.family}{guidance}-{self.steps}-{'stochastic' if self.eta else 'deterministic'}"

    @cached_property
    def model(self) -> torch.nn.Module:
        """The shipped denoiser."""
        return load_model(self.family).to(self.device)

    def batches(self, images: int = EVALUATION) -> list[int]:
        """Batch sizes of so many images: the U-Nets take another path from 64 on, which would be another program.

        With guidance every image is there twice.
        """
        size = min(images, (32 if self.family in ("ddpm", "ldm") else 64) // (1 if self.guidance is None else 2))
        return [size] * (images // size)

    def scheduler(self, kind: str = "DDIMScheduler") -> Any:
        """The shipped noise schedule."""
        folder = "latent_scheduler" if self.family in ("ldm", "pixart") else "scheduler"
        return load_scheduler(kind, folder=folder)

    def no_conditioning(self, batch_size: int, generator: torch.Generator) -> dict[str, Any]:
        """What guidance leads away from: no class, or the empty caption."""
        if self.family == "dit":
            return {"class_labels": torch.full((batch_size,), NULL_CLASS)}
        return {key: x.expand(batch_size, *x.shape[1:]) for key, x in self._empty.items() if isinstance(x, torch.Tensor)}

    @cached_property
    def _empty(self) -> dict[str, Any]:
        from digits import encode_captions

        pipeline: Any = load_pipeline(self.family)
        with torch.no_grad():
            encoded: dict[str, Any] = encode_captions(pipeline.text_encoder, [""])
        return encoded

    @cached_property
    def _prompts(self) -> Callable[[int, torch.Generator], dict[str, Any]]:
        from digits import encode_captions

        captions = [caption for digit in range(10) for caption in captions_of(digit)]
        pipeline: Any = load_pipeline(self.family)
        with torch.no_grad():
            encoded = encode_captions(pipeline.text_encoder, captions)

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
        guided = {} if self.guidance is None else {"guidance_scale": self.guidance, "unconditional": self.no_conditioning}
        return fxmask.record(
            self.model,
            scheduler,
            num_inference_steps=steps or self.steps,
            batch_size=images,
            example_inputs=self.conditioning,
            step_kwargs=options,
            seed=seed,
            **guided,
        )

    @property
    def training_runs(self) -> tuple[int, int]:
        """Recorded runs to learn from, the last ones held out, and images in each.

        More where injected noise makes images differ in how hard they are, fewer where each takes long: with guidance twice as
        long.
        """
        if self.guidance is not None:
            return (3, 16) if self.eta and self.steps <= 20 else (3, 8)
        if not self.eta:
            return (3, 16) if self.steps <= 20 else (3, 8)
        own = {"dit": (10, 16)} if self.steps <= 20 else {"ddpm": (3, 16), "dit": (5, 16)}
        return own.get(self.family, (5, 16) if self.steps <= 20 else (3, 8))

    def training(self, seed: int = 0, scheduler: Any = None) -> list[Trajectory]:
        """The recorded runs to learn from."""
        runs, images = self.training_runs
        return [self.record(1_000 * seed + k, images, scheduler) for k in range(runs)]

    @cached_property
    def decode(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Samples to images [N, 1, 16, 16], which are on the CPU."""
        if self.family in ("ddpm", "dit"):
            return lambda samples: samples.cpu()
        vae: Any = load_model("autoencoder").to(self.device)

        @torch.no_grad()
        def decode(latents: torch.Tensor) -> torch.Tensor:
            image: torch.Tensor = vae.decode(latents / vae.config.scaling_factor).sample
            return image.clamp(-1, 1).cpu()

        return decode


class Results:
    """Rows of one cell in a JSON file; the images of each, and the masks of some, in folders beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Row] = self._read()

    def _read(self) -> dict[str, Row]:
        rows: dict[str, Row] = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        return rows

    def has(self, key: str) -> bool:
        """Whether a row is there."""
        return key in self.rows

    def is_complete(self, key: str) -> bool:
        """Whether a row is there with all that is measured; rows of earlier versions lack what is compared besides PSNR."""
        return key in self.rows and ("psnr" not in self.rows[key] or "ssim" in self.rows[key])

    def kept(self, key: str) -> Row:
        """What of a row stays when the rest of it is measured again: it takes long, and is of the same images."""
        return {name: value for name, value in self.rows.get(key, {}).items() if name == "converged"}

    def samples(self, key: str) -> Path:
        """Where the images of a row are kept."""
        return self.path.parent / "samples" / self.path.stem / f"{_as_name(key)}.pt"

    def mask(self, key: str) -> Path:
        """Where the mask of a row is kept, if it is."""
        return self.path.parent / "masks" / self.path.stem / _as_name(key)

    def keep_images(self, key: str, images: torch.Tensor) -> None:
        """Keep the images of a row."""
        self.samples(key).parent.mkdir(parents=True, exist_ok=True)
        torch.save(images, self.samples(key))

    def put(self, key: str, row: Row) -> None:
        """Keep a row. Rows that another process has put there since are kept as well."""
        self.keep_images(key, row.pop("images"))
        self.rows = {**self._read(), key: row}
        partial = self.path.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(json.dumps(self.rows, indent=1), encoding="utf-8")
        os.replace(partial, self.path)
        short = {name: value for name, value in row.items() if len(str(value)) < 80}
        print(f"{self.path.stem} {key}: {short}", flush=True)


def _as_name(key: str) -> str:
    return key.replace(" ", "_").replace("/", "_")


def columns(*cells: object) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


class Evaluation:
    """Fresh noise of one cell, and how close other samples come to the full sampler's.

    Args:
        cell: whose model and steps.
        seed: of the noise of the first run.
        images: in all.
        scheduler: another one than the cell's.
    """

    def __init__(self, cell: Cell, seed: int = 100_000, images: int = EVALUATION, scheduler: Any = None) -> None:
        self.cell = cell
        self.seeds = [(seed + k, size) for k, size in enumerate(cell.batches(images))]
        self.runs = [cell.record(number, size, scheduler) for number, size in self.seeds]
        self.program = fxmask.capture(cell.model, self.runs[0].calls[0][0])
        self.reference = cell.decode(torch.cat([t.final for t in self.runs]))
        self.classifier = load_classifier()
        self.classes = self._classes(self.reference)
        self.features = self._features(self.reference)
        self.apart = float(torch.pdist(self.features).mean())

    @torch.no_grad()
    def _features(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.classifier.features(images.clamp(-1, 1))
        return features

    @torch.no_grad()
    def _classes(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier(images)
        return logits.argmax(1)

    def full(self) -> Row:
        """The line of the full sampler, which everything else is compared with."""
        return {"ratio": 1.0, "images": self.reference}

    def row(self, samples: Sequence[torch.Tensor], ratio: float, own: bool = True, **more: Any) -> Row:
        """One line of the table. The samples are kept for what is computed later (``converged``)."""
        images = self.cell.decode(torch.cat(list(samples)))
        row: Row = {"ratio": ratio, "images": images, **more}
        if own:
            quality = psnr(images, self.reference).clamp(max=100)
            row["psnr"], row["p10"] = float(quality.mean()), float(quality.quantile(0.1))
            row["ssim"] = float(ssim(images, self.reference).mean())
            row["features"] = float((self._features(images) - self.features).norm(dim=1).mean() / self.apart)
            row["agreement"] = float((self._classes(images) == self.classes).float().mean())
        return row

    def of_mask(self, mask: fxmask.Mask, own: bool = True, **more: Any) -> Row:
        """The accelerated model's line."""
        plan = fxmask.rectify(self.program, mask)
        accelerated = fxmask.compile(self.program, plan, backend="eager")
        samples = [t.rollout(accelerated) for t in self.runs]
        return self.row(samples, plan.mac_ratio, own, graphs=plan.distinct_graphs, **more)


def searching(
    cell: Cell, training: Sequence[Trajectory], effort: str, journal: Path, seed: int = 0, lanes: str = "own"
) -> Search:
    """fxmask's learner; what it measured in an earlier process, it reads from the journal."""
    program = fxmask.capture(cell.model, training[0].calls[0][0])
    journal.parent.mkdir(parents=True, exist_ok=True)
    given: dict[str, Any] = {"seed": seed, "progress": True, "checkpoint": journal, "lanes": lanes}
    return Search(program, training, effort=EFFORTS[effort], limits=Limits(), **given)


def default_mask(cell: Cell, folder: Path, seed: int = 0) -> tuple[fxmask.Mask, Mapping[str, Any]]:
    """fxmask's mask at 2x with default effort, and what learning it took; learned now if it is not kept.

    Args:
        cell: whose.
        folder: of the results.
        seed: of the search and of the recorded noise; 0 is the one of every other row.
    """
    suffix = f"-seed{seed}" if seed else ""
    place = Results(folder / f"{cell.name}.json").mask(f"fxmask 2.0{suffix}")
    if not place.exists():
        journal = folder / f"{cell.name}-default{suffix}.journal.json"
        point = searching(cell, cell.training(seed), "default", journal, seed).best(1 / 2.0)
        save_mask(place, point.mask, {"units": point.units, "kind": point.kind}, {})
    mask, facts, _ = load_plan(place)
    return mask, facts
