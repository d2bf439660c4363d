"""Compiling in the background: the original answers meanwhile, and a run never changes sides in its middle."""

from __future__ import annotations

import threading

import pytest
import torch
from conftest import TIMESTEPS, TinyTransformer, make_calls

import fxmask
from fxmask.runtime.executor import Executor


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Compilation waits for it."""
    event, compile_all = threading.Event(), Executor.compile_all

    def waiting(self: Executor, *, progress: bool) -> None:
        assert event.wait(60)
        compile_all(self, progress=progress)

    monkeypatch.setattr(Executor, "compile_all", waiting)
    return event


def accelerated() -> fxmask.AcceleratedModel:
    torch.manual_seed(0)
    model = TinyTransformer().eval()
    program = fxmask.capture(model, make_calls(2)[0])
    mask = fxmask.policies.interval(2)(program, TIMESTEPS)
    return fxmask.compile(program, fxmask.rectify(program, mask), "eager")


def run(model: torch.nn.Module, calls: list, first: int = 0, end: int = len(TIMESTEPS)) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(**call) for call in calls[first:end]]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_original_answers_until_the_next_run(gate: threading.Event) -> None:
    model, calls = accelerated(), make_calls(2)
    plain = run(model.original, calls)
    assert model.compile_all(background=True, progress=False) is model
    assert same(run(model, calls), plain)
    half = run(model, calls, 0, 2)
    gate.set()
    background = model._fxmask.planned.background
    assert background is not None
    background.wait()
    assert same(half + run(model, calls, 2), plain), "a run that began with the original ends with it"
    found = run(model, calls)
    assert not same(found, plain)
    assert model.report().runs[-1].followed == len(TIMESTEPS) - 1
    assert same(run(model, calls), found)
    assert model._fxmask.planned.background is None


def test_a_failure_is_said_and_the_plan_is_used_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler")

    model, calls = accelerated(), make_calls(2)
    monkeypatch.setattr(Executor, "compile_all", fail)
    model.compile_all(background=True, progress=False)
    background = model._fxmask.planned.background
    assert background is not None
    background.wait()
    assert "compiling in the background failed" in caplog.text
    run(model, calls)
    assert model.report().runs[-1].followed == len(TIMESTEPS) - 1
