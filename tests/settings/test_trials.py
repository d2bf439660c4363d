"""With injected noise the second image compares two ways of forming steps, and the third uses the better one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_settings import accelerated, calls_followed, images, small

import fxmask
from fxmask.learning.instant.levels import ReusePlan
from fxmask.learning.instant.plans import InstantPlan
from fxmask.runtime.trial import Findings
from fxmask.settings.pipeline import session_of

pytest.importorskip("diffusers")


@pytest.mark.parametrize("wins", ["reuse", "forecasts"])
def test_the_third_image_uses_what_did_better_on_the_second(wins: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call = small()
    plain = images(pipe, call, 0, eta=1.0, num_inference_steps=10)
    real = Findings.read

    def read(self: Findings) -> dict[str, dict[int, float]]:
        factor = 1e-8 if wins == "reuse" else 1e8
        return {
            name: {k: x * (factor if name != "output" else 1.0) for k, x in found.items()} for name, found in real(self).items()
        }

    monkeypatch.setattr(Findings, "read", read)
    accelerated(pipe)
    assert torch.equal(images(pipe, call, 0, eta=1.0, num_inference_steps=10), plain)
    session = session_of(pipe)
    known = next(iter(session.settings.values()))
    second = images(pipe, call, 1, eta=1.0, num_inference_steps=10)
    assert known.findings is not None
    assert set(known.findings.squares) > {"output"}
    assert isinstance(known.plan, InstantPlan)
    assert calls_followed(pipe) == 9
    images(pipe, call, 2, eta=1.0, num_inference_steps=10)
    assert known.findings is None
    assert isinstance(known.plan, ReusePlan if wins == "reuse" else InstantPlan)
    assert calls_followed(pipe) == 9
    assert session.account().calls == 0
    assert pipe.unet.plan.mac_ratio > 1.9
    again = images(pipe, call, 1, eta=1.0, num_inference_steps=10)
    assert torch.equal(again, second) is (wins == "forecasts")  # the trial was made with that very plan


def test_a_deterministic_sampler_compares_nothing() -> None:
    pipe, call = small()
    accelerated(pipe)
    images(pipe, call, 0)
    images(pipe, call, 1)
    known = next(iter(session_of(pipe).settings.values()))
    assert known.trial is None
    assert known.findings is None


def test_a_trial_that_another_form_of_call_makes_is_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial runs in eager mode; what it captured serves the plan that comes after it."""
    from fxmask.runtime import variants

    count, recapture = [0], variants.recapture

    def counted(*args: Any) -> Any:
        count[0] += 1
        return recapture(*args)

    monkeypatch.setattr(variants, "recapture", counted)
    pipe, call = small()
    accelerated(pipe)
    images(pipe, call, 0, eta=1.0)
    for seed in (1, 2, 3):
        images(pipe, call, seed, eta=1.0, num_images_per_prompt=2)
    assert count[0] == 1


def test_limits_hold_in_the_trial_too() -> None:
    pipe, call = small()
    accelerated(pipe, max_graphs=3)
    images(pipe, call, 0, eta=1.0, num_inference_steps=10)
    for seed in (1, 2):
        images(pipe, call, seed, eta=1.0, num_inference_steps=10)
        assert pipe.unet.plan.distinct_graphs <= 3


def test_improving_ends_the_trial() -> None:
    pipe, call = small()
    accelerated(pipe)
    for seed in (0, 1):
        images(pipe, call, seed, eta=1.0)
    if pipe.unet.improve("quick"):
        known = next(iter(session_of(pipe).settings.values()))
        assert known.findings is None
    assert fxmask.restore(pipe) is pipe
