"""Inductor rounds differently from eager mode, and no worse: both are measured against the same denoiser in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from denoisers import Denoiser
from strategies import Calls, Choice, Pair, holds, leaves, make_pair

import fxmask
from fxmask.backends import inductor

pytestmark = pytest.mark.skipif(inductor.cpu_compiler_problem() is not None, reason="no C++ compiler")

# Denoiser and mask: small ones in float32 with two step graphs or three, each of which takes seconds to compile.
SEEDS = [(1, 1), (3, 203), (5, 5), (11, 211), (13, 13), (18, 18), (21, 221), (22, 22), (26, 26), (30, 30)]
CASES = [Choice(seed, mask, statements=3, steps=3, blocks=3, cuts="found", forecasts=seed % 2 == 1) for seed, mask in SEEDS]

# Where eager happens to be exact, Inductor may still round: so many float32 roundings of the largest value are let pass.
SLACK = 4 * torch.finfo(torch.float32).eps


def as_double(call: dict[str, Any]) -> dict[str, Any]:
    def widen(x: Any) -> Any:
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return {name: {k: widen(x) for k, x in v.items()} if isinstance(v, dict) else widen(v) for name, v in call.items()}


def oracle(pair: Pair) -> list[list[torch.Tensor]]:
    """Outputs per step of the reference, with everything in double precision."""
    model = copy.deepcopy(pair.denoiser.model).double()
    calls: Calls = [[as_double(call) for call in step] for step in pair.calls()]
    wide = Denoiser("", model, lambda steps, lanes=1: calls[:steps], pair.denoiser.roles, lanes=False)
    assert {block.name for block in pair.program.blocks} <= {block.name for block in wide.program.blocks}
    mask = fxmask.Mask(pair.mask.compute, pair.mask.timesteps, pair.mask.blocks, pair.mask.forecast)
    return [leaves(result) for result in fxmask.reference.run(wide.program, mask, calls)]


def run(pair: Pair, backend: str, mode: str | None = None) -> list[list[torch.Tensor]]:
    accelerated = fxmask.compile(pair.program, fxmask.rectify(pair.program, pair.mask), backend=backend, mode=mode)
    with accelerated.generation():
        return [leaves(accelerated(**call)) for (call,) in pair.calls()]


def check_close_to_float64(pair: Pair) -> None:
    exact, eager = oracle(pair), run(pair, "eager")
    for mode in ("whole", "regions"):
        before = inductor.compilations
        compiled = run(pair, "inductor", mode)
        made = inductor.compilations - before
        assert made == fxmask.rectify(pair.program, pair.mask).distinct_graphs if mode == "whole" else made > 0
        for want, a, b in zip(exact, eager, compiled, strict=True):
            for x, y, z in zip(want, a, b, strict=True):
                assert z.dtype is y.dtype
                allowed = 2 * (y.double() - x.double()).abs().max() + SLACK * x.double().abs().max()
                assert (z.double() - x.double()).abs().max() <= allowed


@pytest.mark.parametrize("choice", CASES, ids=lambda choice: f"denoiser {choice.denoiser}")
def test_inductor_is_as_close_to_float64_as_eager(choice: Choice) -> None:
    assert not make_pair(choice).mask.compute.all()
    holds(check_close_to_float64, choice)
