"""A steady step never waits for the device.

There is no device here: timesteps on the host are made to count as if they were not, and everything that would wait on a
real device is forbidden while a step runs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import TIMESTEPS, every_other, make_calls
from torch.overrides import TorchFunctionMode

import fxmask
from fxmask.runtime import clock

WAITS = {
    getattr(torch.Tensor, name)
    for name in (
        "item",
        "tolist",
        "__bool__",
        "__float__",
        "__int__",
        "__index__",
        "numpy",
        "cpu",
        "nonzero",
        "equal",
        "allclose",
    )
} | {torch.equal, torch.allclose, torch.nonzero}


class Forbid(TorchFunctionMode):
    """Raises where a device would have to be waited for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in WAITS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def accelerated(tiny, monkeypatch) -> fxmask.AcceleratedModel:
    def host_value(copy: torch.Tensor) -> float:  # a real copy on the host can be read without waiting
        with torch._C.DisableTorchFunction():
            return float(copy[0])

    monkeypatch.setattr(clock, "on_host", lambda tensor: False)
    monkeypatch.setattr(clock, "_host_value", host_value)
    return fxmask.compile(tiny, fxmask.rectify(tiny, every_other(tiny)), backend="eager")


def run(accelerated: fxmask.AcceleratedModel, calls: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """All calls, waiting for the device only in the first."""
    got = [accelerated(**calls[0])]
    with Forbid():
        return got + [accelerated(**call) for call in calls[1:]]


def with_views(dtype: torch.dtype = torch.int64) -> list[dict[str, torch.Tensor]]:
    timesteps = torch.tensor(TIMESTEPS).to(dtype)
    return [{**call, "t": t} for call, t in zip(make_calls(), timesteps, strict=True)]


def same(got: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_guard_works():
    with pytest.raises(AssertionError, match="waits"), Forbid():
        float(torch.tensor(1.0))


def test_views_of_the_schedulers_timesteps(tiny, accelerated):
    """Marked or not, again and again, expanded to the batch or not."""
    expected = fxmask.reference.run(tiny, every_other(tiny), make_calls())
    calls = with_views()
    assert same(run(accelerated, calls), expected)
    assert same(run(accelerated, calls), expected)
    expanded = run(accelerated, [{**call, "t": call["t"].expand(2)} for call in calls])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(expanded, expected, strict=True))
    with accelerated.generation():
        assert same(run(accelerated, calls), expected)


def test_inference_mode(tiny, accelerated):
    expected = fxmask.reference.run(tiny, every_other(tiny), make_calls())
    with torch.inference_mode():
        for _ in range(2):
            calls = with_views()
            assert same([accelerated(**call) for call in calls], expected)


def test_an_interrupted_run_is_seen_without_waiting(tiny, accelerated):
    calls = with_views()
    run(accelerated, calls[:3])
    with Forbid():  # the values of these timesteps are known
        got = [accelerated(**call) for call in calls]
    assert same(got, fxmask.reference.run(tiny, every_other(tiny), make_calls()))


def test_timesteps_changed_in_place_are_read_again(tiny, accelerated):
    calls = with_views()
    run(accelerated, calls)
    base = calls[0]["t"]._base
    assert base is not None
    base.copy_(base.flip(0).clone())
    with pytest.raises(AssertionError, match="waits"):
        run(accelerated, calls[:2])


def test_a_tensor_made_for_one_call_is_predicted_in_a_marked_generation(tiny, accelerated):
    expected = fxmask.reference.run(tiny, every_other(tiny), make_calls())
    calls = [{**call, "t": call["t"].clone()} for call in with_views()]
    for _ in range(2):
        with accelerated.generation():
            assert same(run(accelerated, calls), expected)
    assert same([accelerated(**call) for call in calls], expected), "unmarked, it is read, with a wait"


def test_a_wrong_prediction_is_an_error_at_the_next_call(accelerated):
    calls = [{**call, "t": call["t"].clone()} for call in with_views()]
    with accelerated.generation():
        for call in (calls[0], calls[1], {**calls[0], "t": calls[0]["t"].clone()}):
            accelerated(**call)
        with pytest.raises(RuntimeError, match=r"taken for timestep 500, but it was at 900"):
            accelerated(**calls[1])


def test_batches_at_different_timesteps(tiny, accelerated):
    x, t = torch.randn(2, 6, 4), torch.tensor([900, 700])
    assert torch.equal(accelerated(x, t), tiny.model(x, t))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_no_synchronisation_on_a_gpu(tiny):
    import copy

    model = copy.deepcopy(tiny.model).cuda()
    calls = [{"x": call["x"].cuda(), "t": t} for call, t in zip(make_calls(), torch.tensor(TIMESTEPS).cuda(), strict=True)]
    program = fxmask.capture(model, calls[0])
    accelerated = fxmask.compile(program, fxmask.rectify(program, every_other(program)), backend="eager")
    run(accelerated, calls)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = [accelerated(**call) for call in calls]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same(got, fxmask.reference.run(program, every_other(program), calls))
