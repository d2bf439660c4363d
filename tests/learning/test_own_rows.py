"""Plans in which the lanes of guidance have rows of their own: what is scored is what runs, in one batch and call by call."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import record

import fxmask
from fxmask.learning.candidate import Candidate
from fxmask.learning.effort import Effort, Limits
from fxmask.learning.journal import Journal
from fxmask.learning.lane_moments import LaneMoments, indices, shares
from fxmask.learning.local_search import neighbour
from fxmask.learning.measured import Measured
from fxmask.learning.own_rows import OwnRows, attention_branches, views_of
from fxmask.learning.progress import Progress
from fxmask.learning.refine import refine
from fxmask.learning.schedule import Schedule, difference_held, lane_sources
from fxmask.learning.search import Search
from fxmask.learning.student import Student, output_blocks

SMALL = Effort(units=8.0, kinds=1, starts=0, levels=0, search=0.0, rounds=1, finalists=1, instant=1, lanes=12.0)


@pytest.fixture(scope="module", params=["stable_diffusion", "wan", "edited_image"])
def guided(request: pytest.FixtureRequest) -> tuple[fxmask.Program, Any]:
    """A program and a recorded run: guidance in one batch, in calls with names, and of three lanes, two with an image."""
    _, _, run = record(request.param)
    return fxmask.capture(run.denoiser, run.calls[0][0], roles=run.roles), run


@pytest.fixture(scope="module")
def apart(guided: tuple[fxmask.Program, Any]) -> OwnRows:
    program, run = guided
    views = views_of([run], program)
    assert views is not None
    count = len(run.calls[0]) if len(run.calls[0]) > 1 else len(run.calls[0][0][run.sample]) // run.batch_size
    assert {len(step) for step in views[0].calls} == {count}
    student = Student(program, views)
    measured = Measured(student, student, Journal(None, ""), Progress(False), starts=0, seed=0)
    return OwnRows(measured, Limits(), 0)


def some_schedule(student: Student) -> Schedule:
    output = frozenset(block.name for block in output_blocks(student.program))
    lanes = len(student.trajectories[0].calls[0])
    rows = [(step, 2 + lane % 2) for step in range(student.num_steps) for lane in range(lanes)]
    loads = [output if step and step % every else frozenset() for step, every in rows]
    return Schedule(tuple(loads), history=3, samples=2, lanes=lanes)


def test_what_is_scored_is_what_runs(guided: tuple[fxmask.Program, Any], apart: OwnRows) -> None:
    program, run = guided
    student = apart.student
    schedule = some_schedule(student)
    rolled = student.rollout(schedule)
    mask = student.mask(schedule, rolled.coefficients)
    assert len(mask.lanes) == schedule.lanes
    assert mask.batched == (len(run.calls[0]) == 1)
    plan = fxmask.rectify(program, mask)
    assert plan.mac_ratio == pytest.approx(1 / student.spent(schedule), rel=1e-6)
    accelerated = fxmask.compile(program, plan, backend="eager")
    assert torch.allclose(run.rollout(accelerated), rolled.finals[0], rtol=1e-3, atol=1e-4)
    assert all(r.followed for r in accelerated.report().runs)


def test_names_are_the_pipelines(guided: tuple[fxmask.Program, Any], apart: OwnRows) -> None:
    _, run = guided
    named = run.lanes[0] if len(run.calls[0]) == 2 else None
    assert apart.student.lane_names == (named or {2: ("1", "0"), 3: ("0", "1", "2")}[apart.lanes])


def test_the_part_that_guidance_weighs_most_is_called_first(guided: tuple[fxmask.Program, Any], apart: OwnRows) -> None:
    """The conditional one, wherever it is in the batch; calls that the pipeline makes one by one stay in their order."""
    _, run = guided
    view = apart.student.trajectories[0]
    weights = [abs(share) for share in shares(view)]
    if len(run.calls[0]) > 1:
        assert view is run
        return
    assert weights == sorted(weights, reverse=True)
    parts = apart.view_of(run).calls[0]
    for k, part in enumerate(view.turns or range(apart.lanes)):
        for name, whole in run.calls[0][0].items():
            if isinstance(whole, torch.Tensor) and whole.dim() and len(whole) == len(run.calls[0][0][run.sample]):
                assert torch.equal(parts[k][name], whole.chunk(apart.lanes)[part]), name
                assert torch.equal(view.outputs[0][k], run.outputs[0][0].chunk(apart.lanes)[part])
    assert torch.allclose(view.rollout(run.denoiser), run.rollout(run.denoiser), atol=1e-4)


def test_refinement_follows_lanes(apart: OwnRows) -> None:
    """Derivatives by partial rollouts are those of whole ones, and a round of refinement is no worse."""
    student = apart.student
    schedule = some_schedule(student)
    base = student.rollout(schedule, keep=True)
    for state in student.states(schedule, base, [1, 2], [0]):
        again = student.rollout(schedule, base.coefficients, state)
        assert torch.equal(again.finals[0], base.finals[0])
    refined, score = refine(student, schedule, base.coefficients, rounds=1)
    assert score <= student.score(base)
    assert student.score(student.rollout(schedule, refined)) == pytest.approx(score, abs=1e-6)


def test_what_a_forecast_reads() -> None:
    on = [True, True, True, False, False, True, True]
    #     0a    1b    2a    3b     4a     5b    6a
    assert lane_sources(on, 4, 2, 3, 0) == [2, 0]
    assert lane_sources(on, 7, 2, 3, 2) == [5, 1, 6, 0, ("input", 7), ("input", 5)]  # of a: now, and where both were
    assert lane_sources(on, 3, 2, 1, 1) == [1, 2, 0, ("input", 3)]
    assert lane_sources([True], 1, 2, 3, 0) == [0]  # nothing of its own yet
    #     0a    1b    2a    3b     4a    5b
    on = [True, True, True, False, True, False]
    assert lane_sources([*on, False], 7, 2, 3, 0) == [1, 4, 0]  # of a: the latest, though not of this step, and where both were
    assert lane_sources([True, True, False, True], 4, 2, 3, 0) == [0, 3, 1]  # of a lane that comes later in a step
    three = [True, True, True, True]
    assert lane_sources([*three, False], 5, 3, 2, 0) == [2, 3, 0]
    assert lane_sources([*three, True], 5, 3, 1, 0) == [2, 3, 0, 4, 1]


def test_a_difference_is_held() -> None:
    """A lane's latest value and what the others have changed by since, their mean if there are several."""

    def held(on: list[bool], lanes: int) -> dict[Any, float]:
        return dict(difference_held(lane_sources(on, len(on), lanes, 1, 0), len(on), lanes))

    assert held([True, True, True], 2) == {1: 1.0, 2: 1.0, 0: -1.0}
    assert held([True, True, False], 2) == {1: 1.0}
    assert held([True], 2) == {0: 1.0}
    assert held([True, True, True, True, True], 3) == {2: 1.0, 3: 0.5, 0: -0.5, 4: 0.5, 1: -0.5}
    assert dict(difference_held([5, 3, ("input", 6)], 6, 2)) == {5: 1.0, 3: 0.0, ("input", 6): 0.0}
    assert indices([5, ("input", 7)], 8, 2) == [5, 11]


def test_moments_are_of_calls() -> None:
    """One lane formed from the other's exact copy costs nothing; from what has nothing to do with it everything."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=(4, 1000))
    values = np.concatenate([values[:1], values[:1], values[1:2], values[1:2], values[2:]])  # both lanes are alike; two samples
    moments = LaneMoments(2, values @ values.T / 1000, np.asarray([-3.0, 4.0, -3.0, 4.0]))
    copied = moments.error((True, True, True, False), lambda rows, row: [2])
    other = moments.error((True, True, True, False), lambda rows, row: [1])
    assert copied == pytest.approx(0.0, abs=1e-3)
    assert other > 10.0
    error, rows = moments.improved((True, True, False, True), lambda rows, row: [row - 1], 0, tries=50)
    assert rows in ((True, True, True, False), (True, False, True, True))
    assert error == pytest.approx(0.0, abs=1e-3)


def test_both_lanes_of_guidance_weigh_what_guidance_makes_of_them(apart: OwnRows) -> None:
    moments = apart.moments
    first, second = moments.weights[0 :: apart.lanes], moments.weights[1 :: apart.lanes]
    assert np.all(np.sign(first) == -np.sign(second)), "a conditional prediction is added, the unconditional one taken away"


def test_a_plan_for_a_budget(guided: tuple[fxmask.Program, Any], apart: OwnRows) -> None:
    program, _ = guided
    schedule = Schedule(tuple(frozenset() if k % 2 == 0 else apart._output for k in range(apart.student.num_steps)), 3, 0)
    budget = {2: 0.625, 3: 0.67}[apart.lanes]  # five calls of eight, or eight of twelve
    found = apart.best(budget, [Candidate(schedule, {}, 100.0)], SMALL, 12.0)
    assert found is not None
    assert math.isfinite(apart.measured.judged(found)[0])
    mask = apart.student.mask(found.schedule, found.coefficients)
    assert fxmask.rectify(program, mask).mac_ratio == pytest.approx(1 / budget, rel=0.03)


def test_what_is_far_behind_is_not_refined(guided: tuple[fxmask.Program, Any], apart: OwnRows) -> None:
    """Compared are plans that nothing was refined of; of a refined one that is far ahead nothing follows."""
    schedule = Schedule(tuple(frozenset() if k % 2 == 0 else apart._output for k in range(apart.student.num_steps)), 3, 0)
    budget = {2: 0.625, 3: 0.67}[apart.lanes]
    ahead = Candidate(schedule, {}, -200.0)
    before = apart.measured.units
    assert apart.best(budget, [ahead, replace(ahead, score=100.0, rounds=1)], SMALL, 12.0) is None
    assert apart.measured.units - before <= SMALL.lanes / 2 + 1
    assert apart.best(budget, [replace(ahead, rounds=1), replace(ahead, score=100.0)], SMALL, 12.0) is not None


def test_lanes_that_share_attention_pay_for_a_step_more() -> None:
    """At some steps one lane's attention serves both; what is scored is what runs."""
    _, _, run = record("wan", num_inference_steps=8)
    program = fxmask.capture(run.denoiser, run.calls[0][0], roles=run.roles)
    student = Student(program, [run])
    rows = OwnRows(Measured(student, student, Journal(None, ""), Progress(False), starts=0, seed=0), Limits(), 0)
    shared = attention_branches(program)
    assert {name.rpartition(".")[2] for name in shared} == {"attn1", "attn2"}
    base = Schedule(tuple(frozenset() if step % 2 == 0 else rows._output for step in range(8)), 3, 0)
    found = list(rows._sharing(student.spent(base), base))
    assert found
    for schedule in found:
        assert student.spent(schedule) == pytest.approx(student.spent(base), rel=0.03)
        assert sum(schedule.loads[k] == frozenset() for k in range(0, 16, 2)) == 5, "one more than before"
        assert shared in schedule.loads[1::2]
        assert shared not in schedule.loads[0::2]
        rolled = student.rollout(schedule)
        read = {(row, source) for (row, name), terms in rolled.coefficients.items() if name in shared for source, _ in terms}
        assert any(source == row - 1 for row, source in read)
        plan = fxmask.rectify(program, student.mask(schedule, rolled.coefficients))
        accelerated = fxmask.compile(program, plan, backend="eager")
        assert torch.allclose(run.rollout(accelerated), rolled.finals[0], rtol=1e-3, atol=1e-4)


def test_neighbours_keep_lanes(apart: OwnRows) -> None:
    import random

    found = [neighbour(some_schedule(apart.student), random.Random(seed)) for seed in range(40)]
    assert {s.lanes for s in found if s is not None} == {apart.lanes}
    assert len({s.loads for s in found if s is not None}) > 5


@pytest.mark.parametrize("lanes", ["own", "alike"])
def test_search_takes_them_where_they_are_better(lanes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of enough images; turned off, none is tried."""
    _, _, run = record("stable_diffusion")
    runs = [run, *(run.renoised(run.denoiser, seed) for seed in range(7))]
    program = fxmask.capture(run.denoiser, run.calls[0][0], roles=run.roles)
    search = Search(program, runs, effort=SMALL, limits=Limits(), seed=0, progress=False, lanes=lanes)
    assert (search.apart is not None) == (lanes == "own")
    point = search.best(0.6)
    assert point.decibels <= search.measured.judged(search.measured.evaluate(search_schedule(search)))[0] + 1e-6
    assert fxmask.rectify(program, point.mask).mac_ratio == pytest.approx(1 / 0.6, rel=0.03)
    if lanes == "own":
        monkeypatch.setattr(type(search.apart), "best", lambda self, *args, **more: None)
        alike = search.best(0.6)
        assert not alike.mask.lanes
        assert point.decibels <= alike.decibels


def search_schedule(search: Search) -> Schedule:
    """Full steps at equal distances, for the same budget."""
    from fxmask.learning.levels import evenly

    found = evenly(search.student, search.levels[0], 0.6)
    assert found is not None
    return found
