"""All configurations of a run: plan, sample, measure."""

from __future__ import annotations

import json
import logging
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fxmask.api import compile
from fxmask.errors import InputError
from fxmask.ir.program import Program
from fxmask.learning.ranks import Group
from fxmask.metrics import FeatureSet, Reference, clip_score, compare_sets, psnr
from fxmask.sampling.pipeline_trajectory import record_pipeline
from fxmask.sampling.sampler import Sampler
from fxmask.tools.bench_cases import from_code
from fxmask.tools.evaluation.images import batches, call_of, sample
from fxmask.tools.evaluation.plans import Planned, macs_of, plan_of
from fxmask.tools.evaluation.run_file import Configuration, Run
from fxmask.tools.subjects import Subject, load_subject, seeded

logger = logging.getLogger(__name__)
Row = dict[str, Any]
IMAGES_PER_SPLIT = 500  # of IS; ten splits from 5,000 images on


class Evaluation:
    """One run in one folder; what lies there is not made again.

    Args:
        run: what is evaluated.
        folder: of images, plans and rows.
        device: where the models run.
        backend: what plans are compiled with.
        recorded: images that learners learn from, in two runs.
        as_png: keep images as PNG too.
        progress: show bars.
    """

    def __init__(
        self,
        run: Run,
        folder: Path,
        *,
        device: str = "cpu",
        backend: str = "eager",
        recorded: int = 8,
        as_png: bool = False,
        progress: bool = True,
    ) -> None:
        self.run, self.folder, self.device, self.backend = run, folder, device, backend
        self._recorded, self._as_png, self._progress = recorded, as_png, progress
        self._subjects: dict[str, Subject] = {}
        self._programs: dict[tuple[str, int], tuple[Program, list[Sampler]]] = {}
        self._extractor: Any = None
        self._reference: Reference | None = None

    def rows(self, seeds: Sequence[int]) -> list[list[Row]]:
        """Of every configuration the rows of all seeds; they are kept as ``row.json``."""
        return [[self.row(configuration, seed) for seed in seeds] for configuration in self.run.configurations]

    def row(self, configuration: Configuration, seed: int) -> Row:
        """One configuration from the noise of one seed."""
        folder = self.folder / as_name(configuration.name)
        place = folder / f"seed{seed}" / "row.json"
        if place.exists():
            found: Row = json.loads(place.read_text(encoding="utf-8"))
            return found
        subject = self._subject(configuration.subject or self.run.subject)
        steps = configuration.steps or self.run.steps
        planned, program = self._planned(configuration, subject, steps, folder)
        self._sample(configuration, subject, planned, program, folder / f"seed{seed}", seed, steps)
        if dist.is_available() and dist.is_initialized():
            dist.barrier()
        row = {"method": configuration.name, **self._costs(configuration, planned, program, steps)}
        row |= self._scores(folder / f"seed{seed}", self._other(configuration, seed), seed)
        if Group.current().rank == 0:
            place.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
        return row

    def _subject(self, name: str) -> Subject:
        if name not in self._subjects:
            subject = load_subject(name, self.device)
            if subject.pipe is None:
                raise InputError(f"{name!r} is a denoiser; evaluation calls a pipeline, so let its function return one")
            self._subjects[name] = subject
        return self._subjects[name]

    def _program(self, subject: Subject, steps: int) -> tuple[Program, list[Sampler]]:
        """The captured denoiser and the runs to learn from."""
        if (subject.name, steps) not in self._programs:
            runs: list[Sampler] = []
            for k in range(2):
                size = max(1, self._recorded // 2)
                call = call_of(subject, self.run, k, size, steps)
                runs.append(record_pipeline(subject.pipe, **call, output_type="pt", generator=seeded(k)))
            self._programs[subject.name, steps] = subject.program(runs[0]), runs
        return self._programs[subject.name, steps]

    def _planned(self, row: Configuration, subject: Subject, steps: int, folder: Path) -> tuple[Planned | None, Program]:
        program, runs = self._program(subject, steps)
        if row.kind in ("full", "steps"):
            return None, program
        place = self.folder / as_name(row.mask_of) if row.mask_of else folder
        return plan_of(row, program, runs, place, 0, self._progress), program

    def _sample(
        self,
        row: Configuration,
        subject: Subject,
        planned: Planned | None,
        program: Program,
        folder: Path,
        seed: int,
        steps: int,
    ) -> None:
        if row.kind == "steps":
            steps = max(1, round(steps / row.speedup))
        if planned is None:
            sample(subject, self.run, folder, row.name, seed, steps, self._as_png, self._progress)
            return
        component = subject.component
        original = getattr(subject.pipe, component)
        setattr(subject.pipe, component, compile(program, planned.plan, backend=self.backend, progress=False))
        try:
            sample(subject, self.run, folder, row.name, seed, steps, self._as_png, self._progress)
        finally:
            setattr(subject.pipe, component, original)

    def _costs(self, row: Configuration, planned: Planned | None, program: Program, steps: int) -> Row:
        """MACs of one image, how much less that is than the run's subject takes in full, and what learning took."""
        images = max(1, self._recorded // 2)
        usual = self._program(self._subject(self.run.subject), self.run.steps)[0].macs * self.run.steps
        whole = program.macs * steps, (program.macs - program.attention_macs) * steps
        if planned is not None:
            spent: tuple[float, float] = macs_of(program, planned.plan)
        else:
            count = max(1, round(steps / row.speedup)) if row.kind == "steps" else steps
            spent = whole[0] * count / steps, whole[1] * count / steps
        found: Row = {"macs": spent[0] / images, "macs_without_attention": spent[1] / images, "ratio": usual / spent[0]}
        if planned is not None and planned.seconds is not None:
            found["training"] = float(planned.seconds)
        if row.extra_data:
            found["extra_data"] = row.extra_data
        return found

    def _other(self, row: Configuration, seed: int) -> Path:
        """Folder of the images that PSNR is taken against."""
        return self.folder / as_name(row.against or self.run.configurations[0].name) / f"seed{seed}"

    def _scores(self, folder: Path, reference: Path, seed: int) -> Row:
        """Quality beside other images and real ones, and speed beside the first configuration."""
        first = self.folder / as_name(self.run.configurations[0].name) / f"seed{seed}"
        features = FeatureSet(self.extractor) if self.run.reference else None
        near, spent, before, clips = [], [], [], []
        made = zip(batches(folder), batches(reference), batches(first), strict=True)
        for (images, rounded, seconds, told), (other, _, _, _), (_, _, usual, _) in made:
            if other.shape == images.shape:
                near.append(psnr(images, other).clamp(max=100))
            spent.append(seconds / len(images))
            before.append(usual / len(images))
            if features is not None:
                features.update(rounded)
            if self.run.captions:
                clips.append(clip_score(*self._clip(rounded, told)))
        # of the median batch: the first one of a plan may have to capture the denoiser anew, at its size
        row: Row = {"speed": statistics.median(before) / max(statistics.median(spent), 1e-9), "images": self.run.images}
        if near and folder != reference:
            row["psnr"] = float(torch.cat(near).mean())
        if features is not None:
            splits = max(1, min(10, features.count // IMAGES_PER_SPLIT))  # a split of few images has no score
            row |= compare_sets(features, self.reference, splits=splits)
        if clips:
            row["clip"] = float(torch.cat(clips).mean())
        return row

    def _clip(self, images: torch.Tensor, told: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        if not hasattr(self, "_encoder"):
            from fxmask.metrics.extractors import Clip

            self._encoder = Clip()
        return self._encoder(images, told)

    @property
    def extractor(self) -> Any:
        """Of features."""
        if self._extractor is None:
            if self.run.extractor == "inception":
                from fxmask.metrics.extractors import Inception

                self._extractor = Inception()
            else:
                self._extractor = from_code(self.run.extractor, {})
        return self._extractor

    @property
    def reference(self) -> Reference:
        """Of real images."""
        if self._reference is None:
            name = self.run.reference or ""
            if name.endswith(".npz"):
                self._reference = Reference.load(name, self.extractor)
            else:
                read: Iterable[torch.Tensor] = from_code(name, {})
                self._reference = Reference.of(self.extractor, read)
        return self._reference


def as_name(name: str) -> str:
    """A configuration's name for a folder."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-").lower()


def published(run: Run) -> list[Mapping[str, Any]]:
    """The paper's rows, told apart from ours."""
    return [{**row, "method": f"*{row['method']}* (paper)"} for row in run.published]
