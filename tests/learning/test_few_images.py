"""Plans of recorded runs alone in the search, and few images: what is handed out is no worse than either."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from conftest import ddim, labels, tiny_dit, tiny_unet
from pipelines import digits, generator

import fxmask
from fxmask.learning import own_rows
from fxmask.learning.effort import EFFORTS, Effort, Limits
from fxmask.learning.instant.plans import InstantLearner, formed_share
from fxmask.learning.outcome import Outcome
from fxmask.learning.recorded_plans import Fits, RecordedPlans, plans_from_data, plans_to_data
from fxmask.learning.schedule import Origin
from fxmask.learning.search import Search
from fxmask.learning.student import Student
from fxmask.metrics import psnr

SMALL = Effort(units=40, kinds=2, starts=3, levels=1, search=1.0, rounds=1, finalists=1)


@pytest.fixture(autouse=True)
def small_effort(monkeypatch):
    monkeypatch.setitem(EFFORTS, "default", SMALL)


def recorded(count, **options):
    model = tiny_dit()
    given = {"num_inference_steps": 8, "batch_size": 2, "example_inputs": labels, **options}
    runs = [fxmask.record(model, ddim(), seed=seed, **given) for seed in range(count)]
    return fxmask.capture(model, runs[0].calls[0][0]), runs


@pytest.fixture(scope="module")
def dit():
    return recorded(4)


def search_of(program, runs, effort="quick", **options):
    return Search(program, runs, effort=EFFORTS[effort], limits=Limits(), seed=0, progress=False, **options)


def pool_of(search, budget):
    pool = []
    search._propose(pool, budget)
    return pool


@pytest.mark.parametrize("budget", [0.5, 0.66])
def test_instant_plans_are_candidates_at_the_budget(dit, budget):
    program, runs = dit
    search = search_of(program, runs)
    pool = pool_of(search, budget)
    instant = [c for c in pool if c.is_instant]
    assert instant
    assert instant[0] is pool[0]
    for candidate in instant:
        assert candidate.schedule.origin is Origin.INSTANT
        assert search.student.spent(candidate.schedule) == pytest.approx(budget, rel=0.03)
        fixed = search.student.readable(candidate.schedule, candidate.fits.learned)
        assert fixed.items() <= candidate.coefficients.items(), "what recorded runs give is not fitted again"
        assert set(candidate.coefficients) == {(i, b) for i, loads in enumerate(candidate.schedule.loads) for b in loads}
    plain = [c for c in pool if c.schedule.family == "output" and c.schedule.history == 1 and not c.is_instant]
    assert plain, "fewer steps of the same grid, the output held, are always among them"
    assert any(c.schedule.samples == 2 and c.schedule.origin is Origin.EVEN for c in pool), "samples are sources, too"


def test_an_instant_plan_is_what_instant_effort_makes(dit):
    program, runs = dit
    search = search_of(program, runs)
    (first, *_) = search.recorded.of_budget(0.5, formed_share(program), 1)
    plan = InstantLearner(runs).best(Outcome(speedup=2.0), formed_share(program))
    assert first[0].loads == plan.schedule("output", 8).loads
    assert first[1].everything == plan.coefficients("output", 8)
    assert first[1].learned != first[1].held_out


def test_plans_as_data(dit):
    program, runs = dit
    plans = RecordedPlans(program, runs[:2], runs[2:]).of_budget(0.6, 0.0, 3)
    again = plans_from_data(json.loads(json.dumps(plans_to_data(plans))))
    assert again == plans
    assert [s.origin for s, _ in again] == [s.origin for s, _ in plans]
    assert isinstance(again[0][1], Fits)


def test_a_denoiser_without_an_output_to_form_has_none(dit, monkeypatch):
    program, runs = dit
    blocks = tuple(block for block in program.blocks if block.kind != "output")
    assert RecordedPlans(dataclasses.replace(program, blocks=blocks), runs[:2], runs[2:]).of_budget(0.5, 0.0, 3) == []
    assert RecordedPlans(program, runs[:2], runs[2:]).of_budget(0.01, 0.0, 3) == [], "out of reach"


def test_few_images_are_halved_and_judge_by_turns(dit):
    program, runs = dit
    search = search_of(program, runs)
    assert search.few
    assert search.crossed
    assert (len(search.student.trajectories), len(search.judge.trajectories)) == (2, 2)
    candidate = next(c for c in pool_of(search, 0.5) if not c.is_instant and c.schedule.history == 3)
    images, other = search.measured.crossed(candidate)
    assert images[4:] == search.judge.decibels(search.judge.rollout(candidate.schedule, candidate.coefficients)).tolist()
    assert other == search.judge.rollout(candidate.schedule).coefficients
    assert images[:4] == search.student.decibels(search.student.rollout(candidate.schedule, other)).tolist()
    both = search.measured.of_both_folds(candidate, other, sum(images) / 8)
    key = max(both, key=lambda key: len(both[key]))
    values = [[c for _, c in terms[key]] for terms in (both, candidate.coefficients, other)]
    assert values[0] == pytest.approx([(a + b) / 2 for a, b in zip(*values[1:], strict=True)])
    assert search.measured.of_both_folds(candidate, other, -1000.0) == candidate.coefficients, "a mean that is bad is not taken"


def test_lanes_with_rows_of_their_own_are_judged_by_turns_too(monkeypatch):
    """They must be better by more than the standard error; coefficients are of both halves of the images."""
    monkeypatch.setattr(own_rows, "BEHIND", 1000.0)
    program, runs = recorded(
        2, guidance_scale=3.0, unconditional=lambda n, _: {"class_labels": torch.zeros(n, dtype=torch.long)}
    )
    search = search_of(program, runs)
    assert search.few
    assert search.apart is not None
    measured, real = search.apart.measured, search.apart.measured.crossed
    found = {}
    for lead in (-100.0, 0.1, 100.0):
        images = {}

        def crossed(candidate, lead=lead, images=images):
            images["apart"], other = [x - lead for x in alike(search)], real(candidate)[1]
            return images["apart"], other

        monkeypatch.setattr(measured, "crossed", crossed)
        found[lead] = search.best(0.6)
        assert len(images["apart"]) == 4
    assert [len(found[lead].mask.lanes) for lead in found] == [0, 0, 2]
    assert fxmask.rectify(program, found[100.0].mask).mac_ratio == pytest.approx(1 / 0.6, rel=0.03)
    assert found[100.0].decibels == pytest.approx(sum(alike(search)) / 4 - 100.0)


def alike(search):
    """Errors of the best plan without lanes, by image."""
    pool = pool_of(search, 0.6)
    chosen, _ = search._best_of_few(search._finalists(pool), 0.0)
    return search.measured.crossed(chosen)[0]


def test_one_run_and_many_images(dit):
    program, runs = dit
    one = search_of(program, runs[:1])
    assert (len(one.student.trajectories), len(one.judge.trajectories)) == (1, 1)
    assert not torch.equal(one.judge.trajectories[0].final, runs[0].final)
    many = search_of(*recorded(4, batch_size=4, example_inputs=lambda n, g: labels(4, g)))
    assert not many.few
    assert len(many.judge.trajectories) == 1


def test_the_error_is_of_images_that_had_no_part(dit):
    """The estimate beside a plan of few images agrees with fresh ones."""
    program, runs = dit
    point = search_of(program, runs).best(0.5)
    fresh = recorded(12)[1][4:]
    student = Student(program, fresh)
    accelerated = fxmask.compile(program, fxmask.rectify(program, point.mask), backend="eager")
    errors = torch.cat([t.rollout(accelerated) - t.final for t in fresh]).square().flatten(1).mean(1) / student.scale
    assert point.decibels == pytest.approx(float(10 * errors.log10().mean()), abs=2.0)
    assert point.error == pytest.approx(float(errors.mean().sqrt()), rel=0.4)
    assert point.fewer_steps is not None
    held = [t.with_steps(program.model, 4).final for t in runs]
    expected = torch.cat(held) - torch.cat([t.final for t in runs])
    scale = torch.cat([t.final for t in runs]).square().mean()
    assert point.fewer_steps == pytest.approx(
        float(10 * (expected.square().flatten(1).mean(1) / scale).log10().mean()), abs=0.5
    )


@pytest.mark.parametrize("effort", ["quick", "default"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_same_seed_same_mask(dit, effort, count):
    program, runs = dit
    a, b = (fxmask.learn(program, runs[:count], speedup=1.8, effort=effort, seed=3) for _ in range(2))
    assert a == b
    assert fxmask.rectify(program, a).mac_ratio == pytest.approx(1.8, rel=0.03)


def test_a_checkpoint_with_instant_plans_goes_on(dit, tmp_path, monkeypatch):
    program, runs = dit
    path = tmp_path / "learning.json"
    whole = fxmask.learn(program, runs, speedup=2.0, effort="quick")
    original, count = Student.rollout, 0

    def fail(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count == 5:
            raise RuntimeError("the machine went down")
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Student, "rollout", fail)
        with pytest.raises(RuntimeError, match="went down"):
            fxmask.learn(program, runs, speedup=2.0, effort="quick", checkpoint=path)
    assert fxmask.learn(program, runs, speedup=2.0, effort="quick", checkpoint=path) == whole
    for owner, name in ((Student, "rollout"), (Student, "score_of"), (InstantLearner, "__init__")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("measured again"))
    assert fxmask.learn(program, runs, speedup=2.0, effort="quick", checkpoint=path) == whole


def test_few_images_of_a_stochastic_sampler():
    model = tiny_unet()
    runs = [
        fxmask.record(model, ddim(), num_inference_steps=8, batch_size=2, step_kwargs={"eta": 1.0}, seed=seed)
        for seed in range(2)
    ]
    program = fxmask.capture(model, runs[0].calls[0][0])
    search = search_of(program, runs, "default")
    assert search.few
    assert not search.crossed
    point = search.best(0.6)
    assert point.mac_ratio == pytest.approx(1 / 0.6, rel=0.03)
    assert point.fewer_steps is None


def test_pipelines_are_compared_with_fewer_steps(monkeypatch, caplog):
    pipe, what = latent_unet()
    run = fxmask.record_pipeline(pipe, **what(1, 0), num_inference_steps=6, generator=generator())
    program = fxmask.capture(run.denoiser, run.calls[0][0], run.roles)
    point = search_of(program, [run]).best(0.5)
    assert point.fewer_steps is not None
    assert point.decibels < point.fewer_steps, "three steps of its own grid are worse"
    assert "num_inference_steps" not in caplog.text
    monkeypatch.setattr(Student, "score_of", lambda self, others: -1000.0)
    assert search_of(program, [run]).best(0.5).fewer_steps == -1000.0
    assert "num_inference_steps=3" in caplog.text


def latent_unet():
    pipe = digits().load_pipeline("ldm")
    pipe.set_progress_bar_config(disable=True)
    captions = [c for d in range(10) for c in digits().captions_of(d)]

    def what(count, seed):
        prompts = [captions[(31 * seed + 7 * i) % len(captions)] for i in range(count)]
        return {"prompt": prompts, "guidance_scale": 4.0, "output_type": "latent"}

    return pipe, what


@pytest.mark.slow
@pytest.mark.parametrize("images", [1, 2, 4])
def test_quick_effort_is_not_worse_than_an_instant_plan(images):
    """On fresh noise and other prompts, on the shipped latent U-Net."""
    pipe, what = latent_unet()

    def run_of(count, seed):
        return fxmask.record_pipeline(pipe, **what(count, seed), num_inference_steps=10, generator=generator(seed))

    runs, fresh = [run_of(1, seed) for seed in range(images)], [run_of(16, 1000)]
    program = fxmask.capture(runs[0].denoiser, runs[0].calls[0][0], runs[0].roles)
    instant = InstantLearner(runs).best(Outcome(speedup=2.0), formed_share(program)).mask(program, runs[0], None)
    quality = []
    for mask in (instant, fxmask.learn(program, runs, speedup=2.0, effort="quick")):
        accelerated = fxmask.compile(program, fxmask.rectify(program, mask), backend="eager")
        quality.append(float(torch.cat([psnr(t.rollout(accelerated), t.final) for t in fresh]).mean()))
    assert quality[1] >= quality[0] - 0.5
