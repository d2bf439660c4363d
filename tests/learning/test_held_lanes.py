"""Where noise is injected, steps that compute one lane of guidance and hold the difference to the others."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import ddim, labels, tiny_dit

import fxmask
from fxmask.learning.candidate import Candidate
from fxmask.learning.effort import Effort, Limits
from fxmask.learning.fresh_noise import FreshNoise
from fxmask.learning.held_lanes import HeldLanes
from fxmask.learning.levels import Level
from fxmask.learning.runs import measure_runs
from fxmask.learning.schedule import Schedule
from fxmask.learning.search import Search
from fxmask.sampling.split_lanes import SplitLanes

SMALL = Effort(units=20.0, kinds=1, starts=3, levels=1, search=0.0, rounds=1, finalists=1, instant=1, lanes=40.0, fresh=4.0)
QUICK = replace(SMALL, starts=0, levels=0, fresh=0.0)
STEPS = 8


def runs_at(guidance: float, count: int = 3, **options: Any) -> list[fxmask.Trajectory]:
    model = tiny_dit()
    given: dict[str, Any] = {"num_inference_steps": STEPS, "batch_size": 8, "example_inputs": labels, **options}
    return [
        fxmask.record(
            model,
            ddim(clip_sample=False),
            guidance_scale=guidance,
            unconditional=lambda n, _: {"class_labels": torch.full((n,), 1000)},
            step_kwargs={"eta": 1.0},
            seed=seed,
            **given,
        )
        for seed in range(count)
    ]


def search_of(runs: list[fxmask.Trajectory], effort: Effort = SMALL, **options: Any) -> Search:
    program = fxmask.capture(tiny_dit(), runs[0].calls[0][0])
    return Search(program, runs, effort=effort, limits=Limits(), seed=0, progress=False, **options)


@pytest.fixture(scope="module")
def search() -> Search:
    return search_of(runs_at(1.5))


@pytest.fixture(scope="module")
def held(search: Search) -> HeldLanes:
    assert isinstance(search.apart, HeldLanes)
    return search.apart


def branches_of(held: HeldLanes) -> frozenset[str]:
    return frozenset(block.name for block in held.student.program.branches)


def some_schedule(held: HeldLanes, pattern: str) -> Schedule:
    """``#`` all lanes compute, ``+`` the first one only, ``.`` none."""
    blocks = branches_of(held)
    of_step = {"#": (frozenset(), frozenset()), "+": (frozenset(), blocks), ".": (blocks, blocks)}
    return Schedule(tuple(row for step in pattern for row in of_step[step]), 1, 2, lanes=2)


def alike(search: Search, pattern: str) -> Candidate:
    blocks = frozenset(search.branches)
    loads = tuple(frozenset() if step == "#" else blocks for step in pattern)
    return search.measured.evaluate(Schedule(loads, 1, 2, family="branches"))


@pytest.mark.parametrize("pattern", ["#+#+++#+", "#+.+.#.."])
def test_what_is_scored_is_what_runs(held: HeldLanes, pattern: str) -> None:
    """In a batch whose second part, the conditional one, is computed first. After a half step neither lane is older."""
    student, schedule = held.student, some_schedule(held, pattern)
    rolled = student.rollout(schedule)
    view = student.trajectories[0]
    assert isinstance(view, SplitLanes)
    assert view.turns == (1, 0)
    mask = student.mask(schedule, rolled.coefficients)
    assert (mask.lanes, mask.parts, mask.batched) == (("1", "0"), (1, 0), True)
    accelerated = fxmask.compile(student.program, fxmask.rectify(student.program, mask), backend="eager")
    torch.testing.assert_close(view.run.rollout(accelerated), rolled.finals[0], rtol=1e-3, atol=1e-4)
    assert all(run.followed for run in accelerated.report().runs)
    terms = rolled.coefficients[3, next(iter(branches_of(held)))]
    assert dict(terms) == {1: 1.0, 2: 1.0, 0: -1.0}


def test_a_step_of_one_lane_is_better_than_one_of_none(search: Search, held: HeldLanes) -> None:
    one, none = (held.measured.evaluate(some_schedule(held, pattern)).score for pattern in ("#+#+#+#+", "#.#.#.#."))
    assert one < none - 3
    assert none == pytest.approx(alike(search, "#.#.#.#.").score, abs=1e-3)


def test_errors_of_runs_with_lanes_are_those_of_whole_rollouts(held: HeldLanes) -> None:
    level = Level("branches", branches_of(held), 1, 2, (False, True))
    table = measure_runs(held.student, level, 3)
    for first, pattern in ((1, "#+######"), (5, "#####+##")):
        score = held.student.score(held.student.rollout(some_schedule(held, pattern)))
        assert float(10 * table[first, 0].log10()) == pytest.approx(score, abs=1e-3)
    assert float(10 * table[5, 2].log10()) == pytest.approx(
        held.student.score(held.student.rollout(some_schedule(held, "#####+++"))), abs=1e-3
    )


def test_a_plan_for_a_budget(search: Search, held: HeldLanes) -> None:
    budget = held.student.spent(some_schedule(held, "#+#+#+++"))
    base = alike(search, "##.##.##")
    found = held.best(budget, [base], SMALL, 40.0)
    assert found is not None
    assert held._has_part(found.schedule)
    assert found.score < base.score - 1
    assert held.student.spent(found.schedule) == pytest.approx(budget, rel=0.03)


def test_neighbours_are_of_whole_steps(held: HeldLanes) -> None:
    schedule, rng = some_schedule(held, "#+#.#+.+"), random.Random(0)
    found = [held._neighbour(schedule, rng) for _ in range(60)]
    kept = [x for x in found if x is not None]
    assert len(kept) > 10
    for other in kept:
        assert len(other.loads) == len(schedule.loads)
        assert not any(other.loads[:2]), "the first step computes everything"
        assert {name for loads in other.loads for name in loads} <= branches_of(held)
        changed = [k for k in range(STEPS) if other.loads[2 * k : 2 * k + 2] != schedule.loads[2 * k : 2 * k + 2]]
        assert 1 <= len(changed) <= 2
    assert any(sorted(map(sorted, other.loads)) == sorted(map(sorted, schedule.loads)) for other in kept), "an exchange"


@pytest.mark.parametrize(("guidance", "tried"), [(1.5, True), (7.5, False)])
def test_quick_effort_guesses(guidance: float, tried: bool) -> None:
    """Strong guidance multiplies what is wrong with the lane that is formed."""
    search = search_of(runs_at(guidance), QUICK)
    assert search.apart is not None
    assert isinstance(search.apart, HeldLanes)
    budget = search.apart.student.spent(some_schedule(search.apart, "#+#+#+#."))
    schedules = list(search.apart._screened(budget, [alike(search, "##.##.##").schedule], QUICK, ()))
    formed = [sum(bool(loads) for loads in s.loads[1::2]) - sum(bool(loads) for loads in s.loads[::2]) for s in schedules]
    assert all(search.apart.student.spent(s) == pytest.approx(budget, rel=0.03) for s in schedules)
    assert (formed[0] >= 3) == tried, "steps that compute one lane"


@pytest.mark.parametrize("better", [True, False])
def test_fresh_noise_decides(monkeypatch: pytest.MonkeyPatch, better: bool) -> None:
    search = search_of(runs_at(1.5))
    asked = []
    usual = FreshNoise.best

    def best(self: FreshNoise, candidates: list[Candidate], units: float) -> Candidate:
        usual(self, candidates, units)
        asked.append([c.schedule.lanes for c in candidates])
        return candidates[-1 if better else 0] if asked[-1][-1] == 2 else candidates[0]

    monkeypatch.setattr(FreshNoise, "best", best)
    point = search.best(0.75)
    assert [1, 2] in asked
    assert bool(point.mask.lanes) == better


def test_fresh_noise_is_the_same_for_both(search: Search, held: HeldLanes) -> None:
    """All lanes alike, told apart or not, is one plan: of every fresh image it has the same error."""
    assert search._fresh is not None
    one = alike(search, "#.#.#.#.")
    two = held.measured.evaluate(some_schedule(held, "#.#.#.#."))
    images = [
        measured.on_fresh_noise(c, 0, lambda batch, c=c: search._fresh._student(batch, c.schedule.lanes > 1))
        for measured, c in ((search.measured, one), (held.measured, two))
    ]
    assert images[0] == pytest.approx(images[1], abs=1e-3)


def test_without_fresh_noise_a_lead_must_be_clear(search: Search, held: HeldLanes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_fresh", None)
    weak, strong = (Candidate(some_schedule(held, "#+#+#+#+"), {}, 0.0) for _ in range(2))
    base = alike(search, "#.#.#.#.")
    images = [-30.0 - k for k in range(8)]
    monkeypatch.setattr(search.measured, "judged_images", lambda c: images)
    shifts = {id(weak): 0.1, id(strong): 10.0}
    monkeypatch.setattr(held.measured, "judged_images", lambda c: [x - shifts[id(c)] for x in images])
    assert not search._is_better_on_noise(weak, base)
    assert search._is_better_on_noise(strong, base)


def test_lanes_alike_are_left_alike(search: Search) -> None:
    assert search_of(runs_at(1.5, count=2), lanes="alike").apart is None
