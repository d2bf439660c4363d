"""Offloaded pipelines: weights that are elsewhere until their module is called.

There is one device here, so moving is played: weights that are away are NaN in other memory, and whatever runs without calling
the hook makes NaN.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import small_stable_diffusion
from test_settings import accelerated, images

import fxmask
from fxmask.frontend.offloading import HOOK, onloaded
from fxmask.settings import session as session_module
from fxmask.settings.pipeline import session_of

pytest.importorskip("diffusers")
hooks = pytest.importorskip("accelerate.hooks")


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> dict[int, torch.Tensor]:
    """Weights that are not where they are used, by parameter."""
    kept: dict[int, torch.Tensor] = {}

    def send_away(hook: Any, module: torch.nn.Module) -> torch.nn.Module:
        for x in module.parameters():
            if id(x) not in kept:
                kept[id(x)], x.data = x.data, torch.full_like(x, float("nan"))
        return module

    def bring(hook: Any, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        before = hook.prev_module_hook
        if before is not None and id(next(before.model.parameters())) not in kept:
            before.offload()
        for x in module.parameters():
            if id(x) in kept:
                x.data = kept.pop(id(x)).clone()
        return args, kwargs

    monkeypatch.setattr(hooks.CpuOffload, "init_hook", send_away)
    monkeypatch.setattr(hooks.CpuOffload, "pre_forward", bring)
    return kept


def offloaded() -> tuple[Any, dict[str, Any]]:
    pipe, call = small_stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_model_cpu_offload(device="cpu")
    return pipe, call


def expected(seeds: tuple[int, ...], **options: Any) -> list[torch.Tensor]:
    """Of the same pipeline, not offloaded: in full, and with a plan."""
    pipe, call = small_stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    full = images(pipe, call, seeds[0])
    accelerated(pipe, **options)
    return [full, *(images(pipe, call, seed) for seed in seeds)]


@pytest.fixture
def captured(away: dict[int, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every capture, whether weights were where they are used."""
    found, real = [], session_module.capture

    def capture(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        found.append(bool(next(model.parameters()).isfinite().all()))
        return real(model, *args, **kwargs)

    monkeypatch.setattr(session_module, "capture", capture)
    return found


@pytest.mark.parametrize("order", ["offloaded first", "accelerated first"])
def test_an_offloaded_pipeline_has_a_plan(
    order: str, away: dict[int, torch.Tensor], captured: list[bool], tmp_path: Path
) -> None:
    plain, first, second, third = expected((0, 1, 2))
    pipe, call = offloaded()
    original = pipe.unet
    if order == "accelerated first":
        pipe.remove_all_hooks()
        for part in (pipe.unet, pipe.text_encoder):
            hooks.CpuOffload.pre_forward(hooks.CpuOffload("cpu"), part)
        accelerated(pipe)
        pipe.enable_model_cpu_offload(device="cpu")
    else:
        accelerated(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(images(pipe, call, 0), plain)
        assert torch.equal(plain, first)
        assert torch.equal(images(pipe, call, 1), second)
        assert torch.equal(images(pipe, call, 2), third), "weights were in other memory before"
    assert session_of(pipe).account().images == 2
    assert captured == [True, True], "of the pipeline that is not offloaded, and of this one"
    assert id(next(original.parameters())) in away, "after a call they are away again"
    assert HOOK not in vars(original)
    fxmask.save(pipe, tmp_path / "plans")
    assert fxmask.restore(pipe).unet is original
    assert HOOK in vars(original)
    assert "Accelerated" not in repr(type(pipe.unet))
    assert torch.equal(images(pipe, call, 0), plain)
    again, _ = offloaded()
    fxmask.load(tmp_path / "plans", again, backend="eager", progress=False)
    assert torch.equal(images(again, call, 1), second)


def test_learning_calls_hooks(away: dict[int, torch.Tensor]) -> None:
    pipe, call = offloaded()
    options = {"example_calls": [call], "num_inference_steps": 4, "effort": "quick"}
    accelerated(pipe, **options)
    assert pipe.unet.has_plan
    assert images(pipe, call, 0, num_inference_steps=4).isfinite().all()
    assert session_of(pipe).account().images == 1
    assert id(next(pipe.unet.parameters())) in away


def test_measuring_calls_hooks(away: dict[int, torch.Tensor]) -> None:
    pipe, call = offloaded()
    accelerated(pipe)
    images(pipe, call, 0)
    calls = [{**call, "num_inference_steps": 6, "generator": torch.Generator().manual_seed(7)}]
    assert 10 < fxmask.measure(pipe, calls).psnr < 200


def test_weights_are_brought_once_for_what_is_nested(away: dict[int, torch.Tensor]) -> None:
    pipe, _ = offloaded()
    weight = next(pipe.unet.parameters())
    with onloaded(pipe.unet):
        with onloaded(pipe.unet):
            assert weight.isfinite().all()
        assert weight.isfinite().all()
    assert not weight.isfinite().any()
    with onloaded(torch.nn.Linear(1, 1)):
        pass


def test_background_learning_is_left_out_by_name(away: dict[int, torch.Tensor]) -> None:
    pipe, call = offloaded()
    accelerated(pipe, improve="background")
    with pytest.warns(UserWarning, match="nothing is improved in the background"):
        images(pipe, call, 0)


def test_sequential_offloading_is_refused_by_name() -> None:
    pipe, call = small_stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    plain = images(pipe, call, 0)
    accelerated(pipe)
    hooks.add_hook_to_module(pipe.unet, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True), append=True)
    with pytest.warns(UserWarning, match=r"moved in the middle of its calls \(enable_sequential_cpu_offload\)"):
        assert torch.equal(images(pipe, call, 0), plain)
