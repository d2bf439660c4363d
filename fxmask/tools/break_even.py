"""``fxmask break-even PIPELINE``: make some images with a pipeline, the first in full, and say when its plan is paid back."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import click
import torch

from fxmask.api import accelerate
from fxmask.errors import InputError
from fxmask.settings.pipeline import accelerated_of
from fxmask.tools.command_line import AS_JSON, BACKEND, NAMED, PLACE, Call, Command, as_json, options, printed
from fxmask.tools.subjects import load_subject, seeded


@click.command("break-even", cls=Command, epilog=NAMED)
@click.argument("pipeline", metavar="PIPELINE")
@options(
    click.option("--call", type=Call(), default="{}", help='arguments of each call, as JSON, e.g. \'{"prompt": "a cat"}\''),
    click.option("--images", type=int, default=5, show_default=True, help="how many calls are made, 2 at least"),
    click.option("--speedup", type=float, default=2.0, show_default=True, help="ratio of MACs"),
    BACKEND,
    PLACE,
    AS_JSON,
)
def break_even_command(
    pipeline: str,
    call: Mapping[str, Any],
    images: int,
    speedup: float,
    backend: str,
    device: str,
    dtype: str | None,
    json_wanted: bool,
) -> None:
    """Make images with a pipeline, the first in full, and say when its plan is paid back."""
    if images < 2:
        raise InputError(f"--images {images}: the first is made in full and the second has a plan; make 2 at least")
    subject = load_subject(pipeline, device, dtype)
    if subject.pipe is None:
        raise InputError(f"{pipeline!r} is a denoiser, and only pipelines are called again and again")
    pipe = accelerate(subject.pipe, speedup=speedup, backend=backend, progress=not json_wanted)
    seconds = []
    for seed in range(images):
        began = time.perf_counter()
        pipe(**{**subject.calls[0], **call}, generator=seeded(seed))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - began)
    report = accelerated_of(pipe).report()
    if json_wanted:
        assert report.account is not None
        as_json({"seconds": seconds, "error": report.error, **report.account.to_dict()})
        return
    printed("seconds of each call  " + " ".join(f"{x:.2f}" for x in seconds) + f"\n{report}")
