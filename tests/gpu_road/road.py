"""Stages of a model's road on fake CUDA tensors, and what a program knows of its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from conftest import TIMESTEPS
from recorder import Again
from without_a_gpu import CUDA, gpu

import fxmask
from fxmask.ir.program import Program
from fxmask.runtime.executor import Executor
from fxmask.runtime.graph_store import GraphStore
from fxmask.runtime.replay import ReplayingExecutor


def tensors_of(program: Program) -> Iterator[torch.Tensor]:
    """Every value that a program knows of."""
    for node in program.graph_module.graph.nodes:
        value = node.meta.get("val")
        yield from (x for x in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(x, torch.Tensor))


def forecasting(program: Program) -> fxmask.Mask:
    """Steps that compute everything, that load, and that form values from two stored ones."""
    names = tuple(block.name for block in program.branches)
    rows = torch.ones(len(TIMESTEPS), len(names), dtype=torch.bool)
    rows[2:, ::2] = False
    rows[4, :] = False
    forecast = {(3, names[0]): ((0, -0.5), (1, 1.5)), (4, names[1]): ((2, 0.25), (3, 0.75))}
    return fxmask.Mask(rows, TIMESTEPS, names, forecast=forecast, fingerprint=program.fingerprint)


def run_plan(program: Program, mask: fxmask.Mask, replayed: bool = False) -> list[torch.Tensor]:
    """All steps of a plan on fake CUDA tensors, with tables and conditioning computed before the first; called or replayed.

    The program must be of ``layout="math"``: outside of a capture, PyTorch takes attention apart before fake tensors see it.
    """
    inputs = list(program.example.tensors.values())
    plan, graphs = fxmask.rectify(program, mask), GraphStore(program, "eager")
    graphs._exact = False  # with tables, as compiled graphs have
    executor = ReplayingExecutor(plan, graphs, Again()) if replayed else Executor(plan, graphs)
    with gpu(), inputs[0].fake_mode, torch.no_grad():  # type: ignore[attr-defined]
        rows = executor.begin(inputs)
        cache: dict[Any, torch.Tensor] = {}
        outputs = []
        for step in range(mask.num_steps):
            outputs += executor.run_step(step, inputs, cache, rows)
            # one number of the CPU may stand beside a GPU's tensor, and would be copied there at every call
            assert {x.device for x in executor._ready[step].coefficients} <= {CUDA}, "coefficients on another device"
    return outputs
