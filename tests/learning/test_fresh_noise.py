"""With injected noise plans are judged on noise that nobody has seen, and what was fitted too closely is not handed out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import ddim, labels, tiny_dit

import fxmask
from fxmask.errors import InputError
from fxmask.learning import fresh_noise
from fxmask.learning.effort import EFFORTS, Effort, Limits
from fxmask.learning.fresh_noise import MOST, FreshNoise
from fxmask.learning.levels import evenly
from fxmask.learning.search import Search
from fxmask.sampling.trajectory import Trajectory

SMALL = Effort(units=20, kinds=1, starts=0, levels=0, search=0.0, rounds=1, finalists=1, fresh=6.0)
OPTIONS = {"num_inference_steps": 6, "batch_size": 8, "example_inputs": labels}


@pytest.fixture(scope="module")
def recorded():
    model = tiny_dit()
    runs = [fxmask.record(model, ddim(), step_kwargs={"eta": 1.0}, seed=seed, **OPTIONS) for seed in range(3)]
    return fxmask.capture(model, runs[0].calls[0][0]), runs


def search_of(recorded, effort=SMALL, **options) -> Search:
    program, runs = recorded
    return Search(program, runs, effort=effort, limits=Limits(), seed=0, progress=False, **options)


def candidates_of(search):
    """A plan, and the same with coefficients that are wrong, which the learned images are said to like."""
    good = search.measured.evaluate(evenly(search.student, search.levels[0], 0.5))
    wrong = {key: tuple((s, 3 * c) for s, c in terms) for key, terms in good.coefficients.items()}
    return [replace(good, coefficients=wrong, score=good.score - 20), good]


@pytest.fixture
def renoised(monkeypatch):
    """Seeds of the noise that is recorded."""
    seeds = []
    usual = Trajectory.renoised
    monkeypatch.setattr(Trajectory, "renoised", lambda self, model, seed: seeds.append(seed) or usual(self, model, seed))
    return seeds


def test_the_plan_that_is_better_on_fresh_noise_is_taken(recorded, renoised):
    search = search_of(recorded)
    wrong, good = candidates_of(search)
    before = search.measured.units
    assert search._best_of_many([good, wrong], 0.0)[0] is good
    assert renoised, "on noise of its own"
    assert len(renoised) == 1, "what is clearly behind is rolled out once"
    share = 8 / 16  # of the images that are learned from in a batch
    spent = search.student.spent(good.schedule)
    assert search.measured.units - before == pytest.approx(share * (1 + 2 * spent) + 2 * share * spent, rel=0.02), "and judged"


def test_batches_end_with_the_units(recorded, renoised):
    search = search_of(recorded)
    _, good = candidates_of(search)
    twin = replace(good, coefficients={key: tuple((s, 1.0001 * c) for s, c in t) for key, t in good.coefficients.items()})
    search._best_of_many([good, twin], 0.0)
    assert 3 <= len(renoised) < MOST
    assert len(set(renoised)) == len(renoised)


def test_a_checkpoint_keeps_it(recorded, renoised, tmp_path):
    def choose():
        search = search_of(recorded, checkpoint=tmp_path / "journal.json")
        candidates = candidates_of(search)
        for candidate in candidates:
            search.measured.judged(candidate)
        before = search.measured.units
        return search._fresh.best(candidates, SMALL.fresh).coefficients, search.measured.units - before

    first = choose()
    assert renoised
    renoised.clear()
    again = choose()
    assert not renoised, "nothing is recorded or rolled out again"
    assert first[0] == again[0]
    assert first[1] == pytest.approx(again[1])


def test_what_is_read_from_a_checkpoint_counts_as_when_it_was_measured(recorded, tmp_path):
    def spent():
        search = search_of(recorded, checkpoint=tmp_path / "journal.json")
        good = candidates_of(search)[1]
        search.measured.judged(good)
        return search.measured.units

    assert spent() == pytest.approx(spent())


@pytest.mark.parametrize(("eta", "effort"), [(0.0, SMALL), (1.0, replace(SMALL, fresh=0.0)), (1.0, EFFORTS["quick"])])
def test_elsewhere_it_is_not(recorded, eta, effort):
    program, _ = recorded
    runs = [fxmask.record(program.model, ddim(), step_kwargs={"eta": eta}, seed=seed, **OPTIONS) for seed in range(3)]
    assert search_of((program, runs), effort)._fresh is None


@pytest.mark.parametrize("error", [InputError("nothing random"), torch.OutOfMemoryError("out of memory")])
def test_runs_that_cannot_be_recorded_again_are_judged_as_before(recorded, monkeypatch, caplog, error):
    def refuse(self, model, seed):
        raise error

    monkeypatch.setattr(Trajectory, "renoised", refuse)
    search = search_of(recorded)
    wrong, good = candidates_of(search)
    assert search._best_of_many([good, replace(wrong, score=good.score)], 0.0)[0] is good
    assert str(error) in caplog.text


def test_an_interruption_leaves_the_best_so_far(recorded, monkeypatch, caplog):
    search = search_of(recorded)
    wrong, good = candidates_of(search)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(FreshNoise, "best", interrupt)
    assert search._best_of_many([replace(wrong, score=good.score), good], 0.0)[0] is good
    assert "before plans were judged on fresh noise" in caplog.text


def test_default_effort_does_it(recorded, renoised):
    search = search_of(recorded)
    point = search.best(0.5)
    assert renoised
    assert point.units <= SMALL.units + SMALL.fresh + 4, "a batch that has begun is finished"
    assert fresh_noise.MOST > 1
    assert EFFORTS["default"].fresh
