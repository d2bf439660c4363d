"""The code that Inductor generates for step graphs on an H100: how many kernels, no change of layout, machine code, results."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TIMESTEPS
from without_a_gpu import assemble, convolutions, copies, gpu, kernels_of, launches, on_gpu, triton_code

import fxmask
from fxmask.backends.inductor import WholeGraphs, parts_of
from fxmask.passes.lift_weights import lift_weights
from fxmask.runtime.graph_store import GraphStore
from fxmask.tools.bench_masks import random_mask, timesteps_of

ROOT = Path(__file__).parents[2]


class Level(torch.nn.Module):
    """A level of a U-Net: convolutions, one of them in a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.branch = torch.nn.Sequential(
            torch.nn.GroupNorm(4, 16),
            torch.nn.SiLU(),
            torch.nn.Conv2d(16, 16, 3, padding=1),
            torch.nn.Conv2d(16, 16, 3, padding=1),
        )
        self.out = torch.nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x = self.inp(x) * (1 + t.reshape(-1, 1, 1, 1).to(x.dtype) / 1000)
        return self.out(x + self.branch(x))


@pytest.fixture(scope="module")
def level() -> fxmask.Program:
    call = {"x": torch.randn(2, 3, 8, 8), "t": torch.tensor([500, 500])}
    with gpu():
        return fxmask.capture(on_gpu(Level().eval()), call)


@pytest.fixture(scope="module")
def plain(level) -> str:
    return triton_code(lift_weights(level.graph_module)[0])


@pytest.fixture(scope="module")
def step_codes(level) -> list[str]:
    """Of a step that stores and one that loads."""
    rows = torch.tensor([[True], [False], [True], [False], [False]])
    plan = fxmask.rectify(level, fxmask.Mask(rows, TIMESTEPS, (level.branches[0].name,)))
    store = GraphStore(level, "inductor", compiler=WholeGraphs())
    with gpu():
        store.prepare(plan)
    return [triton_code(part.graph_module) for step in (0, 1) for part in parts_of(store.get(plan, step)[1])]


def count(code: str) -> int:
    return sum(map(len, launches(code)))


def test_step_graphs_change_no_layout(plain, step_codes):
    """Neither weights nor cached values are brought into another layout; plain compilation does so with weights."""
    assert len(copies(plain)) >= 4
    assert all(convolutions(plain))
    stores, loads = step_codes
    assert len(convolutions(stores)) == 4
    assert len(convolutions(loads)) == 2
    for code in step_codes:
        assert all(convolutions(code))
        assert len(copies(code)) <= 1, copies(code)  # the sample comes as the user gives it


def test_step_graphs_need_no_more_kernels_than_plain_compilation(plain, step_codes):
    stores, loads = step_codes
    assert count(stores) <= count(plain)
    assert count(loads) < count(stores)


# Inductor's code for eight graphs: minutes
@pytest.mark.slow
@pytest.mark.parametrize("name", ["dit", "ddpm"])
def test_kernels_of_the_shipped_models(name):
    """Whole step graphs need at most 1.05 of the kernels of plain compilation of what lives in the step, and of that with the
    timestep's table given to both; no weight is brought into another layout at a call."""
    program = shipped(name)
    study = gpu_kernels()
    counter = study.Counter()
    for title, plan in plans_of(program).items():
        store = GraphStore(program, "inductor", "whole")
        with gpu():
            store.prepare(plan)
        tables = store.prologue_runner(plan).prologues.sources
        for step in [0] if title == "all blocks" else study.steps_of(plan):
            found, parts = counter.parts(store.get(plan, step)[1])
            live = counter.plain(study.live_alone(program, plan, step))
            with_table = counter.plain(study.live_alone(program, plan, step, tables))
            assert parts == 1
            assert found.all <= 1.05 * live.all, (title, step)
            assert found.all <= 1.05 * with_table.all, (title, step)
            assert found.copies <= 2, (title, step)  # of values that the step computes
            assert found.channels_last >= found.convolutions - 1


def gpu_kernels():
    """The study that writes ``examples/results/gpu_kernels.md``."""
    sys.path.insert(0, str(ROOT / "examples" / "studies"))
    try:
        import gpu_kernels as study
    finally:
        sys.path.pop(0)
    return study


def shipped(name: str) -> fxmask.Program:
    """A shipped model on a GPU, in the type that it would run in."""
    pipelines = pytest.importorskip("pipelines")
    model = pipelines.digits().load_model(name).to(torch.bfloat16)
    with gpu():
        return fxmask.capture(on_gpu(model))


def plans_of(program: fxmask.Program) -> dict[str, fxmask.Plan]:
    timesteps = timesteps_of(10)
    masks = {
        "all blocks": fxmask.policies.interval(1)(program, timesteps),
        "interval(2)": fxmask.policies.interval(2)(program, timesteps),
        "random, half": random_mask(program, 10, 2.0),
    }
    return {title: fxmask.rectify(program, mask) for title, mask in masks.items()}


def test_kernels_become_machine_code(step_codes):
    """Triton's compiler and ptxas take every kernel for an H100."""
    found = kernels_of(step_codes[1])
    assert found
    for name, source in found.items():
        for kernel in assemble(name, source):
            assert ".target sm_90a" in kernel.asm["ptx"]
            assert kernel.asm["cubin"][:4] == b"\x7fELF"


def test_kernels_compute_what_the_step_graph_computes():
    """In Triton's interpreter, which must be chosen before triton is imported: in a process of its own."""
    script = Path(__file__).with_name("interpret.py")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["all blocks", "skipped", "forecast"]
    assert all(float(line.split(":")[1]) < 1e-5 for line in lines), lines
