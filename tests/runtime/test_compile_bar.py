"""The bar of compiling: all at once, or at first calls, each graph once."""

from __future__ import annotations

import pytest
import torch
from conftest import TIMESTEPS, make_calls

import fxmask
from fxmask.backends import BACKENDS, Backend
from fxmask.backends.eager import Eager
from fxmask.runtime.compile_bar import CompileBar


def test_first_calls_open_a_bar_and_the_last_closes_it(capsys: pytest.CaptureFixture[str]) -> None:
    bar, calls = CompileBar(shown=True), []
    keys = ["a", "b"]
    for key in ("a", "a", "b"):
        run = bar.first_call(key, keys, lambda x: calls.append(x) or x)
        assert run(key) == key
        assert (bar._bar is None) == (key == "b")
    assert calls == ["a", "a", "b"]
    text = capsys.readouterr().err
    assert "compiling step graphs" in text
    assert "2/2" in text

    def plain(x: int) -> int:
        return x

    assert bar.first_call("a", keys, plain) is plain, "nothing is between once it was called"


def test_all_at_once_counts_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    bar, keys = CompileBar(), ["a", "b", "c"]
    bar.first_call("a", keys, lambda: None)()
    assert capsys.readouterr().err == "", "not shown where nobody asked for it"
    with bar.holding(keys, shown=True):
        for key in keys:
            bar.first_call(key, keys, lambda: None)()
    assert "2/2" in capsys.readouterr().err


def test_a_call_that_fails_is_no_first_call() -> None:
    def fail() -> None:
        raise ValueError

    bar = CompileBar()
    with pytest.raises(ValueError):  # noqa: PT011
        bar.first_call("a", ["a"], fail)()
    assert "a" not in bar._called


@pytest.mark.parametrize("progress", [True, False])
def test_models_show_it_also_for_another_shape(
    tiny: fxmask.Program, progress: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a backend that is no exact one; what compiles is a stand-in."""
    monkeypatch.setitem(BACKENDS, "slow", Backend({"whole": Eager}))
    mask = fxmask.policies.interval(2)(tiny, TIMESTEPS)
    model = fxmask.compile(tiny, fxmask.rectify(tiny, mask), "slow", progress=progress)
    for batch in (2, 3):
        with torch.no_grad():
            for call in make_calls(batch):
                model(**call)
        assert ("2/2" in capsys.readouterr().err) == progress, batch
