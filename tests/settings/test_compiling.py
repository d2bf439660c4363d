"""Step graphs of a pipeline that compile in the background: until they are there, images are what they always were."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_settings import accelerated, calls_followed, images, small

import fxmask
from fxmask.runtime.executor import Executor
from fxmask.settings import session as session_module
from fxmask.settings.pipeline import session_of

pytest.importorskip("diffusers")


def test_the_original_answers_until_everything_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, real = threading.Event(), session_module.get_backend
    monkeypatch.setattr(session_module, "get_backend", lambda name: SimpleNamespace(exact=False, real=real(name)))

    def compile_all(self: Executor, *, progress: bool) -> None:
        assert compiled.wait(60)

    monkeypatch.setattr(Executor, "compile_all", compile_all)
    pipe, call = small()
    plain = [images(pipe, call, seed) for seed in range(4)]
    accelerated(pipe, compiling="background")
    assert torch.equal(images(pipe, call, 0), plain[0])
    for seed in (1, 2):  # a plan is there, its graphs are not
        assert torch.equal(images(pipe, call, seed), plain[seed])
    known = next(iter(session_of(pipe).settings.values()))
    assert known.variants is not None
    background = known.variants.background
    assert background is not None
    compiled.set()
    background.wait()
    assert not torch.equal(images(pipe, call, 3), plain[3])
    assert calls_followed(pipe) == 5


def test_other_ways_of_compiling_are_refused() -> None:
    pipe, _ = small()
    with pytest.raises(fxmask.InputError, match="compiling='later' is unknown"):
        fxmask.accelerate(pipe, compiling="later")


def test_a_model_compiles_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    from conftest import ddim, tiny_unet

    asked: list[Any] = []
    real = fxmask.AcceleratedModel.compile_all
    monkeypatch.setattr(
        fxmask.AcceleratedModel, "compile_all", lambda self, **options: asked.append(options) or real(self, **options)
    )
    options = {"num_inference_steps": 4, "speedup": 2.0, "backend": "inductor", "progress": False}
    model = fxmask.accelerate(tiny_unet(), ddim(), compiling="background", **options)
    assert asked == [{"progress": False, "background": True}]
    background = model._fxmask.planned.background
    assert background is not None
    background.wait()
