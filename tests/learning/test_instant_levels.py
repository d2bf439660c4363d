"""Reused blocks instead of forecasts: what is measured of them, and which of the two is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import ddim, tiny_dit, tiny_unet

import fxmask
from fxmask.errors import OutcomeError
from fxmask.learning.instant.levels import ReuseErrors, ReusePlan, best_plan, probed, reuses_of, trial_of
from fxmask.learning.instant.plans import InstantLearner, InstantPlan, formed_share
from fxmask.learning.instant.response import gains_of, response_of
from fxmask.learning.outcome import Outcome
from fxmask.learning.student import tensors_of
from fxmask.passes.cut_graph import cut_graph
from fxmask.runtime.model import AcceleratedModel
from fxmask.runtime.trial import Findings
from fxmask.runtime.variants import Variants

STEPS = 10
HALF = Outcome(macs=0.5)


def noisy_run(model: torch.nn.Module, seed: int = 0) -> fxmask.Trajectory:
    labels = None if not hasattr(model, "transformer_blocks") else {"class_labels": torch.tensor([1, 2])}
    scheduler = ddim(clip_sample=False)
    kwargs = {"eta": 1.0}
    return fxmask.record(
        model, scheduler, num_inference_steps=STEPS, batch_size=2, seed=seed, step_kwargs=kwargs, example_inputs=labels
    )


@pytest.fixture(scope="module", params=[tiny_dit, tiny_unet])
def case(request: pytest.FixtureRequest) -> tuple[fxmask.Program, fxmask.Trajectory, InstantLearner]:
    model = request.param()
    run = noisy_run(model)
    program = fxmask.capture(model, run.calls[0][0])
    return program, run, InstantLearner([run], program)


def with_findings(program: fxmask.Program, mask: fxmask.Mask, trial: Any) -> tuple[AcceleratedModel, Findings]:
    plan, findings = fxmask.rectify(program, mask), Findings(trial)
    model = AcceleratedModel(program, plan, "eager")
    model.adopt(Variants(program, plan, "eager", None, findings=findings))
    return model, findings


def test_a_trial_makes_what_the_plan_makes(case: Any) -> None:
    program, run, learner = case
    plan = learner.best(HALF, formed_share(program))
    mask, trial = trial_of(program, learner, plan, reuses_of(program, HALF))
    model, findings = with_findings(program, mask, trial)
    plain = fxmask.compile(program, fxmask.rectify(program, plan.mask(program, run, None)), backend="eager")
    assert torch.equal(run.rollout(model), run.rollout(plain))
    found = findings.read()
    assert set(found) == {"output", *trial.levels}
    assert all(set(steps) == set(plan.computed[1:]) for steps in found.values())


@torch.no_grad()
def test_what_a_trial_finds_is_the_error_of_reuse(case: Any) -> None:
    """At steps before the first formed one, where the run is the recorded one."""
    program, run, learner = case
    computed = (*range(5), 6, 8)
    terms = {i: ([j := max(k for k in computed if k < i)], [1.0]) for i in range(STEPS) if i not in computed}
    assert j == 8
    plan = InstantPlan(computed, learner.rules()[0], terms, placed=False)
    reuses = reuses_of(program, HALF)
    mask, trial = trial_of(program, learner, plan, reuses)
    model, findings = with_findings(program, mask, trial)
    run.rollout(model)
    for reuse in (r for r in reuses if r.name in trial.levels):
        whole, cut = cut_graph(program, frozenset(), sorted(reuse.loads)), cut_graph(program, reuse.loads, ())
        results = whole(tensors_of(program, run.calls[2][0]), [])
        values = dict(zip(whole.store, results[whole.num_outputs :], strict=True))
        made = cut(tensors_of(program, run.calls[3][0]), [values[key] for key in cut.load])[0]
        expected = float((made - run.outputs[3][0])[:, : run.final.shape[1]].square().mean())
        assert findings.read()[reuse.name][3] == pytest.approx(expected * learner_scale(learner), rel=1e-3)


def learner_scale(learner: InstantLearner) -> float:
    """Rows are combined by unit vectors here: one lane."""
    return sum(x * x for x in trial_lanes(learner))


def trial_lanes(learner: InstantLearner) -> tuple[float, ...]:
    from fxmask.learning.instant.checks import lanes_of

    return lanes_of(learner.responses[-1].mixing)


def test_the_better_one_is_taken(case: Any) -> None:
    program, run, learner = case
    share, reuses = formed_share(program), reuses_of(program, HALF)
    plan = learner.best(HALF, share)
    squares = probed(program, learner, plan, reuses)
    assert set(squares) == {r.name for r in reuses}
    scaled = {f: {n: {k: f * v for k, v in found.items()} for n, found in squares.items()} for f in (1e-6, 1e6)}
    kinds = {f: best_plan(learner, HALF, share, reuses, ReuseErrors(learner, s, fresh=False)) for f, s in scaled.items()}
    reused, formed = kinds[1e-6], kinds[1e6]
    assert isinstance(reused, ReusePlan)
    assert reused.error < formed.error
    assert formed.computed == plan.computed
    assert isinstance(formed, InstantPlan)
    found = fxmask.rectify(program, reused.mask(program, run, None))
    assert found.mac_ratio >= 2.0 * 0.98
    assert set(found.mask.blocks) == reused.reuse.loads
    assert reused.as_forecasts(learner.moments).computed == reused.computed


def test_a_bound_of_the_error_takes_what_costs_less(case: Any) -> None:
    program, _, learner = case
    share = formed_share(program)
    bound = Outcome(max_error=learner.plans(6)[0].error)
    reuses = reuses_of(program, bound)
    plain = learner.best(bound, share)
    squares = {
        n: dict.fromkeys(found, 1e-12) for n, found in probed(program, learner, learner.best(HALF, share), reuses).items()
    }
    plan = best_plan(learner, bound, share, reuses, ReuseErrors(learner, squares, fresh=False))
    assert isinstance(plan, ReusePlan)
    assert plan.error <= bound.max_error
    assert len(plan.computed) < len(plain.computed)


def test_limits_hold_for_reuse(case: Any) -> None:
    program, _, learner = case
    share, reuses = formed_share(program), reuses_of(program, HALF)
    errors = ReuseErrors(learner, probed(program, learner, learner.best(HALF, share), reuses), fresh=False)
    with pytest.raises(OutcomeError):
        best_plan(learner, HALF, share, reuses, errors, keeps=lambda _: False)
    plan = best_plan(learner, HALF, share, reuses, errors, keeps=lambda p: isinstance(p, ReusePlan))
    assert isinstance(plan, ReusePlan)


def test_learning_with_injected_noise_takes_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxmask.learning.instant import levels

    model = tiny_dit()
    run = noisy_run(model)
    program = fxmask.capture(model, run.calls[0][0])
    calls = [0]
    real = levels.cut_graph

    def counted(program: Any, loads: frozenset[str], live_out: Any) -> Any:
        graph = real(program, loads, live_out)

        def call(*args: Any) -> Any:
            calls[0] += not loads
            return graph(*args)

        return Counting(graph, call)

    monkeypatch.setattr(levels, "cut_graph", counted)
    mask = fxmask.learn(program, run, effort="instant", speedup=2.0, progress=False)
    assert 0 < calls[0] <= levels.PROBED
    assert fxmask.rectify(program, mask).mac_ratio >= 2.0 * 0.98
    calls[0] = 0
    still = fxmask.record(
        model, ddim(), num_inference_steps=STEPS, batch_size=2, example_inputs={"class_labels": torch.tensor([1, 2])}
    )
    fxmask.learn(program, still, effort="instant", speedup=2.0, progress=False)
    assert calls[0] == 0  # nothing is injected


class Counting:
    """A graph whose calls are counted."""

    def __init__(self, graph: Any, call: Any) -> None:
        self._graph, self._call = graph, call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._graph, name)


def test_a_denoiser_that_follows_its_sample_makes_up_for_early_errors() -> None:
    run = noisy_run(tiny_unet())
    gains = gains_of(run)
    assert len(gains) == STEPS
    first = run.calls[0][0]["sample"].double().flatten(), run.outputs[0][0].double().flatten()
    assert gains[0] == pytest.approx(float(first[0] @ first[1] / first[0].square().sum()), rel=1e-6)
    follows = response_of(run, gains=[0.8] * STEPS).weights
    stays = response_of(run).weights
    assert float(follows[0] / follows[-2]) < 0.5 * float(stays[0] / stays[-2])
