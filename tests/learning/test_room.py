"""Learning within a bound of memory: the same results, nothing that grows with the number of steps, and errors that help."""

from __future__ import annotations

import functools
import logging
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import ddim, labels, tiny_dit
from test_adjoint import freed
from torch.utils._python_dispatch import TorchDispatchMode

import fxmask
from fxmask import InputError
from fxmask._torch import pytree
from fxmask.ir.forecast import Slot
from fxmask.learning import room as rooms
from fxmask.learning.adjoint import derivatives, free_terms, refine_all
from fxmask.learning.effort import Effort, Limits
from fxmask.learning.forms import Forms
from fxmask.learning.levels import levels_of
from fxmask.learning.measured import Measured
from fxmask.learning.pieces import Place, least_bytes, split
from fxmask.learning.probes import measure_probes
from fxmask.learning.refine import refine
from fxmask.learning.reversal import advances, backwards
from fxmask.learning.room import Room
from fxmask.learning.runs import measure_runs
from fxmask.learning.schedule import Schedule
from fxmask.learning.search import Search
from fxmask.learning.student import Student


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside and still there."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.known:
                storage = x.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def gone(self, key, size):
        self.known.discard(key)
        self.now -= size


@functools.cache
def setting(steps, batch=2):
    """A tiny DiT, its program, and two stochastic runs."""
    model = tiny_dit()
    runs = [
        fxmask.record(
            model,
            ddim(),
            num_inference_steps=steps,
            batch_size=batch,
            example_inputs=labels,
            step_kwargs={"eta": 1.0},
            seed=seed,
        )
        for seed in range(3)
    ]
    return fxmask.capture(model, runs[0].calls[0][0]), runs


def student_in(room, steps, **options):
    program, runs = setting(steps)
    return Student(program, runs[:1], room=room, **options)


def alternating(student):
    branches = {b.name for b in student.program.branches}
    return freed(student, [branches if i % 2 else set() for i in range(student.num_steps)])


def least(student, schedule):
    """The smallest room for a backward pass."""
    with pytest.raises(InputError) as refused:
        Student(student.program, student.trajectories, room=Room(1, True)).states_kept(schedule, 0, 2)
    return int(str(refused.value).split("allow max_learning_bytes=")[1].split()[0])


@pytest.mark.parametrize("kept", [0, 1, 2, 5, 11, 40])
@pytest.mark.parametrize("steps", [0, 1, 2, 12])
def test_backwards_gives_every_state_once_and_keeps_few(steps, kept):
    made = []

    class Count:
        def __init__(self, step):
            self.step = step

    def advance(state, step):
        assert state.step == step
        made.append(weakref.ref(after := Count(step + 1)))
        return after

    seen, most = [], 0
    for step, state in backwards(Count(0), steps, kept, advance):
        assert state.step == step
        seen.append(step)
        del state
        most = max(most, sum(ref() is not None for ref in made))
    assert seen == list(reversed(range(steps)))
    assert len(made) == advances(steps, kept)
    assert most <= kept + 1


def test_derivatives_are_the_same_whatever_is_kept():
    found = []
    schedule, coefficients = alternating(student_in(Room(), 8))
    smallest = least(student_in(Room(), 8), schedule)
    for size in (None, smallest, smallest + 3 * student_in(Room(), 8).live_bytes(schedule, 0)):
        student = student_in(Room(size), 8)
        base = student.rollout(schedule, coefficients, keep=True)
        directions = [[torch.ones_like(t.final), t.final] for t in student.trajectories]
        units = student.units
        found.append((derivatives(student, schedule, base, free_terms(coefficients), directions), student.units - units))
        assert bool(student.room.said) == (size is not None)
    for other, units in found[1:]:
        assert units == found[0][1]
        assert all(torch.equal(a, b) for a, b in zip(other, found[0][0], strict=True))


def peak_of(steps, room, work):
    """Most bytes of work after a first time, which makes graphs."""
    student = student_in(room, steps)
    schedule, coefficients = alternating(student)
    base = student.rollout(schedule, coefficients, keep=True)
    directions = [[torch.ones_like(t.final)] * 2 for t in student.trajectories]

    def once():
        if work == "adjoint":
            derivatives(student, schedule, base, free_terms(coefficients), directions)
        elif work == "runs":
            measure_runs(student, next(x for x in levels_of(student, 0) if x.name == "branches"), 4)
        elif work == "probes":
            measure_probes(student, [b.name for b in student.program.branches])
        else:
            refine(student, schedule, coefficients, rounds=1)

    once() if work != "refine" else None
    with Live() as live:
        once()
    return live.most


def test_memory_is_flat_in_the_number_of_steps():
    """What grows is of the size of samples and coefficients, a few percent here."""
    schedule, _ = alternating(student_in(Room(), 16))
    smallest = least(student_in(Room(), 16), schedule)
    for work in ("adjoint", "runs", "probes"):
        short, long = (peak_of(steps, Room(smallest), work) for steps in (4, 16))
        assert long < 1.3 * short, work
        if work == "adjoint":
            assert long <= smallest
            assert peak_of(16, Room(), work) > 1.1 * long


def test_finite_differences_hold_one_run_at_a_time():
    short, long = (peak_of(steps, Room(), "refine") for steps in (4, 8))
    assert long < 1.5 * short


SMALL = Effort(units=30, kinds=1, starts=2, levels=1, search=0.0, rounds=1, finalists=1)


def learned(room, steps=6):
    program, runs = setting(steps)
    search = Search(program, runs, effort=SMALL, limits=Limits(), seed=0, progress=False, room=room)
    point = search.best(0.6)
    return search, point


def test_the_mask_is_the_same_within_a_bound_that_makes_pieces(caplog):
    program, _ = setting(6)
    free, expected = learned(Room())
    whole = least_bytes(program, gradients=True, adjoints=True)
    with caplog.at_level(logging.INFO, "fxmask"):
        bound, point = learned(Room(int(whole * 0.75), True))
    assert len(bound.student.trajectories) == 2 * len(free.student.trajectories)
    assert "batches of 2 in pieces of 1" in caplog.text
    assert bound.measured.units == pytest.approx(free.measured.units)
    assert torch.equal(point.mask.compute, expected.mask.compute)
    assert point.decibels == pytest.approx(expected.decibels, abs=0.05)


def test_without_room_for_passes_backwards_nothing_is_refined_by_them(caplog):
    """Rather than no plan at all: what refinement needs beyond a call is no reason to refuse."""
    program, runs = setting(6)
    size = least_bytes(program, gradients=True, adjoints=True)
    with caplog.at_level(logging.INFO, "fxmask"):
        mask = fxmask.learn(program, runs, speedup=1.5, effort="quick", max_learning_bytes=size // 3, progress=False)
    assert "not refined by passes backwards through the run: learning needs about" in caplog.text
    assert fxmask.rectify(program, mask).mac_ratio == pytest.approx(1.5, rel=0.03)
    assert not Measured(*([Student(program, runs)] * 2), None, None, starts=3, seed=0, adjoints=False).has_adjoints


def test_refinement_in_pieces_is_refinement():
    program, runs = setting(6)
    whole = Student(program, runs[:2])
    pieces = [run.rows(k, k + 1) for run in runs[:2] for k in range(2)]
    parts = Student(program, pieces, places=[Place(k // 2, k % 2, 1, 2) for k in range(4)])
    schedule, coefficients = alternating(whole)
    (_, score), (_, other) = (refine_all(student, schedule, coefficients, 3) for student in (whole, parts))
    assert score == pytest.approx(other, abs=1e-2)
    blocks = [block.name for block in program.branches]
    for x, y in zip(measure_probes(whole, blocks), measure_probes(parts, blocks), strict=True):
        assert torch.allclose(x, y, rtol=1e-3, atol=1e-9)


def test_fits_with_values_elsewhere_are_the_same():
    program, runs = setting(6)
    level = next(x for x in levels_of(Student(program, runs), 0) if x.name == "branches" and x.history == 3)
    found = []
    for size in (None, 1):
        student = Student(program, runs, room=Room(size))
        if size:
            student.room.size = student.pass_bytes(0, False) * 2
        schedule = Schedule(tuple(level.loads if i % 3 == 2 else frozenset() for i in range(6)), level.history)
        found.append(student.rollout(schedule))
    assert any("go to files" in said for said in student.room.said)
    assert found[0].coefficients == found[1].coefficients
    assert all(torch.equal(a, b) for a, b in zip(found[0].finals, found[1].finals, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_elsewhere_are_those_that_went_there(dtype, tmp_path):
    cache = Room(1).elsewhere(torch.device("cpu"))
    value = torch.randn(3, 4).to(dtype).T
    cache[Slot("a", 0, 1)] = value
    assert torch.equal(cache[Slot("a", 0, 1)], value)
    (path,) = [kept.path for kept in cache._kept.values()]
    del cache[Slot("a", 0, 1)]
    assert not path.exists()


def test_too_little_room_is_an_error_that_says_how_much():
    program, runs = setting(6)
    with pytest.raises(InputError, match=r"needs about [\d,]+ bytes.*smaller batch.*allow max_learning_bytes=\d+"):
        fxmask.learn(program, runs, speedup=1.5, effort="quick", max_learning_bytes=1000, progress=False)
    for wrong in (0, 1.5, True, "1"):
        with pytest.raises(InputError, match="whole number of bytes"):
            fxmask.learn(program, runs, speedup=1.5, max_learning_bytes=wrong)


def test_what_is_free_is_read_where_it_is(tmp_path, monkeypatch):
    free = rooms.free_bytes(torch.device("cpu"))
    assert 0 < free < 1 << 50
    limit, used = tmp_path / "max", tmp_path / "used"
    limit.write_text("1000\n")
    used.write_text("400\n")
    monkeypatch.setattr(rooms, "CGROUPS", ((str(limit), str(used)), (str(tmp_path / "none"), str(used))))
    assert rooms.free_bytes(torch.device("cpu")) == 600
    limit.write_text("max\n")
    monkeypatch.setattr(rooms, "_available", lambda: None)
    assert rooms.free_bytes(torch.device("cpu")) == rooms.UNKNOWN
    assert Room.of(None, torch.device("cpu")).given == rooms.UNKNOWN // 2


def test_a_batch_whose_samples_depend_on_each_other_stays_whole():
    class Mixes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, sample, timestep):
            return sample + self.layer(sample - sample.mean(dim=0, keepdim=True))

    model = Mixes().eval()
    inputs = {"sample": torch.zeros(2, 1, 8, 8)}
    run = fxmask.record(model, ddim(), num_inference_steps=3, example_inputs=inputs)
    program = fxmask.capture(model, run.calls[0][0])
    needed = least_bytes(program, gradients=False, adjoints=False)
    with pytest.raises(InputError, match="2 samples of a recorded run"):
        split([replace(run)], Forms(program, [run]), Room(int(0.6 * needed)), gradients=False, adjoints=False)
