"""Kill savers, fill their disk, take their rights away, let several write at once: a whole plan is at the path at every look.

    python tests/fuzz/kills.py --rounds 1000 [--first SEED]

A failure is a look that finds no whole plan where there was one, a file that is still there after the next save, an error that
is not ours, or a measurement of a checkpoint that was written and is lost.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import shelf
import torch

import fxmask
from fxmask.backends.package import Package
from fxmask.errors import FxmaskError
from fxmask.learning.journal import Journal
from fxmask.storage.packages import write_package
from fxmask.storage.plan_file import content_of, file_of, read_plan_file
from fxmask.storage.plans import load_plan, save_mask

STEPS = (900.0, 600.0, 300.0)
NOBODY = 65534
fork = multiprocessing.get_context("fork")


class Writers:
    """What is written: numbered plans, packages and measurements.

    Args:
        place: an empty folder.
    """

    def __init__(self, place: Path) -> None:
        shelf.use_shelf()
        self.place = place
        made = shelf.accelerated(shelf.denoiser())
        self.program, self.source = made.program, made.plan.source
        self.facts = {"model": "Denoiser", "roles": {}, "start": 0, "backend": "package", "mode": None}
        (place / "part").write_bytes(bytes(200_000))

    def plan(self, folder: Path, number: int) -> None:
        mask = fxmask.Mask(torch.ones(3, 1).bool(), STEPS, [f"block {number}"])
        save_mask(folder, mask, {"number": number}, {"x": torch.full((number * 1000 + 1,), float(number))})

    def package(self, folder: Path, number: int) -> None:
        parts = {f"{k:016x}": Package(self.place / "part", ((1,),)) for k in range(number + 1)}
        write_package(folder, self.program, self.source, {**self.facts, "number": number}, parts)

    def number_in(self, folder: Path) -> int:
        """Which plan is there, all of it.

        Raises:
            AssertionError: parts of it are another's.
            MaskError: there is no whole one.
        """
        mask, facts, example = load_plan(folder)
        number = int(facts["number"])
        if "model" not in facts:
            assert mask.blocks == (f"block {number}",)
            assert example["x"].tolist() == [float(number)] * (number * 1000 + 1)
        return number

    def check_package(self, folder: Path) -> None:
        """Every file that the plan names is there; call it while nobody writes."""
        state = read_plan_file(folder)
        for name in state.files:
            file_of(folder, state, name, 2**30)
        content_of(folder, state, "plan.safetensors")


def _child(work: Callable[[], None]) -> Any:
    """A process that does this and says with its exit code whether something was wrong."""

    def run() -> None:
        torch.set_num_threads(1)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            work()

    process = fork.Process(target=run)
    process.start()
    return process


def _forever(write: Callable[[Path, int], None], folder: Path) -> None:
    number = 0
    while True:
        number = (number + 1) % 4
        write(folder, number)


def _leftovers(folder: Path, named: set[str]) -> list[str]:
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return sorted(there - named - {"plan.json", "notes.txt"})


def _whole(writers: Writers, folder: Path) -> str:
    """What is wrong with a folder that nobody writes to."""
    writers.number_in(folder)
    writers.check_package(folder)
    left = _leftovers(folder, {entry.path for entry in read_plan_file(folder).files.values()})
    return f"left behind: {left}" if left else ""


def kill_savers(writers: Writers, folder: Path, choose: random.Random, write: Callable[[Path, int], None]) -> str:
    """One to three savers, killed at a random moment, looked at all the while; the next save removes what they left."""
    write(folder, 0)
    (folder / "notes.txt").write_text("mine")
    savers = [_child(lambda: _forever(write, folder)) for _ in range(choose.choice([1, 1, 2, 3]))]
    ends = time.perf_counter() + choose.uniform(0, 0.15)
    while time.perf_counter() < ends:
        writers.number_in(folder)
    alive = all(saver.is_alive() for saver in savers)
    for saver in savers:
        os.kill(saver.pid, signal.SIGKILL)
    for saver in savers:
        saver.join()
    writers.number_in(folder)
    writers.check_package(folder)
    if not alive:
        return "a saver failed"
    write(folder, choose.randrange(4))
    return _whole(writers, folder) or ("" if (folder / "notes.txt").exists() else "notes are gone")


def kill_first_save(writers: Writers, folder: Path, choose: random.Random) -> str:
    """The same where there was nothing before."""
    saver = _child(lambda: writers.package(folder, 3))
    time.sleep(choose.uniform(0, 0.06))
    os.kill(saver.pid, signal.SIGKILL)
    saver.join()
    with contextlib.suppress(fxmask.MaskError):
        writers.check_package(folder)
    writers.package(folder, 1)
    return _whole(writers, folder)


def kill_learners(writers: Writers, folder: Path, choose: random.Random) -> str:
    """Two learners of one checkpoint, killed: what was there stays, and the next one leaves nothing behind."""
    folder.mkdir()
    path = folder / "learning.json"
    for k in range(3):
        _measure(path, k)

    def learn(start: int) -> None:
        journal, worker = Journal(path, "me"), SimpleNamespace(units=0.0)
        for k in range(start, start + 10_000):
            journal.get(f"key {k}", lambda k=k: [k] * 20, worker)

    learners = [_child(lambda k=k: learn(1000 * k)) for k in range(2)]
    time.sleep(choose.uniform(0, 0.1))
    count = len(_entries(path))
    for learner in learners:
        os.kill(learner.pid, signal.SIGKILL)
        learner.join()
    if len(_entries(path)) < max(count, 3):
        return "measurements are lost"
    _measure(path, 99_999)
    left = [x.name for x in folder.iterdir() if x != path]
    return f"left behind: {left}" if left else ""


def _measure(path: Path, k: int) -> None:
    Journal(path, "me").get(f"key {k}", lambda: [k] * 20, SimpleNamespace(units=0.0))


def _entries(path: Path) -> dict[str, Any]:
    return Journal(path, "me")._entries


def full_disk(writers: Writers, folder: Path, choose: random.Random) -> str:
    """No file may grow beyond a random size: an error of ours, the old plan, nothing left; learning goes on."""
    writers.package(folder, 1)
    path = folder.with_name(folder.name + " learning.json")
    _measure(path, 1)
    limit = int(2 ** choose.uniform(3, 17))

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with contextlib.suppress(FxmaskError):
            (writers.package if limit % 2 else writers.plan)(folder, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for k in range(100, 140):
                _measure(path, k)

    saver = _child(work)
    saver.join()
    if saver.exitcode != 0:
        return f"an error that is not ours (limit {limit})"
    if not _entries(path):
        return "measurements are lost"
    return _whole(writers, folder)


def read_only(writers: Writers, folder: Path, choose: random.Random) -> str:
    """A folder that may not be written: an error of ours, and it loads."""
    writers.plan(folder, 1)
    for path in (folder, *folder.iterdir()):
        path.chmod(path.stat().st_mode & ~0o222 | 0o444)

    def work() -> None:
        if os.geteuid() == 0:
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        for target in (folder, folder / "below", folder.parent / "beside"):
            with contextlib.suppress(FxmaskError):
                writers.plan(target, 2)
                raise AssertionError("it was written")
        assert writers.number_in(folder) == 1

    saver = _child(work)
    saver.join()
    folder.chmod(0o755)
    return "an error that is not ours, or it was written" if saver.exitcode else _whole(writers, folder)


def two_writers(writers: Writers, folder: Path, choose: random.Random) -> str:
    """Two savers and two exporters to one folder: none fails."""
    writes = [choose.choice([writers.plan, writers.package]) for _ in range(3)]

    def work(write: Callable[[Path, int], None]) -> None:
        for number in range(12):
            write(folder, number % 4)
            writers.number_in(folder)

    savers = [_child(lambda write=write: work(write)) for write in writes]
    for saver in savers:
        saver.join()
    failed = [saver.exitcode for saver in savers if saver.exitcode]
    return f"{len(failed)} savers failed" if failed else _whole(writers, folder)


Scenario = Callable[[Writers, Path, random.Random], str]
SCENARIOS: dict[str, Scenario] = {
    "kill save": lambda w, f, c: kill_savers(w, f, c, w.plan),
    "kill export": lambda w, f, c: kill_savers(w, f, c, w.package),
    "kill first export": kill_first_save,
    "kill learning": kill_learners,
    "full disk": full_disk,
    "read-only folder": read_only,
    "two writers": two_writers,
}


@contextlib.contextmanager
def workplace() -> Iterator[Writers]:
    """A folder that goes at the end; others may look into it."""
    with tempfile.TemporaryDirectory(prefix="fxmask-kills-") as place:
        os.chmod(place, 0o755)
        yield Writers(Path(place))


def examine(rounds: int, first: int = 0) -> list[tuple[str, int, str]]:
    """Scenario, seed and what was wrong."""
    found = []
    with workplace() as writers:
        for seed in range(first, first + rounds):
            name = list(SCENARIOS)[seed % len(SCENARIOS)]
            try:
                problem = SCENARIOS[name](writers, writers.place / str(seed), random.Random(seed))
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            found.append((name, seed, problem))
    return found


def main() -> int:
    """How many rounds of each, and what was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1_000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    found = examine(options.rounds, options.first)
    for name, count in Counter(name for name, _, _ in found).items():
        print(f"{count:6} {name:18} {sum(bool(problem) for other, _, problem in found if other == name)} wrong")
    failures = [row for row in found if row[2]]
    for name, seed, problem in failures[:50]:
        print(f"{name} {seed}: {problem}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
