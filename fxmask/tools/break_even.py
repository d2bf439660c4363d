"""``fxmask break-even PIPELINE``: make some images with a pipeline, the first in full, and say when its plan is paid back."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch

from fxmask.api import accelerate
from fxmask.errors import InputError
from fxmask.settings.pipeline import accelerated_of, is_a_pipeline
from fxmask.tools.bench_cases import from_code
from fxmask.tools.bench_shapes import diffusers_package
from fxmask.tools.place import DTYPES, require_device


def add_break_even(commands: Any) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser("break-even", help="make images with a pipeline, and say when its plan is paid back")
    parser.add_argument(
        "pipeline", metavar="PIPELINE", help="file.py:function or module:function, a folder, or a name on the hub"
    )
    parser.add_argument("--call", default="{}", help='arguments of each call, as JSON, e.g. \'{"prompt": "a cat"}\'')
    parser.add_argument("--images", type=int, default=5, help="how many calls are made, 2 at least")
    parser.add_argument("--speedup", type=float, default=2.0, help="ratio of MACs")
    parser.add_argument("--backend", default="auto", choices=("auto", "inductor", "eager"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES))
    parser.add_argument("--json", action="store_true", help="print numbers for programs")


def run_break_even(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status.

    Raises:
        InputError: there is no such pipeline, or the arguments are none.
    """
    if options.images < 2:
        raise InputError(f"--images {options.images}: the first is made in full and the second has a plan; make 2 at least")
    try:
        call = json.loads(options.call)
    except json.JSONDecodeError as error:
        raise InputError(f"--call {options.call!r} is no JSON: {error}") from error
    if not isinstance(call, dict):
        raise InputError(f'--call {options.call!r} must be arguments by name, e.g. \'{{"prompt": "a cat"}}\'')
    device = require_device(options.device)
    pipe = _pipeline(options.pipeline, device, DTYPES.get(options.dtype))
    accelerate(pipe, speedup=options.speedup, backend=options.backend, progress=not options.json)
    seconds = []
    for seed in range(options.images):
        began = time.perf_counter()
        pipe(**call, generator=torch.Generator().manual_seed(seed))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    report = accelerated_of(pipe).report()
    if options.json:
        assert report.account is not None
        sys.stdout.write(json.dumps({"seconds": seconds, "error": report.error, **report.account.to_dict()}) + "\n")
    else:
        sys.stdout.write("seconds of each call  " + " ".join(f"{x:.2f}" for x in seconds) + f"\n{report}\n")
    return 0


def _pipeline(name: str, device: torch.device, dtype: torch.dtype | None) -> Any:
    """What is named, on the device.

    Raises:
        InputError: it is none.
    """
    if ":" in name:
        pipe = from_code(name, {})
    else:
        try:
            pipe = diffusers_package().DiffusionPipeline.from_pretrained(name, torch_dtype=dtype)
        except Exception as error:  # of a hub, of a file, of a class
            reason = str(error).splitlines()[0][:150] if str(error) else type(error).__name__
            raise InputError(f"{name!r} is no diffusers pipeline: {reason}") from error
    if not is_a_pipeline(pipe):
        raise InputError(f"{name!r} returned {type(pipe).__name__}, and a pipeline is called and holds a scheduler")
    return pipe.to(device, dtype) if dtype is not None else pipe.to(device)
