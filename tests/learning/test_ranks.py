"""Learning on two ranks: the plan of one process; a rank that dies is an error, not a hang."""

from __future__ import annotations

import itertools
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fuzz.ranks import is_right, try_once

import fxmask
from fxmask import api
from fxmask.learning.ranks import Group, time_limit

SCRIPT = """
import datetime, json, os, sys
import torch
import torch.distributed as dist
sys.path.insert(0, {tests!r})
from conftest import ddim, labels, tiny_dit
import fxmask
from fxmask.learning.adjoint import refine_all
from fxmask.learning.effort import EFFORTS, Effort, Limits
from fxmask.learning.finalists import free_coefficients
from fxmask.learning.levels import evenly, levels_of
from fxmask.learning.probes import measure_probes
from fxmask.learning.ranks import Group
from fxmask.learning.search import Search
from fxmask.learning.student import Student
torch.set_num_threads(1)
EFFORTS["default"] = Effort(units=30, kinds=2, starts=3, levels=2, search=2.0, rounds=1, finalists=2)
if {ranks} > 1:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
model = tiny_dit()
options = dict(num_inference_steps=6, batch_size=2, example_inputs=labels)
runs = [fxmask.record(model, ddim(), **options, seed=seed) for seed in range(4)]
program = fxmask.capture(model, runs[0].calls[0][0])
if {dies} and dist.get_rank() == 1:
    original, count = Student.rollout, [0]
    def rollout(self, *args, **kwargs):
        count[0] += 1
        if count[0] == 3:
            os._exit(7)
        return original(self, *args, **kwargs)
    Student.rollout = rollout
try:
    mask = fxmask.learn(program, runs, speedup=1.7)
except fxmask.DistributedError as error:
    print("DistributedError:", error, flush=True)
    os._exit(3)
group = Group.current()
probes = measure_probes(Student(program, group.share(runs), group), [block.name for block in program.branches])
noisy = [fxmask.record(model, ddim(), **options, step_kwargs={{"eta": 1.0}}, seed=seed) for seed in range(4)]
search = Search(program, noisy, effort=EFFORTS["default"], limits=Limits(), seed=0, progress=False)
level = next(level for level in levels_of(search.student, 2) if level.name == "branches")
plain = search.measured.evaluate(evenly(search.student, level, 0.6))
freed = free_coefficients(search.student, plain, Limits())
assert freed.schedule.blend
refined = sorted(refine_all(search.student, freed.schedule, freed.coefficients)[0].items())
if group.rank == 0:
    terms = sorted((mask.forecast.terms if mask.forecast else {{}}).items())
    print("LEARNED", json.dumps([mask.compute.tolist(), terms, [x.tolist() for x in probes], refined]), flush=True)
"""


def run_ranks(ranks: int, dies: bool = False) -> list[tuple[int, str]]:
    """Exit status and output of each rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]), ranks=ranks, dies=dies)
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    environment.update(PYTHONWARNINGS="ignore", OMP_NUM_THREADS="1")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script], env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def test_two_ranks_learn_what_one_learns():
    ((status, alone),) = run_ranks(1)
    assert status == 0
    both = run_ranks(2)
    assert [code for code, _ in both] == [0, 0]
    assert json.loads(both[0][1].split("LEARNED ")[1]) == json.loads(alone.split("LEARNED ")[1])


def test_a_rank_that_dies_is_an_error():
    (status, output), (dead, _) = run_ranks(2, dies=True)
    assert dead == 7
    assert status == 3
    assert "another rank died" in output


@pytest.mark.parametrize("seed", [0, 2])
def test_a_rank_that_is_killed_or_stopped_ends_the_other_in_bounded_time(seed):
    """``python tests/fuzz/ranks.py`` tries more moments; these two are a kill and a stop."""
    what, said, _ = try_once(random.Random(seed), limit=5.0)
    assert is_right(said), (what, said)


@pytest.mark.parametrize("text", ["soon", "-3", "0", "inf", "nan"])
def test_the_time_limit_must_be_a_number_of_seconds(text, monkeypatch):
    monkeypatch.setenv("FXMASK_RANK_TIMEOUT", text)
    with pytest.raises(fxmask.InputError, match="FXMASK_RANK_TIMEOUT.*number of seconds"):
        time_limit()


def test_groups_share_evenly_and_in_order():
    for count, size in itertools.product(range(20), range(1, 10)):
        items = list(range(count))
        parts = [Group(rank, size).share(items) for rank in range(size)]
        lengths = [len(part) for part in parts]
        assert [x for part in parts for x in part] == items
        assert max(lengths) - min(lengths) <= 1
        assert min(lengths) > 0 or count < size


@pytest.mark.parametrize("size", range(2, 20))
def test_accelerate_records_enough_for_every_rank(size, monkeypatch):
    """Every rank has something to learn from after the last quarter was held out."""
    recorded = []

    def learn(program, runs, *args, **kwargs):
        recorded.extend(runs)
        raise InterruptedError

    monkeypatch.setattr(Group, "current", classmethod(lambda cls: cls(0, size)))
    monkeypatch.setattr(api, "record", lambda *args, **kwargs: SimpleNamespace(calls=[[None]]))
    monkeypatch.setattr(api, "capture", lambda *args, **kwargs: None)
    monkeypatch.setattr(api, "learn", learn)
    with pytest.raises(InterruptedError):
        api.accelerate(torch.nn.Identity().eval(), None, effort="default", progress=False)
    assert len(recorded) - len(recorded) // 4 >= size
