"""``fxmask run NAME FOLDER``: make images with a pipeline and a saved plan."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from fxmask.api import load
from fxmask.errors import InputError
from fxmask.metrics import psnr
from fxmask.pictures import save_samples
from fxmask.sampling.twin import make_twin
from fxmask.settings.pipeline import accelerated_of
from fxmask.tools.command_line import AS_JSON, BACKEND, CALLS, NAMED, PLACE, Command, Picture, as_json, options, printed
from fxmask.tools.measure import MOST_DECIBELS, made
from fxmask.tools.subjects import load_subject, seeded


@click.command("run", cls=Command, epilog=NAMED)
@click.argument("name", metavar="NAME")
@click.argument("folder")
@options(
    CALLS,
    click.option(
        "--images", type=click.IntRange(1), default=1, show_default=True, help="of each call, with seeds that count on"
    ),
    click.option(
        "--output", type=click.Path(path_type=Path), default=Path("images"), show_default=True, help="folder for the PNGs"
    ),
    click.option("--compare", type=Picture(), help="also make them in full, and draw both side by side: a PNG or SVG"),
    BACKEND,
    PLACE,
    AS_JSON,
)
def run_command(
    name: str,
    folder: str,
    calls: Any,
    prompts: Any,
    steps: int | None,
    seed: int,
    images: int,
    output: Path,
    compare: Path | None,
    backend: str,
    device: str,
    dtype: str | None,
    json_wanted: bool,
) -> None:
    """Make images with the pipeline NAME and the plans in FOLDER, and write them as PNG.

    A call at a setting without a plan is made in full, and says so.
    """
    subject = load_subject(name, device, dtype).with_calls(calls, prompts, steps)
    if subject.pipe is None:
        raise InputError(f"{name!r} is a denoiser, and only pipelines make images; fxmask.load(folder, model) accelerates it")
    pipe = load(folder, subject.pipe, backend=backend, progress=not json_wanted)
    wanted = [{**call, "generator": seeded(seed + k)} for call in subject.calls for k in range(images)]
    samples, seconds = _make(pipe, wanted)
    files = write_images(torch.cat(samples), output)
    rows: dict[str, Any] = {"files": [str(file) for file in files], "seconds": seconds}
    runs = accelerated_of(pipe).report().runs if accelerated_of(pipe).has_plan else ()
    rows["runs"] = [{"calls": run.calls, "followed": run.followed, "mac_ratio": run.ratio} for run in runs]
    if compare is not None:
        rows |= _compare(pipe, wanted, torch.cat(samples), compare)
    if json_wanted:
        as_json(rows)
        return
    for file, taken in zip(files, seconds, strict=False):
        printed(f"{file}  {taken:.2f} s")
    for run in runs:
        printed(str(run))
    if compare is not None:
        printed(f"in full: {' '.join(f'{x:.2f}' for x in rows['full_seconds'])} s")
        printed(f"PSNR: {' '.join(f'{x:.1f}' for x in rows['psnr'])} dB\npicture: {compare}")


def _make(pipe: Any, calls: Sequence[Mapping[str, Any]]) -> tuple[list[torch.Tensor], list[float]]:
    samples, seconds = [], []
    for call in calls:
        began = time.perf_counter()
        samples.append(made(pipe, call))
        seconds.append(time.perf_counter() - began)
    return samples, seconds


def _compare(pipe: Any, calls: Sequence[Mapping[str, Any]], samples: torch.Tensor, path: Path) -> dict[str, Any]:
    full, seconds = _make(make_twin(pipe, None), calls)
    decibels = psnr(samples, torch.cat(full), 1.0).clamp_max(MOST_DECIBELS).tolist()
    rows = {"in full": as_images(torch.cat(full)), "fxmask": as_images(samples)}
    save_samples(rows, path, notes={"fxmask": [f"{x:.1f} dB" for x in decibels]})
    return {"full_seconds": seconds, "psnr": decibels, "picture": str(path)}


def as_images(samples: torch.Tensor) -> torch.Tensor:
    """What a pipeline made as images ``[N, C, H, W]`` in [0, 1]; of videos ``[N, F, H, W, C]`` the first frame.

    Raises:
        InputError: it makes something else, e.g. sound.
    """
    if samples.dim() == 5:
        samples = samples[:, 0]
    if samples.dim() != 4 or samples.shape[-1] not in (1, 3):
        raise InputError(f"what this pipeline made has the shape {tuple(samples.shape)}, and only images can be written as PNG")
    return samples.permute(0, 3, 1, 2)


def write_images(samples: torch.Tensor, folder: Path) -> list[Path]:
    """PNGs, numbered on from those that are there.

    Raises:
        InputError: they are no images, Pillow is not installed, or the folder cannot be written.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError(f"writing images needs Pillow: pip install pillow ({error})") from error
    images = (as_images(samples) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        first = sum(1 for _ in folder.glob("*.png"))
        files = [folder / f"{first + k:04d}.png" for k in range(len(images))]
        for file, image in zip(files, images, strict=True):
            Image.fromarray((image[..., 0] if image.shape[-1] == 1 else image).numpy()).save(file)
    except OSError as error:
        raise InputError(f"images cannot be written to {folder} ({error}); give another folder with --output") from error
    return files
