"""How often a run waits for the device. There is none: everything on the host counts as if it were not."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from conftest import TIMESTEPS, every_other, tiny_dit
from test_clock import WAITS
from torch.overrides import TorchFunctionMode

import fxmask
from fxmask.runtime import clock


class Count(TorchFunctionMode):
    """Counts what would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITS:
            self.waits.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def program() -> fxmask.Program:
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    return fxmask.capture(tiny_dit(), {"hidden_states": x, "timestep": torch.tensor([900, 900]), "class_labels": labels})


@pytest.fixture
def accelerated(program, monkeypatch) -> fxmask.AcceleratedModel:
    def host_value(copy: torch.Tensor) -> float:
        with torch._C.DisableTorchFunction():
            return float(copy[0])

    monkeypatch.setattr(clock, "on_host", lambda tensor: False)
    monkeypatch.setattr(clock, "_host_value", host_value)
    return fxmask.compile(program, fxmask.rectify(program, every_other(program)), backend="eager")


def same_tensors(i, t, labels):
    return {"timestep": t[i].expand(2), "class_labels": labels}


def new_timesteps(i, t, labels):
    return {"timestep": t[i].clone().expand(2), "class_labels": labels}


def new_conditioning(i, t, labels):
    return {"timestep": t[i].expand(2), "class_labels": labels.clone()}


def everything_new(i, t, labels):
    return {"timestep": t[i].clone().expand(2), "class_labels": labels.clone()}


def run(accelerated, program, arguments, lanes=(1,), marked=True, mode=torch.no_grad):
    """Waits of each step of the third run, and whether all results were right."""
    mask = every_other(program)
    with mode():
        t, x = torch.tensor(TIMESTEPS).long(), [torch.randn(2, 1, 8, 8) for _ in TIMESTEPS]
        labels = [torch.tensor([k, k]) for k in lanes]
    calls = [[{"hidden_states": x[i], **arguments(i, t, y)} for y in labels] for i in range(len(TIMESTEPS))]
    wanted = fxmask.reference.run(program, mask, calls)
    for _ in range(3):
        waits, right = [], True
        with mode(), accelerated.generation() if marked else contextlib.nullcontext():
            for i, want in enumerate(wanted):
                with Count() as count:
                    got = [accelerated(**{"hidden_states": x[i], **arguments(i, t, y)}).sample for y in labels]
                waits.append(len(count.waits))
                wants = want if len(labels) > 1 else [want]
                right = right and all(torch.allclose(a, b.sample, atol=1e-5) for a, b in zip(got, wants, strict=True))
    return waits, right


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("lanes", [(1,), (1, 2)])
@pytest.mark.parametrize("arguments", [same_tensors, new_timesteps, new_conditioning, everything_new])
def test_a_marked_generation_waits_in_its_first_step_only(program, accelerated, arguments, lanes, mode):
    waits, right = run(accelerated, program, arguments, lanes, mode=mode)
    assert right
    known = 1 if arguments in (same_tensors, new_conditioning) else 2  # steps until it is clear how many lanes there are
    assert sum(waits[known:]) == 0
    assert sum(waits) <= 1 + 2 * len(lanes) * (known - 1) + len(lanes)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("lanes", [(1,), (1, 2)])
def test_an_unmarked_run_waits_once(program, accelerated, lanes, mode):
    waits, right = run(accelerated, program, same_tensors, lanes, marked=False, mode=mode)
    assert right
    assert sum(waits) <= 1
    assert not any(waits[1:])


def test_conditioning_that_was_taken_for_a_lanes_and_is_not(program, accelerated):
    t, x = torch.tensor(TIMESTEPS).long(), torch.randn(2, 1, 8, 8)
    with accelerated.generation(), torch.no_grad():
        for i in range(2):
            accelerated(x, t[i].expand(2), torch.tensor([1, 1]))
        with pytest.raises(RuntimeError, match="a sequence with other conditioning; its result is wrong"):
            accelerated(x, t[2].expand(2), torch.tensor([2, 2]))  # on a GPU, at the next call


def test_a_second_image_with_new_conditioning_in_one_generation(program, accelerated):
    mask = every_other(program)
    t, x = torch.tensor(TIMESTEPS).long(), torch.randn(2, 1, 8, 8)
    with accelerated.generation(), torch.no_grad():
        for label in (1, 2):
            calls = [{"hidden_states": x, "timestep": s.expand(2), "class_labels": torch.tensor([label] * 2)} for s in t]
            wanted = fxmask.reference.run(program, mask, calls)
            assert all(torch.allclose(accelerated(**c).sample, w.sample, atol=1e-5) for c, w in zip(calls, wanted, strict=True))
