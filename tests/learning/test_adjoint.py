"""Derivatives of the final samples by all coefficients, against finite differences of whole rollouts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import ddim, labels, tiny_dit, tiny_unet
from diffusers import DPMSolverMultistepScheduler
from pipelines import record as record_pipeline

import fxmask
from fxmask.errors import InputError
from fxmask.learning.adjoint import acts_by_element, derivatives, free_terms, refine_all
from fxmask.learning.candidate import Candidate
from fxmask.learning.effort import Limits
from fxmask.learning.finalists import refine_finalists
from fxmask.learning.journal import Journal
from fxmask.learning.measured import Measured
from fxmask.learning.progress import Progress
from fxmask.learning.schedule import Schedule, moved_by
from fxmask.learning.student import Student
from fxmask.sampling.split_lanes import split_lanes

STEP = 2e-3


def freed(student, loads, seed=0, lanes=1):
    """A schedule, and coefficients of everything that its steps form or blend, near plain reuse."""
    schedule = Schedule(tuple(map(frozenset, loads)), 1, 2, blend=1, lanes=lanes)
    generator = torch.Generator().manual_seed(seed)
    coefficients = {}
    for i, names in enumerate(schedule.loads):
        for name in sorted(names | ({student.output} if student.blends(schedule, i) else set())):
            sources = student.sources(schedule, i, name)
            moves = (0.2 * torch.randn(len(sources), generator=generator)).tolist() if names else [0.0]
            coefficients[i, name] = tuple((s, float(k == 0) + moves[k]) for k, s in enumerate(sources))
    return schedule, coefficients


def compare(student, schedule, coefficients, every, tolerance):
    """Largest deviation of some derivatives, relative to the largest finite difference."""
    base = student.rollout(schedule, coefficients, keep=True)
    terms = free_terms(coefficients)
    generator = torch.Generator().manual_seed(1)
    directions = [[torch.randn(t.final.shape, generator=generator) for _ in range(2)] for t in student.trajectories]
    found = derivatives(student, schedule, base, terms, directions)
    expected = []
    for step, block, k in terms[::every]:
        high, low = (student.rollout(schedule, moved_by(coefficients, step, (block,), k, a)) for a in (STEP, -STEP))
        for n in range(len(student.trajectories)):
            moved = (high.finals[n].double() - low.finals[n].double()) / (2 * STEP)
            expected.append(torch.stack([(moved * u).flatten(1).sum(dim=1) for u in directions[n]]))
    got = [found[n][:, :, column] for column in range(0, len(terms), every) for n in range(len(student.trajectories))]
    largest = max(float(x.abs().max()) for x in expected)
    assert largest > 1e-4
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance * largest)


def student_of(model, scheduler, conditioning=None, options=None):
    runs = [
        fxmask.record(
            model, scheduler, num_inference_steps=6, batch_size=2, example_inputs=conditioning, step_kwargs=options, seed=seed
        )
        for seed in range(2)
    ]
    return Student(fxmask.capture(model, runs[0].calls[0][0]), runs)


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
@pytest.mark.parametrize("family", ["dit", "unet"])
def test_derivatives(family, sampler):
    """Branches and stages, older values, blends that later blends read, one-step and multistep samplers."""
    scheduler = ddim(clip_sample=False) if sampler == "ddim" else DPMSolverMultistepScheduler()
    options = {"eta": 1.0} if sampler == "ddim" else None
    student = student_of(*((tiny_dit(), scheduler, labels) if family == "dit" else (tiny_unet(), scheduler)), options=options)
    branches = {b.name for b in student.program.branches}
    stage = next(b.name for b in student.program.blocks if b.kind == "stage")
    loads = [set(), branches, set(sorted(branches)[::2]), set(), {stage}, branches]
    compare(student, *freed(student, loads), every=5, tolerance=0.02)


def test_derivatives_where_the_output_is_formed_too():
    student = student_of(tiny_dit(), ddim(clip_sample=False), labels, {"eta": 1.0})
    branches = {b.name for b in student.program.branches}
    loads = [set(), {student.output}, branches, {student.output}, set(), branches]
    compare(student, *freed(student, loads), every=2, tolerance=0.02)


def test_derivatives_through_a_pipeline_with_two_calls_per_step():
    pipe, _, trajectory = record_pipeline("wan")
    assert acts_by_element(trajectory)
    student = Student(fxmask.capture(pipe.transformer, trajectory.calls[0][0]), [trajectory])
    branches = {b.name for b in student.program.branches}
    loads = [branches if i % 2 else set() for i in range(student.num_steps)]
    compare(student, *freed(student, loads), every=7, tolerance=0.02)


@pytest.mark.parametrize("batched", [False, True])
def test_derivatives_where_lanes_have_rows_of_their_own(batched):
    """Forecasts that read the other lane, of the same step and of earlier ones, and the samples; branches too."""
    if batched:
        program, run = guided()
        runs = [split_lanes(run, program.model)]
    else:
        pipe, _, run = record_pipeline("wan")
        program, runs = fxmask.capture(pipe.transformer, run.calls[0][0]), [run]
    student = Student(program, runs)
    output, branches = student.output, frozenset(b.name for b in student.program.branches)
    rows = [frozenset()] * 4 + [frozenset({output}) if k in (5, 6, 7) else branches for k in range(4, 2 * student.num_steps)]
    schedule = Schedule(tuple(rows), 3, 2, lanes=2)
    generator = torch.Generator().manual_seed(0)
    coefficients = {}
    for row, loads in enumerate(rows):
        for name in sorted(loads):
            sources = student.sources(schedule, row, name)
            moves = (0.2 * torch.randn(len(sources), generator=generator)).tolist()
            coefficients[row, name] = tuple((s, float(k == 0) + moves[k]) for k, s in enumerate(sources))
    assert any(isinstance(s, int) and s % 2 != row % 2 for (row, _), terms in coefficients.items() for s, _ in terms)
    compare(student, schedule, coefficients, every=5, tolerance=0.02)


def test_derivatives_of_blends_where_lanes_have_rows_of_their_own():
    """Outputs of a lane are blended with its own earlier ones, those that are formed read the other lane."""
    program, run = guided({"eta": 1.0})
    student = Student(program, [split_lanes(run, program.model).in_order_of((1, 0))])
    branches = {b.name for b in student.program.branches}
    loads = [set(), set(), set(), branches, branches, branches, set(), branches, set(), {student.output}, branches, branches]
    schedule, coefficients = freed(student, loads, lanes=2)
    assert dict(coefficients[3, student.output]).keys() == {3, 1, ("input", 3), ("input", 1)}
    assert any(isinstance(s, int) and s % 2 == 0 for name in branches for s, _ in coefficients[11, name])
    compare(student, schedule, coefficients, every=5, tolerance=0.02)


def test_derivatives_through_a_batch_that_holds_the_lanes():
    """Each part of a prediction moves the sample that all parts have; forecasts of samples and blends too."""
    program, run = guided({"eta": 1.0})
    assert len(run.calls[0][0][run.sample]) == 2 * len(run.final)
    assert acts_by_element(run)
    assert not acts_by_element(replace(run, calls=tuple((shifted(step[0], run.sample),) for step in run.calls)))
    student = Student(program, [run])
    branches = {b.name for b in student.program.branches}
    loads = [{student.output} if i == 2 else branches if i % 2 else set() for i in range(student.num_steps)]
    compare(student, *freed(student, loads), every=3, tolerance=0.02)


def shifted(call, name):
    """The call with parts that have different samples."""
    sample = call[name].clone()
    sample[0] += 1
    return {**call, name: sample}


def guided(options=None):
    """A denoiser called with both lanes in one batch, without clipping."""
    model = tiny_dit()
    run = fxmask.record(
        model,
        ddim(clip_sample=False),
        num_inference_steps=6,
        batch_size=2,
        example_inputs=labels,
        guidance_scale=3.0,
        step_kwargs=options,
        unconditional=lambda n, _: {"class_labels": torch.zeros(n, dtype=torch.long)},
    )
    return fxmask.capture(model, run.calls[0][0]), run


def test_clipping_stops_derivatives():
    """Where the sampler clips, the final sample does not move, whatever the last step forms."""
    largest = {}
    for clips in (False, True):
        scheduler = ddim(clip_sample=clips, clip_sample_range=1e-6)
        student = student_of(tiny_dit(), scheduler, labels, {"eta": 0.0})
        branches = {b.name for b in student.program.branches}
        schedule, coefficients = freed(student, [set(), *([branches] * 5)])
        base = student.rollout(schedule, coefficients, keep=True)
        directions = [[torch.ones_like(t.final)] for t in student.trajectories]
        terms = free_terms(coefficients)
        found = derivatives(student, schedule, base, terms, directions)[0]
        largest[clips] = float(found[:, :, [k for k, (step, _, _) in enumerate(terms) if step == 5]].abs().max())
    assert largest[True] < 1e-3 * largest[False]


def test_refinement_is_never_worse_and_repeatable():
    student = student_of(tiny_dit(), ddim(), labels, {"eta": 1.0})
    branches = {b.name for b in student.program.branches}
    schedule, coefficients = freed(student, [branches if i % 2 else set() for i in range(6)])
    before = student.score(student.rollout(schedule, coefficients))
    better, score = refine_all(student, schedule, coefficients, 3)
    assert score < before - 0.5
    assert score == pytest.approx(student.score(student.rollout(schedule, better)), abs=1e-6)
    assert refine_all(student, schedule, coefficients, 3) == (better, score)
    assert refine_all(student, schedule, coefficients, 4) != (better, score)


def mixed():
    """A batch of guidance, and a candidate that forms outputs at some steps and many branches at others."""
    program, run = guided()
    student = Student(program, [run])
    branches = frozenset(b.name for b in program.branches)
    formed = [frozenset(), frozenset(), frozenset({student.output}), branches, frozenset(), branches]
    schedule = Schedule(tuple(formed), 3, 2)
    rolled = student.rollout(schedule)
    return program, run, Candidate(schedule, rolled.coefficients, student.score(rolled))


def measured_of(program, run, starts):
    judge = Student(program, [run.renoised(program.model, 7)])
    return Measured(Student(program, [run]), judge, Journal(None, ""), Progress(False), starts=starts, seed=0)


def test_many_coefficients_are_refined_by_adjoints(caplog, monkeypatch):
    program, run, candidate = mixed()
    assert not candidate.is_refinable
    given = {"rounds": 2, "ends": 100.0, "stochastic": False}
    measured = measured_of(program, run, 3)
    first, *refined = refine_finalists(measured, [candidate], Limits(), **given)
    assert first is candidate
    assert len(refined) > 1, "the best goes on"
    before, *after = (measured.of_all(c.score, measured.judged(c)[0]) for c in (candidate, *refined))
    assert after == sorted(after, reverse=True)
    assert after[-1] < before - 0.1
    # not by cross-validation, which would have to do the same again, nor where efforts pass nothing backwards
    assert refine_finalists(measured, [candidate], Limits(), **given, crossed=True) == [candidate]
    assert refine_finalists(measured_of(program, run, 0), [candidate], Limits(), **given) == [candidate]

    overfitted = measured_of(program, run, 3)
    monkeypatch.setattr(overfitted, "judged", lambda candidate: (100.0 * candidate.rounds, 1.0))
    assert refine_finalists(overfitted, [candidate], Limits(), **given) == [candidate]

    def no_room(*_):
        raise InputError("room=1 bytes are not enough")

    monkeypatch.setattr(Student, "states_kept", no_room)
    with caplog.at_level("INFO", logger="fxmask"):
        assert refine_finalists(measured_of(program, run, 3), [candidate], Limits(), **given) == [candidate]
    assert "stay as they are: room=1 bytes" in caplog.text


def test_a_prediction_that_is_no_sample_is_not_differentiated():
    model = tiny_dit(out_channels=2)  # a learned variance
    run = fxmask.record(model, ddim(), num_inference_steps=3, batch_size=2, example_inputs=labels, step_kwargs={"eta": 1.0})
    assert not acts_by_element(run)
    own = replace(run, outputs=tuple((step[0][:, :1],) for step in run.outputs))
    assert acts_by_element(own)
    assert not acts_by_element(replace(own, outputs=tuple((step[0].half(),) for step in own.outputs)))
