"""Load damaged plans and packages: each is refused with an error of ours, or it is harmless.

    python tests/fuzz/damage.py --plans 10000 --packages 2000 [--first SEED]

In half of the copies the digests are made to fit again. Harmless means:

- digests as they were: the samples are those of the undamaged plan, bit for bit;
- digests that fit: it is another plan, and it computes what it says. The samples are those of the reference interpreter on the
  plan's own mask: bit for bit for a plan, but for rounding for a package, whose own graph the load has compared with the model.

A crash, ten seconds, 200 MB more than a whole plan takes, or a file that is written anywhere is a failure, and so is any error
that is not ours. In packages the graphs themselves stand for compiled code (``shelf``).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import shelf
import torch
from mutate import KINDS, repair

import fxmask
import fxmask.api
from fxmask.errors import FxmaskError

SECONDS = 10.0
KILOBYTES = 200_000
ROUNDING = 1e-4


class Workshop:
    """A whole plan and a whole package, and what they compute.

    Args:
        place: an empty folder.
    """

    def __init__(self, place: Path) -> None:
        shelf.use_shelf()
        self.place = place
        self.model = shelf.denoiser()
        made = shelf.accelerated(self.model)
        made.save(place / "whole" / "plan")
        made.export(place / "whole" / "package", progress=False)
        self.timesteps = made.mask.timesteps
        self.programs: dict[bytes, Any] = {}
        self._capture = fxmask.api.capture
        fxmask.api.capture = self.capture  # type: ignore[assignment]
        self.expected = {kind: self.samples(self.load(place / "whole" / kind), self.timesteps) for kind in ("plan", "package")}

    def capture(self, model: torch.nn.Module, example: Any, **options: Any) -> Any:
        """Capturing takes a second, and most damaged copies have the same example."""
        key = pickle.dumps((example, options))
        if key not in self.programs:
            self.programs[key] = self._capture(model, example, **options)
        return self.programs[key]

    def load(self, folder: Path) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fxmask.load(folder, self.model, progress=False, allow_compiled=True)

    def samples(self, loaded: Any, timesteps: Any) -> list[torch.Tensor]:
        return shelf.run(loaded, timesteps)

    def examine(self, kind: str, seed: int) -> tuple[str, str]:
        """One damaged copy: what was done to it, and what became of it."""
        choose = random.Random(f"{kind} {seed}")
        box = self.place / f"box {os.getpid()}"
        shutil.rmtree(box, ignore_errors=True)
        shutil.copytree(self.place / "whole" / kind, box / "folder")
        (box / "temporary").mkdir()
        os.chdir(box / "temporary")
        tempfile.tempdir = str(box / "temporary")
        damage, repaired = choose.choice(list(KINDS)), seed % 2 == 1
        KINDS[damage](box / "folder", choose)
        if repaired:
            repair(box / "folder", (self.place / "whole" / kind / "plan.json").read_text())
        before = _listing(box)
        result = self._result(kind, box / "folder", repaired)
        if _listing(box) != before:
            result = "FAILURE: something was written"
        return f"{damage}{', digests fit' if repaired else ''}", result

    def _result(self, kind: str, folder: Path, repaired: bool) -> str:
        try:
            loaded = self.load(folder)
        except FxmaskError:
            return "refused"
        except Exception as error:
            return f"FAILURE: load raised {type(error).__name__}: {str(error)[:200]}"
        try:
            got = self.samples(loaded, loaded.mask.timesteps)
        except FxmaskError:
            return "refused at the first run"
        except Exception as error:
            return f"FAILURE: the first run raised {type(error).__name__}: {str(error)[:200]}"
        if _same(got, self.expected[kind], 0):
            return "harmless: the same samples"
        if not repaired:
            return "FAILURE: other samples"
        return self._other_plan(kind, loaded, got)

    def _other_plan(self, kind: str, loaded: Any, got: list[torch.Tensor]) -> str:
        if len(set(map(int, loaded.mask.timesteps))) < loaded.mask.num_steps:
            return "harmless: another plan, of timesteps that come twice in a sampler of whole ones"
        calls = shelf.make_calls(timesteps=loaded.mask.timesteps)
        source = loaded.plan.source.starting_at(0)
        wanted = fxmask.reference.run(loaded.program, source, calls)
        tolerance = 0.0 if kind == "plan" else ROUNDING
        if _same(got, wanted, tolerance):
            return "harmless: another plan that computes what it says"
        return "FAILURE: a plan that does not compute what it says"


def _same(a: list[torch.Tensor], b: list[torch.Tensor], tolerance: float) -> bool:
    if len(a) != len(b):
        return False
    pairs = list(zip(a, b, strict=True))
    if tolerance == 0:
        return all(x.shape == y.shape and torch.equal(x.nan_to_num(12345.0), y.nan_to_num(12345.0)) for x, y in pairs)
    return all(torch.allclose(x, y, tolerance, tolerance, equal_nan=True) for x, y in pairs)


def _listing(box: Path) -> list[tuple[str, int, int]]:
    found = []
    for folder, _, names in os.walk(box):
        for name in names:
            status = os.lstat(os.path.join(folder, name))
            found.append((os.path.join(folder, name), status.st_size, status.st_mtime_ns))
    return sorted(found)


def _work(workshop: Workshop, kind: str, seeds: list[int], results: Connection) -> None:
    """In a process of its own: one damaged copy after the other."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    workshop.samples(workshop.load(workshop.place / "whole" / kind), workshop.timesteps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in seeds:
        damage, result = workshop.examine(kind, seed)
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if now - peak > KILOBYTES:
            result = f"FAILURE: {(now - peak) // 1000} MB more than a whole one"
        peak = max(peak, min(now, peak + KILOBYTES))
        results.send((seed, damage, result))
    results.send(None)


def examine_all(workshop: Workshop, kind: str, seeds: list[int]) -> list[tuple[int, str, str]]:
    """What became of each damaged copy. A worker that dies or hangs is a failure, and another one goes on behind it."""
    found: list[tuple[int, str, str]] = []
    context = multiprocessing.get_context("fork")
    left = list(seeds)
    while left:
        ours, theirs = context.Pipe()
        worker = context.Process(target=_work, args=(workshop, kind, left, theirs))
        worker.start()
        theirs.close()
        problem = _collect(ours, found, left)
        if problem:
            worker.kill()
            found.append((left.pop(0), "?", f"FAILURE: {problem}"))
        worker.join()
    return found


def _collect(ours: Connection, found: list[tuple[int, str, str]], left: list[int]) -> str:
    patience = 6 * SECONDS  # the first one waits for a whole load
    try:
        while ours.poll(patience):
            result = ours.recv()
            if result is None:
                return ""
            found.append(result)
            left.pop(0)
            patience = SECONDS
            if len(found) % 500 == 0:
                print(f"{len(found)} looked at", flush=True)
    except EOFError:
        return "crash"
    return f"no answer within {SECONDS:g} s"


def examine(plans: int, packages: int, first: int = 0) -> list[tuple[str, int, str, str]]:
    """Kind, seed, damage and result of each."""
    with tempfile.TemporaryDirectory(prefix="fxmask-damage-") as place:
        workshop = Workshop(Path(place))
        counts = {"plan": plans, "package": packages}
        return [
            (kind, *result)
            for kind, count in counts.items()
            for result in examine_all(workshop, kind, list(range(first, first + count)))
        ]


def main() -> int:
    """How many were refused, harmless, and wrong; failures with their seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", type=int, default=10_000)
    parser.add_argument("--packages", type=int, default=2_000)
    parser.add_argument("--first", type=int, default=0, help="seed; odd ones have digests that fit")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = examine(options.plans, options.packages, options.first)
    for (kind, result), count in sorted(Counter((kind, result) for kind, _, _, result in found).items()):
        print(f"{count:6} {kind:8} {result}")
    failures = [row for row in found if row[3].startswith("FAILURE")]
    for kind, seed, damage, result in failures[:50]:
        print(f"{kind} {seed} ({damage}): {result}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
