"""Pipelines accelerated in place: the first image of a setting is what it always was, the second is made with a plan."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ddim, tiny_dit, tiny_unet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipelines import PIPELINES, Vae, generator, small_stable_diffusion

import fxmask
from fxmask.settings import session as session_module
from fxmask.settings.pipeline import session_of

pytest.importorskip("diffusers")


def images(pipe: Any, call: dict[str, Any], seed: int = 0, **changes: Any) -> torch.Tensor:
    """What a pipeline makes, as a tensor."""
    arguments = {"num_inference_steps": 6, **call, **changes}
    if "generator" not in arguments:
        arguments["generator"] = generator(seed)
    result = pipe(**arguments)
    first = result[0] if isinstance(result, tuple) else next(iter(result.values()))
    return torch.as_tensor(first)


def small() -> tuple[Any, dict[str, Any]]:
    pipe, call = small_stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


def accelerated(pipe: Any, **options: Any) -> Any:
    return fxmask.accelerate(pipe, **{"speedup": 2.0, "backend": "eager", "progress": False, **options})


def calls_followed(pipe: Any) -> int:
    return pipe.unet.report().runs[-1].followed


# What runs


@pytest.mark.parametrize("name", PIPELINES)
def test_first_image_is_the_same_and_the_second_has_a_plan_or_a_reason(name: str) -> None:
    pipe, call = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    before = type(pipe)
    plain = [images(pipe, call, seed) for seed in (0, 1)]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        same = accelerated(pipe)
        assert same is pipe
        assert isinstance(pipe, before)
        assert torch.equal(images(pipe, call, 0), plain[0])
        second = images(pipe, call, 1)
    session = session_of(pipe)
    known = next(iter(session.settings.values()))
    if known.refused is None:
        assert known.variants is not None
        assert session.account().images == 1
        assert second.shape == plain[1].shape
        assert bool(second.isfinite().all())
    else:
        assert any(known.refused in str(w.message) for w in found)
        assert torch.equal(second, plain[1])
    fxmask.restore(pipe)
    assert type(pipe) is before
    assert torch.equal(images(pipe, call, 1), plain[1])


def test_no_call_of_the_denoiser_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call = small()
    count, captured = [0], [0]
    forward = type(pipe.unet).forward

    @functools.wraps(forward)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe.unet), "forward", counted)
    capture = session_module.capture

    def counting_capture(*args: Any, **kwargs: Any) -> Any:
        before = count[0]
        try:
            return capture(*args, **kwargs)
        finally:
            captured[0] += count[0] - before

    monkeypatch.setattr(session_module, "capture", counting_capture)
    accelerated(pipe)
    assert count[0] == 0
    images(pipe, call, 0)
    assert count[0] == 6
    images(pipe, call, 1)
    images(pipe, call, 2)
    assert count[0] == 6 + captured[0]
    assert session_of(pipe).account().calls == 0
    assert calls_followed(pipe) == 5


CHANGES = [
    {},
    {"num_inference_steps": 8},
    {"guidance_scale": 1.5},
    {"guidance_scale": 1.0},
    {"height": 96, "width": 64},
    {"eta": 1.0},
]


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(order=st.lists(st.integers(0, len(CHANGES) - 1), min_size=3, max_size=7))
def test_the_first_image_of_every_setting_is_the_same(order: list[int]) -> None:
    pipe, call = small()
    size = {"height": 64, "width": 64}
    plain = {k: images(pipe, {**call, **size}, k, **CHANGES[k]) for k in set(order)}
    accelerated(pipe)
    seen: set[int] = set()
    for k in order:
        made = images(pipe, {**call, **size}, k, **CHANGES[k])
        assert k in seen or torch.equal(made, plain[k])
        seen.add(k)
    assert len(session_of(pipe).settings) == len(seen)


def test_settings_are_told_apart_by_what_a_plan_depends_on() -> None:
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    pipe, call = small()
    accelerated(pipe)
    session = session_of(pipe)
    images(pipe, call, 0)
    images(pipe, call, 1, prompt=["a nine", "a two"])
    assert len(session.settings) == 1  # other prompts, other noise: the same setting
    images(pipe, call, 1, prompt="a nine")
    assert len(session.settings) == 1  # another batch, too
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    images(pipe, call, 1)
    assert len(session.settings) == 2
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    images(pipe, call, 1)
    assert len(session.settings) == 3


def test_adapters_are_settings() -> None:
    peft = pytest.importorskip("peft")
    pipe, call = small()
    accelerated(pipe)
    images(pipe, call, 0)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.unet.add_adapter(config, adapter_name="one")
    full = images(pipe, call, 1)
    assert len(session_of(pipe).settings) == 2
    for processor in pipe.unet.modules():
        if hasattr(processor, "scaling"):
            processor.scaling["one"] = 0.1
    half = images(pipe, call, 1)
    assert len(session_of(pipe).settings) == 3
    fxmask.restore(pipe)
    assert torch.equal(images(pipe, call, 1), half)
    assert not torch.equal(full, half)


def test_settings_that_were_used_least_recently_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "MOST_SETTINGS", 2)
    pipe, call = small()
    accelerated(pipe)
    for steps in (4, 5, 4, 6):
        images(pipe, call, num_inference_steps=steps)
    kept = [dict(setting.arguments)["num_inference_steps"] for setting in session_of(pipe).settings]
    assert kept == [4, 6]


# What goes wrong


def test_an_interrupted_call_is_not_learned_from() -> None:
    pipe, call = small()
    accelerated(pipe)

    def stop(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 2
        return values

    images(pipe, call, callback_on_step_end=stop)
    plain = images(fxmask.restore(pipe), call, 1)
    accelerated(pipe)
    images(pipe, call, callback_on_step_end=stop)
    known = next(iter(session_of(pipe).settings.values()))
    assert not known.runs
    assert known.refused is None
    assert torch.equal(images(pipe, call, 1), plain)
    assert len(known.runs) == 1


def test_an_exception_in_the_first_call_is_the_callers() -> None:
    pipe, call = small()
    accelerated(pipe)

    def fail(*_: Any) -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        images(pipe, call, callback_on_step_end=fail)
    plain = images(fxmask.restore(pipe), call, 1)
    accelerated(pipe)
    assert torch.equal(images(pipe, call, 1), plain)


def test_too_little_room_for_a_recording_is_said_once() -> None:
    pipe, call = small()
    plain = images(pipe, call)
    accelerated(pipe, max_learning_bytes=2000)
    with pytest.warns(UserWarning, match="larger max_learning_bytes"):
        assert torch.equal(images(pipe, call), plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(images(pipe, call), plain)


def test_a_setting_that_is_refused_has_not_the_plan_of_another() -> None:
    pipe, call = small()
    plain = [images(pipe, call, seed, guidance_scale=1.5) for seed in (0, 1)]
    accelerated(pipe)
    images(pipe, call, 0)
    images(pipe, call, 1)
    session_of(pipe)._max_bytes = 2000
    with pytest.warns(UserWarning, match="larger max_learning_bytes"):
        assert torch.equal(images(pipe, call, 0, guidance_scale=1.5), plain[0])
    assert torch.equal(images(pipe, call, 1, guidance_scale=1.5), plain[1])  # at the same timesteps
    images(pipe, call, 1)
    assert session_of(pipe).account().images == 2


def test_a_denoiser_that_was_put_in_its_place_runs() -> None:
    pipe, call = small()
    accelerated(pipe)
    images(pipe, call)
    other, _ = small()
    other.unet.load_state_dict({k: v * 0.9 for k, v in other.unet.state_dict().items()})
    plain = images(other, call)
    pipe.unet = other.unet
    assert torch.equal(images(pipe, call), plain)


def test_a_pipeline_refuses_what_is_for_models() -> None:
    pipe, _ = small()
    with pytest.raises(fxmask.InputError, match="has a scheduler of its own"):
        fxmask.accelerate(pipe, pipe.scheduler)
    with pytest.raises(fxmask.InputError, match="component='vea' is no module"):
        fxmask.accelerate(pipe, component="vea")
    with pytest.raises(fxmask.InputError, match="no plan yet"):
        _ = accelerated(pipe).unet.plan


# Saved, better, reported


def test_plans_of_all_settings_are_saved(tmp_path: Any) -> None:
    pipe, call = small()
    accelerated(pipe)
    images(pipe, call, 0)
    made = images(pipe, call, 1)
    images(pipe, call, 0, num_inference_steps=5)  # seen once: its plan is made now
    fxmask.save(pipe, tmp_path / "plans")
    other, _ = small()
    fxmask.load(tmp_path / "plans", other, backend="eager")
    assert len(session_of(other).settings) == 2
    assert torch.equal(images(other, call, 1), made)
    assert other.unet.report().runs[-1].error == pipe.unet.report().runs[-1].error
    images(other, call, 1, num_inference_steps=5)
    assert session_of(other).account().images == 2
    dit = fxmask.accelerate(_dit(), backend="eager", progress=False)
    with pytest.raises(fxmask.InputError, match="no setting has a plan yet"):
        fxmask.save(dit, tmp_path / "none")
    with pytest.raises(fxmask.InputError, match="component='unet' is no module of DiTPipeline"):
        fxmask.load(tmp_path / "plans", _dit())
    wider, _ = PIPELINES["stable_diffusion"]()
    with pytest.raises(fxmask.MaskError, match="made for another model"):
        fxmask.load(tmp_path / "plans", wider)
    (tmp_path / "plans" / "settings.json").write_text("{")
    with pytest.raises(fxmask.MaskError, match="damaged"):
        fxmask.load(tmp_path / "plans", other)


def _dit() -> Any:
    from diffusers import DiTPipeline

    return DiTPipeline(transformer=tiny_dit(), vae=Vae(), scheduler=ddim())


def test_every_so_many_calls_are_recorded_and_fitted_again() -> None:
    pipe, call = small()
    plain = images(pipe, call, 3)
    accelerated(pipe, every=2)
    for seed in (0, 1):
        images(pipe, call, seed)
    known = next(iter(session_of(pipe).settings.values()))
    before = known.mask
    assert torch.equal(images(pipe, call, 3), plain)  # the second after the first: in full, and recorded
    assert len(known.runs) == 2
    assert known.mask is not None
    assert known.mask != before
    assert session_of(pipe).account().recorded == 2


def test_improving_never_makes_it_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call = small()
    accelerated(pipe)
    with pytest.raises(fxmask.InputError, match="no run was recorded yet"):
        pipe.unet.improve()
    images(pipe, call, 0)
    images(pipe, call, 1)
    known = next(iter(session_of(pipe).settings.values()))
    assert pipe.unet.improve("instant")
    before = known.mask
    worst = torch.full((2,), 3.0, dtype=torch.float64)
    import fxmask.settings.better as better

    monkeypatch.setattr(better, "decibels_on", lambda program, mask, runs: worst if mask is before else 2 * worst)
    assert not pipe.unet.improve("quick")
    assert known.mask is before
    monkeypatch.setattr(better, "decibels_on", lambda program, mask, runs: worst if mask is before else worst - 1)
    assert pipe.unet.improve("quick")
    assert known.mask is not before
    assert session_of(pipe).account().calls > 0
    images(pipe, call, 2)
    lanes = pipe.unet.report().runs[-2:] if known.mask.lanes else pipe.unet.report().runs[-1:]
    assert [run.followed for run in lanes] == [5, 6][: len(lanes)], "the second lane goes on from the first one's call"


def test_an_improved_plan_is_checked_and_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import fxmask.settings.better as better

    pipe, call = small()
    accelerated(pipe, speedup=None, max_error=0.5)
    steps = {"num_inference_steps": 12}
    images(pipe, call, 0, **steps)
    images(pipe, call, 1, **steps)
    known = next(iter(session_of(pipe).settings.values()))
    before = known.mask
    errors = {True: 20.0, False: 10.0}
    monkeypatch.setattr(better, "decibels_on", lambda p, mask, runs: torch.full((2,), errors[mask is before]).double() - 40)
    mask = fxmask.policies.interval(3)(session_of(pipe).program, before.timesteps)
    monkeypatch.setattr(better.Search, "meet_error", lambda self, error: SimpleNamespace(mask=mask, units=1.0))
    searched, real = [], better.Search.__init__

    def search(self: Any, *args: Any, lanes: str = "own", **options: Any) -> None:
        searched.append(lanes)
        real(self, *args, lanes=lanes, **options)

    monkeypatch.setattr(better.Search, "__init__", search)
    assert pipe.unet.improve("quick")
    assert searched == ["alike"], "rows of lanes have no checks"
    assert known.checks.error == pytest.approx(10 ** (-30 / 20))
    images(pipe, call, 2, **steps)
    assert pipe.unet.report().runs[-1].error is not None
    assert pipe.unet.report().runs[-1].guarded is None
    known.checks = dataclasses.replace(known.checks, max_error=1e-9)
    session_of(pipe)._use(known)
    images(pipe, call, 3, **steps)
    assert pipe.unet.report().runs[-1].guarded is not None


def test_report_says_what_was_spent_and_how_large_errors_are() -> None:
    pipe, call = small()
    accelerated(pipe)
    for seed in range(3):
        images(pipe, call, seed)
    report = pipe.unet.report()
    assert report.error is not None
    assert report.error > 0
    assert len(report.runs[-1].error) == 2  # one for each image, both lanes together
    account = report.to_dict()["account"]
    assert account["images"] == 2
    assert account["recorded"] == 1
    assert account["capturing"] > 0
    assert "estimated error" in str(report)
    assert "in full" in str(report)


def test_estimates_are_larger_for_what_the_plan_does_not_suit() -> None:
    pipe, call = small()
    accelerated(pipe)
    images(pipe, call, 0)
    images(pipe, call, 1)
    usual = max(pipe.unet.report().runs[-1].error)
    with torch.no_grad():  # other weights: values change otherwise than when they were recorded
        for x in pipe.unet.original.parameters():
            x.mul_(1.3)
    images(pipe, call, 1)
    assert max(pipe.unet.report().runs[-1].error) > usual


def test_copies_are_of_the_original_class(tmp_path: Any) -> None:
    import copy
    import pickle

    pipe, call = small()
    before = type(pipe)
    accelerated(pipe)
    again = copy.deepcopy(pipe)  # without a plan yet
    assert type(again) is before
    assert torch.equal(images(again, call, 0), images(pipe, call, 0))
    made = images(pipe, call, 1)
    for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert type(other) is before
        assert torch.equal(images(other, call, 1), made)
    pipe.save_pretrained(tmp_path)
    assert "AcceleratedModel" not in (tmp_path / "model_index.json").read_text()


def test_recorded_runs_are_kept_of_few_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "MOST_RECORDED", 1)
    pipe, call = small()
    accelerated(pipe)
    for steps in (4, 5, 4, 5, 6):
        images(pipe, call, num_inference_steps=steps)
    kept = {dict(s.arguments)["num_inference_steps"]: len(k.runs) for s, k in session_of(pipe).settings.items()}
    assert kept == {4: 0, 5: 0, 6: 1}


class Noisy(torch.nn.Module):
    """Draws random numbers when it is called, which is noticed in the middle of a run."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_unet()

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.inner(sample, timestep).sample + 0.01 * torch.randn(sample.shape)


class Pipeline:
    """The least that is one."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.unet, self.scheduler = model, ddim()

    @torch.no_grad()
    def __call__(self, num_inference_steps: int = 4, generator: torch.Generator | None = None) -> dict[str, torch.Tensor]:
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.randn(1, 1, 8, 8, generator=generator)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.unet(x, t), t, x).prev_sample
        return {"images": x}


def test_what_is_refused_in_the_middle_runs_again_with_the_same_noise() -> None:
    pipe = Pipeline(Noisy().eval())
    torch.manual_seed(3)
    plain = images(pipe, {}, 0)
    following = torch.randn(3)
    accelerated(pipe)
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="draws random numbers when it is called"):
        assert torch.equal(images(pipe, {}, 0), plain)
    assert torch.equal(torch.randn(3), following)
