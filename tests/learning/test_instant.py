"""Plans from recorded runs alone."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from conftest import TinyTransformer, ddim, tiny_dit, tiny_unet
from pipelines import PIPELINES, record

import fxmask
from fxmask.learning.effort import Limits
from fxmask.learning.instant.checks import fitted_checks, lanes_of
from fxmask.learning.instant.fitting import Placement, Rule, deviation_of, fitted, solve
from fxmask.learning.instant.moments import Moments, together
from fxmask.learning.instant.plans import InstantLearner, count_of_full_steps, keeper, replayed_errors
from fxmask.learning.instant.response import response_of
from fxmask.learning.outcome import Outcome


@pytest.fixture(scope="module")
def run() -> fxmask.Trajectory:
    """Of a sampler that is linear in the predictions: it does not clip."""
    return fxmask.record(tiny_unet(), ddim(clip_sample=False), num_inference_steps=10, batch_size=2)


def with_outputs(run: fxmask.Trajectory, step: int, change: torch.Tensor) -> list[torch.Tensor]:
    outputs = [x[0] for x in run.outputs]
    outputs[step] = outputs[step] + change
    return outputs


def final_of(run: fxmask.Sampler, outputs: list[torch.Tensor]) -> torch.Tensor:
    loop = run.loop()
    next(loop)
    try:
        for output in outputs:
            loop.send(output)
    except StopIteration as end:
        return end.value
    raise AssertionError


def test_the_response_of_a_sampler_is_what_a_change_of_one_prediction_makes(run: fxmask.Trajectory) -> None:
    response = response_of(run)
    for step in (0, 4, 9):
        change = 0.01 * torch.randn(run.outputs[step][0].shape, generator=torch.Generator().manual_seed(step))
        moved = final_of(run, with_outputs(run, step, change)) - run.final
        predicted = response.weights[step] * torch.einsum("rf,r...->f...", response.mixing, change.double())
        error = min((moved - sign * predicted).norm() / moved.norm() for sign in (1, -1))  # the weights have no sign
        assert error < 0.1


def test_guidance_is_found_in_the_response() -> None:
    _, _, trajectory = record("stable_diffusion")
    lanes = lanes_of(response_of(trajectory).mixing)
    assert lanes[1] / lanes[0] == pytest.approx(2.5 / -1.5, rel=0.02)


def test_rows_without_guidance_are_images(run: fxmask.Trajectory) -> None:
    assert len(lanes_of(response_of(run).mixing)) == 1
    assert lanes_of(torch.tensor([[0.5, 0.5], [0.0, 0.0]])) == (0.5,)
    assert lanes_of(torch.tensor([[1.5, 1.5], [-0.5, -0.5]])) == (1.5, -0.5)  # both lanes are sampled


def test_coefficients_are_the_least_squares(run: fxmask.Trajectory) -> None:
    moments = Moments.of(run)
    values = torch.stack([x[0].flatten().double() for x in run.outputs], dim=1)
    expected = torch.linalg.lstsq(values[:, [4, 2, 0]], values[:, 5]).solution
    found = torch.tensor(solve(moments.plain.numpy(), [4, 2, 0], 5, 0.0))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert solve(moments.plain.numpy(), [4, 2, 0], 5, 1e6).round(3).tolist() == [1.0, 0.0, 0.0]  # shrunk to plain reuse


def test_placement_is_the_best_of_all(run: fxmask.Trajectory) -> None:
    """Against every choice, by the errors that dynamic programming adds up."""
    import itertools

    moments, rule = Moments.of(run), Rule(1)  # one source: nothing has to be assumed of a third
    placement = Placement(moments, rule)

    def cost(computed: tuple[int, ...]) -> float:
        total, costs = 0.0, placement._costs
        known = [10, *computed, 10]
        for p, j, k in zip(known, known[1:], known[2:], strict=False):
            total += float(costs[p, j, k])
        return total

    best = min(((0, *rest) for rest in itertools.combinations(range(1, 10), 3)), key=cost)
    assert placement.best(4) == list(best)
    assert placement.best(1) == [0]
    assert placement.best(10) == list(range(10))


def test_errors_of_neighbouring_steps_are_added_before_they_are_squared(run: fxmask.Trajectory) -> None:
    moments, rule = Moments.of(run), Rule(1)
    costs = Placement(moments, rule)._costs
    for j, k in ((0, 4), (3, 7), (6, 10)):
        formed = range(j + 1, k)
        terms = {i: x for i, x in fitted(moments, rule, sorted(set(range(10)) - set(formed))).items() if i in formed}
        p = 10 if j == 0 else j - 1
        error = moments.error(deviation_of(moments, terms)) * moments.scale
        assert float(costs[p, j, k]) == pytest.approx(error, rel=1e-6)


def test_plans_keep_to_what_was_asked(run: fxmask.Trajectory) -> None:
    learner = InstantLearner([run])
    for count in (1, 2, 5, 9, 10):
        plan = learner.plans(count)[0]
        assert len(plan.computed) == count
        assert plan.computed[0] == 0
        assert set(plan.terms) == set(range(10)) - set(plan.computed)
    assert learner.plans(10)[0].error == 0.0
    assert count_of_full_steps(10, 0.5, 0.0) == 5
    assert count_of_full_steps(20, 1 / 1.5, 0.01) == 13
    with pytest.raises(fxmask.OutcomeError, match="out of reach: when only the first of 10 steps"):
        count_of_full_steps(10, 0.05, 0.0)


def test_an_error_is_kept_by_the_estimate(run: fxmask.Trajectory) -> None:
    learner = InstantLearner([run])
    errors = [learner.plans(count)[0].error for count in (3, 6, 9)]
    bound = math.sqrt(errors[0] * errors[1])
    plan = learner.best(Outcome(max_error=bound), 0.0)
    assert plan.error <= bound
    assert len(plan.computed) <= 6


def test_limits_are_kept(run: fxmask.Trajectory) -> None:
    program = fxmask.capture(tiny_unet(), run.calls[0][0])
    for graphs in (2, 3):
        mask = fxmask.learn(program, run, effort="instant", speedup=2.0, max_graphs=graphs, progress=False)
        assert fxmask.rectify(program, mask).distinct_graphs <= graphs
    assert keeper(program, run, Limits()) is None
    with pytest.raises(fxmask.OutcomeError, match="allow more graphs or cache"):
        fxmask.learn(program, run, effort="instant", speedup=2.0, max_graphs=1, progress=False)


def test_estimates_are_near_what_really_comes_out(run: fxmask.Trajectory) -> None:
    program = fxmask.capture(tiny_unet(), run.calls[0][0])
    learner = InstantLearner([run])
    plan = learner.plans(5)[0]
    model = fxmask.compile(program, fxmask.rectify(program, plan.mask(program, run, None)), backend="eager")
    fresh = fxmask.record(tiny_unet(), ddim(clip_sample=False), num_inference_steps=10, batch_size=4, seed=5)
    error = (fresh.rollout(model) - fresh.final).square().mean().sqrt() / fresh.final.square().mean().sqrt()
    assert 0.2 < plan.error / float(error) < 5


def test_replayed_errors_are_those_of_formed_predictions(run: fxmask.Trajectory) -> None:
    moments = Moments.of(run)
    terms = fitted(moments, Rule(2), [0, 1, 2, 3, 5, 6, 7, 8, 9])
    quadratic = moments.error(deviation_of(moments, terms))
    replays = float(replayed_errors(run, terms).mean())
    assert replays == pytest.approx(quadratic, rel=0.2)


def test_several_runs_are_judged_on_those_that_were_not_fitted() -> None:
    runs = [fxmask.record(tiny_unet(), ddim(), num_inference_steps=8, batch_size=1, seed=s) for s in range(3)]
    alone, three = InstantLearner(runs[:1]).plans(4)[0], InstantLearner(runs).plans(4)[0]
    assert math.isfinite(three.decibels)
    assert alone.terms != three.terms
    moments = [Moments.of(run) for run in runs]
    latest = together(moments, 0.5)
    shares = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64) / 1.75
    expected = sum(s * m.plain / m.scale for s, m in zip(shares, moments, strict=True))
    torch.testing.assert_close(latest.plain, expected)
    torch.testing.assert_close(latest.weights, sum(s * m.weights for s, m in zip(shares, moments, strict=True)))
    with pytest.raises(fxmask.InputError, match="different timesteps"):
        InstantLearner([runs[0], fxmask.record(tiny_unet(), ddim(), num_inference_steps=6, batch_size=1)])


def test_a_stochastic_run_reads_noisy_samples() -> None:
    run = fxmask.record(tiny_unet(), ddim(), num_inference_steps=10, batch_size=2, step_kwargs={"eta": 1.0})
    plan = InstantLearner([run]).plans(5)[0]
    assert plan.rule.samples == 2
    names = {
        source[0] for terms in plan.coefficients("output", 10).values() for source, _ in terms if isinstance(source, tuple)
    }
    assert names == {"input"}


def test_guidance_that_stops_midway_is_refused(run: fxmask.Trajectory) -> None:
    outputs = (*run.outputs[:5], *((x[0][:1],) for x in run.outputs[5:]))
    with pytest.raises(fxmask.InputError, match="at step 5 have shapes"):
        InstantLearner([dataclasses.replace(run, outputs=outputs)])


def test_checks_are_expected_to_be_what_they_were(run: fxmask.Trajectory) -> None:
    learner = InstantLearner([run])
    plan = learner.plans(6)[0]
    checks = fitted_checks(learner, plan)
    assert sum(check.share for check in checks) == pytest.approx(1.0)
    values = [x[0].double() for x in run.outputs]
    for check in checks:
        assert check.step in plan.computed
        assert set(check.sources) <= set(plan.computed)
        difference = values[check.step] - sum(c * values[j] for j, c in zip(check.sources, check.coefficients, strict=True))
        mixed = torch.einsum("rf,r...->f...", response_of(run).mixing, difference)
        assert float(mixed.square().mean().sqrt()) == pytest.approx(check.expected, rel=1e-3)


def test_effort_instant_is_the_default_and_takes_one_run() -> None:
    calls = 0
    model = tiny_dit()

    def labels(batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        return {"class_labels": torch.randint(0, 10, (batch_size,), generator=generator)}

    accelerated = fxmask.accelerate(
        model, ddim(), num_inference_steps=8, example_inputs=labels, backend="eager", progress=False
    )
    assert calls == 1  # one recorded run
    assert accelerated.plan.mac_ratio == pytest.approx(2.0, rel=0.05)
    assert accelerated.report().error > 0
    assert accelerated.improve("instant")
    run = fxmask.record(model, ddim(), num_inference_steps=8, batch_size=2, example_inputs=labels, seed=9)
    run.rollout(accelerated)
    assert accelerated.report().runs[-1].followed == 7


@pytest.mark.parametrize("name", ["dit", "pixart", "flux", "heun", "control_net"])
def test_pipelines_of_many_kinds_are_planned(name: str) -> None:
    assert name in PIPELINES
    _, _, trajectory = record(name)
    plan = InstantLearner([trajectory]).plans(max(2, trajectory.num_steps // 2))[0]
    assert math.isfinite(plan.decibels)


def test_control_nets_do_not_run_for_every_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _, trajectory = record("control_net")
    counted = [0]
    forward = type(pipe.controlnet).forward

    def count(self: torch.nn.Module, *args: object, **kwargs: object) -> object:
        counted[0] += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe.controlnet), "forward", count)
    plan = InstantLearner([trajectory]).plans(2)[0]
    errors = replayed_errors(trajectory, plan.terms)
    one = counted[0]
    assert torch.equal(replayed_errors(trajectory, plan.terms), errors)
    assert counted[0] == one + 1  # once, for all its steps
    assert torch.equal(final_of(trajectory, [x[0] for x in trajectory.outputs]), trajectory.final)


class TwoOutputs(torch.nn.Module):
    """Its whole output is two values, of which one is no sample."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TinyTransformer()

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.inner(x, t)
        return y, y.mean()


def test_outputs_that_are_no_sample_read_none() -> None:
    example = {"x": torch.randn(8, 6, 4)}
    options = {"num_inference_steps": 6, "speedup": 1.5, "example_inputs": example, "backend": "eager", "progress": False}
    accelerated = fxmask.accelerate(TwoOutputs().eval(), ddim(), **options)
    assert accelerated.plan.mac_ratio == pytest.approx(1.5, rel=0.05)
    sources = [s for terms in accelerated.plan.source.forecast.terms.values() for s, _ in terms]
    assert all(isinstance(source, int) for source in sources)


def test_without_an_output_block_more_is_learned(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("fxmask.api.output_blocks", lambda program: ())
    example = {"x": torch.randn(8, 6, 4)}
    options = {"num_inference_steps": 6, "speedup": 1.5, "example_inputs": example, "backend": "eager", "progress": False}
    accelerated = fxmask.accelerate(TinyTransformer().eval(), ddim(), **options)
    assert "learning with effort='quick'" in caplog.text
    assert accelerated.report().error is None
