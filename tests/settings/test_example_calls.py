"""Pipelines that are learned from before anybody calls them: from given calls, or from a few of their own kind."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import ddim, tiny_dit
from pipelines import Vae, generator, small_stable_diffusion
from test_settings import Pipeline, accelerated, images, small

import fxmask
from fxmask.learning import search as search_module
from fxmask.learning.journal import Journal
from fxmask.settings.example_calls import PROMPTS, built_in_calls, checked_steps
from fxmask.settings.pipeline import session_of

pytest.importorskip("diffusers")


def steps_of(pipe: Any) -> list[int]:
    return [dict(setting.arguments)["num_inference_steps"] for setting in session_of(pipe).settings]


def test_example_calls_are_fast_from_the_first_call_on() -> None:
    pipe, call = small()
    plain = images(pipe, call, 5)
    accelerated(pipe, example_calls=[{**call, "num_inference_steps": 6}])
    session = session_of(pipe)
    assert session.account().recorded == 1
    assert session.account().calls == 0
    made = images(pipe, call, 5)
    assert session.account().images == 1
    assert not torch.equal(made, plain)
    assert len(session.settings) == 1  # the call with a generator, and of other images, is of the same setting


def test_several_numbers_of_steps_share_what_is_captured() -> None:
    pipe, call = small()
    calls = [call, {**call, "prompt": ["a nine", "a six"]}]
    accelerated(pipe, example_calls=calls, num_inference_steps=[4, 6])
    session = session_of(pipe)
    assert steps_of(pipe) == [4, 6]
    assert session.account().recorded == 4
    first, second = (known.variants for known in session.settings.values())
    assert first is not None
    assert second is not None
    assert first.program is second.program
    assert first.known[0].graphs is second.known[0].graphs
    for steps in (4, 6):
        images(pipe, call, num_inference_steps=steps)
    assert session.account().images == 2


def test_more_effort_keeps_the_instant_plan_or_a_better_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import fxmask.settings.session as session_module

    asked = []
    better = session_module.better_mask

    def spied(*args: Any, **options: Any) -> Any:
        asked.append((len(args[1]), options["effort"]))
        return better(*args, **options)

    monkeypatch.setattr(session_module, "better_mask", spied)
    pipe, call = small()
    accelerated(pipe, example_calls=[call], num_inference_steps=4, effort="quick")
    assert asked == [(4, "quick")]  # one call, with four seeds
    session = session_of(pipe)
    assert session.account().calls > 0
    images(pipe, call, num_inference_steps=4)
    assert session.account().images == 1


def test_built_in_calls_are_of_the_pipelines_kind() -> None:
    from diffusers import DiTPipeline

    pipe, _ = small()
    assert [call["prompt"] for call in built_in_calls(pipe, pipe.unet)] == list(PROMPTS[:4])
    dit = DiTPipeline(transformer=tiny_dit(), vae=Vae(), scheduler=ddim())
    labels = [call["class_labels"] for call in built_in_calls(dit, dit.transformer)]
    assert len({tuple(x) for x in labels}) == 4
    assert max(x[0] for x in labels) < dit.transformer.config.num_embeds_ada_norm
    assert built_in_calls(Pipeline(pipe.unet), pipe.unet) == [{}]


def test_without_example_calls_more_effort_makes_its_own() -> None:
    from diffusers import DiTPipeline

    pipe = DiTPipeline(transformer=tiny_dit(), vae=Vae(), scheduler=ddim())
    pipe.set_progress_bar_config(disable=True)
    accelerated(pipe, num_inference_steps=4, effort="quick", speedup=1.3)
    session = session_of(pipe)
    assert session.account().recorded == 4
    pipe(class_labels=[2], num_inference_steps=4, generator=generator(3), output_type="np")
    assert session.account().images == 1


def test_what_cannot_be_made_up_is_asked_for() -> None:
    class NeedsAnImage(Pipeline):
        def __call__(self, image: torch.Tensor, num_inference_steps: int = 4) -> Any:  # type: ignore[override]
            raise AssertionError

    pipe, _ = small()
    with pytest.raises(fxmask.InputError, match=r"needs \['image'\], for which there is nothing built in"):
        accelerated(NeedsAnImage(pipe.unet), effort="quick")
    before = type(pipe), pipe.unet
    with pytest.raises(fxmask.InputError, match=r"cannot be called with the example call \['wrong'\]"):
        accelerated(pipe, example_calls=[{"wrong": 1}])
    assert (type(pipe), pipe.unet) == before  # nothing is left behind
    assert type(pipe.unet) is type(before[1])


@pytest.mark.parametrize("calls", [{"prompt": "a one"}, "a one", [], ["a one"], [{1: 2}], 3])
def test_example_calls_of_another_form_are_refused(calls: Any) -> None:
    pipe, _ = small()
    with pytest.raises(fxmask.InputError, match="example_calls must be a list of keyword arguments"):
        fxmask.accelerate(pipe, example_calls=calls)


@pytest.mark.parametrize("steps", [0, -1, True, "4", 2.5, [4, 0], []])
def test_wrong_numbers_of_steps_are_refused(steps: Any) -> None:
    pipe, _ = small()
    with pytest.raises(fxmask.InputError, match="must be a whole number"):
        fxmask.accelerate(pipe, num_inference_steps=steps)
    assert checked_steps([4, 4, 6]) == [4, 6]
    with pytest.raises(fxmask.InputError, match="several numbers of steps are for a pipeline"):
        fxmask.accelerate(pipe.unet, pipe.scheduler, num_inference_steps=[4, 6])
    with pytest.raises(fxmask.InputError, match=r"\['example_calls'\] is for a pipeline"):
        fxmask.accelerate(pipe.unet, pipe.scheduler, example_calls=[{}])


def test_an_outcome_out_of_reach_is_said_at_once() -> None:
    pipe, call = small()
    with pytest.warns(UserWarning, match="out of reach"), pytest.raises(fxmask.InputError, match="out of reach"):
        accelerated(pipe, example_calls=[call], num_inference_steps=3, speedup=50.0)
    assert not hasattr(type(pipe.unet), "is_accelerated")


def test_a_setting_not_seen_before_is_said_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    pipe, call = small()
    with caplog.at_level(logging.WARNING, "fxmask"):
        accelerated(pipe)
        images(pipe, call)
        images(pipe, call)
        assert not caplog.records  # the first setting of all needs no word
        images(pipe, call, num_inference_steps=5)
        images(pipe, call, num_inference_steps=5)
    (record,) = caplog.records
    assert "not seen before, so this call runs in full" in record.getMessage()
    assert "num_inference_steps=5" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_pipelines_and_what_they_hold_are_told_of_the_one_line() -> None:
    pipe, _ = small_stable_diffusion()
    for function in (lambda: fxmask.capture(pipe, {}), lambda: fxmask.learn(pipe, []), lambda: fxmask.compile(pipe, 2)):
        with pytest.raises(fxmask.InputError, match=r"fxmask\.accelerate\(pipe\)"):
            function()
    with pytest.raises(fxmask.InputError, match=r"fxmask\.accelerate\(pipe\)"):
        fxmask.accelerate(pipe.unet, pipe.scheduler, progress=False)


def test_a_negative_prompt_is_a_setting_where_it_switches_guidance_on() -> None:
    from fxmask.settings.key import setting_of

    class TrueGuidance(Pipeline):
        def __call__(self, prompt: str = "", negative_prompt: str | None = None, true_cfg_scale: float = 1.0) -> Any:  # type: ignore[override]
            raise AssertionError

    pipe, _ = small()
    guided = TrueGuidance(pipe.unet)
    own = [setting_of(guided, guided.__call__, (), kwargs, [pipe.unet]) for kwargs in ({}, {"negative_prompt": "a"})]
    assert own[0] != own[1]
    plain = [setting_of(pipe, pipe.__call__, (), kwargs, [pipe.unet]) for kwargs in ({}, {"negative_prompt": "a"})]
    assert plain[0] == plain[1]


class Stopping(Journal):
    """A journal whose process is killed after a few measurements."""

    left = 6
    made: ClassVar[list[Stopping]] = []

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.made.append(self)

    def get(self, *args: Any, **options: Any) -> Any:
        found = super().get(*args, **options)
        Stopping.left -= 1
        if not Stopping.left:
            raise SystemExit("killed")
        return found


def test_interrupted_learning_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_inference_steps": 4, "effort": "quick", "speedup": 1.5}
    whole, call = small()
    accelerated(whole, example_calls=[call], **options)
    monkeypatch.setattr(search_module, "Journal", Stopping)
    monkeypatch.setattr(Stopping, "made", [])
    monkeypatch.setattr(Stopping, "left", 6)
    pipe, _ = small()
    original = pipe.unet
    with pytest.raises(SystemExit):
        accelerated(pipe, example_calls=[call], checkpoint=tmp_path / "learning", **options)
    assert pipe.unet is original, "nothing is left in the pipeline"
    (file,) = (tmp_path / "learning").glob("*.json")
    assert file.name.startswith("unet-")
    pipe, _ = small()
    accelerated(pipe, example_calls=[call], checkpoint=tmp_path / "learning", **options)
    first, second = Stopping.made
    assert first.replayed == 0
    assert second.replayed > 0
    assert pipe.unet.mask == whole.unet.mask
    with pytest.raises(fxmask.InputError, match="must be a folder for a pipeline"):
        accelerated(small()[0], example_calls=[call], checkpoint=file, **options)
    with pytest.raises(fxmask.InputError, match="checkpoint= keeps what further calls"):
        accelerated(small()[0], checkpoint=tmp_path / "learning")
