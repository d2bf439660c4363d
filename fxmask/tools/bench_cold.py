"""The cost of compiling: the first run of all steps, in a process of its own with an empty compilation cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from tqdm.auto import tqdm

from fxmask.backends import inductor
from fxmask.errors import FxmaskError
from fxmask.timing import timed
from fxmask.tools.bench import PLAIN, Bench, Configuration, Measurement
from fxmask.tools.bench_cases import load_case
from fxmask.tools.place import DTYPES, current


def time_cold(case: str, variant: Configuration, num_steps: int, seed: int = 0, **place: Any) -> dict[str, Any]:
    """First run of all steps of a variant in a process of its own with an empty compilation cache.

    Args:
        case: names the model, see ``load_case``.
        variant: how it is run.
        num_steps: T.
        seed: of the mask.
        place: ``batch``, ``device``, ``dtype`` (by name) and ``distinct``, where they are not the usual ones.

    Returns:
        ``seconds`` from the captured model to the last output, ``peak_bytes`` of the process and ``compilations``.
    """
    job = json.dumps({"case": case, "variant": asdict(variant), "num_steps": num_steps, "seed": seed, **place})
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        done = subprocess.run(
            [sys.executable, "-c", "from fxmask.tools.bench_cold import _cold_job; _cold_job()"],
            input=job,
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
    if done.returncode:
        raise FxmaskError(f"timing the compilation of {variant.name!r} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _cold_job() -> None:
    """The other side of ``time_cold``: a job on standard input, the result as the last line of standard output."""
    job = json.loads(sys.stdin.read())
    device, batch = torch.device(job.get("device", "cpu")), job.get("batch")
    with current(device):
        model, call = load_case(job["case"], batch, device, DTYPES.get(job.get("dtype")))
        bench = Bench(model, call, job["num_steps"], job["seed"], batch=batch or 2, distinct=job.get("distinct"))
        seconds, _ = timed(bench.prepare(Configuration(**job["variant"])))
        result = {"seconds": seconds, "peak_bytes": peak_bytes(bench.device), "compilations": inductor.compilations}
    sys.stdout.write("\n" + json.dumps(result) + "\n")


def add_cold(
    case: str, chosen: Sequence[Configuration], rows: Sequence[Measurement], num_steps: int, seed: int = 0, **place: Any
) -> None:
    """Fill in what only processes of their own can tell; ``chosen`` begins with the model itself."""
    by_name = {row.name: row for row in rows}
    plain = by_name[PLAIN]
    wanted = sorted((v for v in chosen if by_name[v.name].problem is None), key=lambda v: v.name != PLAIN)
    for variant in tqdm(wanted, desc="compiling from nothing", unit="process"):
        result = time_cold(case, variant, num_steps, seed, **place)
        row = by_name[variant.name]
        row.cold_seconds, row.peak_bytes = result["seconds"], result["peak_bytes"]
        row.cold_ratio = row.cold_seconds / plain.cold_seconds if plain.cold_seconds else None


def peak_bytes(device: torch.device) -> int:
    """Largest memory so far: of the GPU if that is the device, else of the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
