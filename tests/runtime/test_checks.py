"""Forecasts of what is computed anyway: measures, estimates, and a bound that a run may not pass."""

from __future__ import annotations

import pytest
import torch
from conftest import ddim, tiny_unet

import fxmask
from fxmask.runtime.checks import Check, Checks, RunChecks, estimated_error
from fxmask.runtime.model import AcceleratedModel


@pytest.fixture(scope="module")
def run() -> fxmask.Trajectory:
    return fxmask.record(tiny_unet(), ddim(), num_inference_steps=8, batch_size=2)


def model_of(run: fxmask.Trajectory, checks: Checks | None, computed: set[int]) -> AcceleratedModel:
    program = fxmask.capture(tiny_unet(), run.calls[0][0])
    name = next(b.name for b in program.blocks if b.kind == "output")
    mask = fxmask.Mask([[i in computed] for i in range(8)], run.timesteps, (name,), None, program.fingerprint)
    return AcceleratedModel(program, fxmask.rectify(program, mask), "eager", checks=checks)


def test_measures_are_the_differences_to_forecasts() -> None:
    values = [torch.randn(3, 4, 2) for _ in range(4)]
    checks = RunChecks(Checks({3: Check((2, 0), (1.5, -0.5), 1.0, 1.0)}, 0.1))
    for step, value in enumerate(values):
        checks.computed(step, value)
    expected = (values[3] - 1.5 * values[2] + 0.5 * values[0]).square().flatten(1).mean(dim=1).sqrt()
    torch.testing.assert_close(checks.measures[3], expected)
    torch.testing.assert_close(torch.tensor(checks.error()), 0.1 * expected)
    checks.send()
    assert checks.arrived_error() == checks.error()
    assert not checks._kept  # nothing is held when nobody reads it any more


def test_rows_of_an_image_are_combined_as_guidance_does() -> None:
    first, second = torch.randn(4, 3), torch.randn(4, 3)
    checks = RunChecks(Checks({1: Check((0,), (1.0,), 1.0, 1.0)}, 1.0, lanes=(-3.0, 4.0)))
    checks.computed(0, first)
    checks.computed(1, second)
    change = second - first
    expected = (4 * change[2:] - 3 * change[:2]).square().mean(dim=1).sqrt()
    torch.testing.assert_close(checks.measures[1], expected)


def test_channels_of_a_variance_say_nothing_of_the_sample() -> None:
    first, second, sample = torch.randn(2, 6, 4, 4), torch.randn(2, 6, 4, 4), torch.randn(2, 3, 4, 4)
    checks = RunChecks(Checks({1: Check((0,), (1.0,), 1.0, 1.0)}, 1.0))
    checks.computed(0, first, sample)
    checks.computed(1, second, sample)
    expected = (second - first)[:, :3].square().flatten(1).mean(dim=1).sqrt()
    torch.testing.assert_close(checks.measures[1], expected)


def test_a_prediction_that_the_caller_wrote_to_is_not_read() -> None:
    first = torch.randn(2, 3)
    checks = RunChecks(Checks({1: Check((0,), (1.0,), 1.0, 1.0)}, 1.0))
    checks.computed(0, first)
    first.mul_(2)
    checks.computed(1, torch.randn(2, 3))
    assert not checks.measures
    assert checks.error() is None


def test_errors_grow_with_the_measures_that_count() -> None:
    checks = Checks({2: Check((1,), (1.0,), 2.0, 0.75), 4: Check((2,), (1.0,), 1.0, 0.25)}, 0.1)
    assert estimated_error(checks, {2: [2.0], 4: [1.0]}) == pytest.approx((0.1,))
    assert estimated_error(checks, {2: [4.0, 2.0], 4: [1.0, 2.0]}) == pytest.approx((0.1 * 3.25**0.5, 0.1 * 1.75**0.5))
    assert estimated_error(checks, {2: [2.0]}) == pytest.approx((0.1,))  # an unfinished run: of what there is
    assert estimated_error(checks, {}) is None


def test_checks_change_no_result(run: fxmask.Trajectory) -> None:
    computed = {0, 1, 3, 5}
    checks = Checks({k: Check((k - 2,), (1.0,), 1e-3, 0.5) for k in (3, 5)}, 0.1)
    plain, checked = model_of(run, None, computed), model_of(run, checks, computed)
    assert torch.equal(run.rollout(plain), run.rollout(checked))
    assert checked.report().runs[-1].error is not None
    assert plain.report().runs[-1].error is None


@pytest.mark.parametrize("bound", [1e-9, 1e9])
def test_a_run_that_passes_its_bound_computes_the_rest(run: fxmask.Trajectory, bound: float) -> None:
    """Decided one step ahead: the step after the one whose check was too large is the first that is computed."""
    computed = {0, 1, 3, 5}
    checks = Checks({3: Check((1, 0), (2.0, -1.0), 1e-3, 1.0)}, 0.1, max_error=bound)
    model, plain = model_of(run, checks, computed), model_of(run, None, computed)
    loop, reference, original = run.loop(), run.loop(), tiny_unet()
    call, other = next(loop), next(reference)
    with model.generation(), plain.generation():
        for step in range(8):
            mine, planned = model(**call).sample, plain(**other).sample
            full = original(**call).sample
            if bound > 1 or step <= 3:
                assert torch.equal(mine, planned)
            else:
                torch.testing.assert_close(mine, full, rtol=1e-4, atol=1e-5)
            if step < 7:
                call, other = loop.send(mine), reference.send(planned)
    stats = model.report().runs[-1]
    assert stats.guarded == (4 if bound < 1 else None)
    planned = model.plan.macs_per_step
    expected = sum(planned[:4]) + 4 * model.plan.full_macs if bound < 1 else sum(planned)
    assert stats.macs == expected
    assert stats.followed == 7
    again = run.rollout(model)  # the next run begins with its plan
    assert torch.equal(again, run.rollout(model))
