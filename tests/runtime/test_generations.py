"""Marked generations in generators, tasks and helpers: a call belongs to the run that makes it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref

import pytest
import torch
from conftest import TinyTransformer, every_other, make_calls

import fxmask


def run_in_generator(accelerated, calls):
    with accelerated.generation():
        for call in calls:
            yield accelerated(**call)


def run_in_managed_generator(accelerated, calls):
    with contextlib.ExitStack() as stack:
        stack.enter_context(accelerated.generation())
        for call in calls:
            yield accelerated(**call)


@contextlib.contextmanager
def marked(accelerated):
    with accelerated.generation():
        yield


def run_with_helper(accelerated, calls):
    with marked(accelerated):
        for call in calls:
            yield accelerated(**call)


@pytest.mark.parametrize("order", ["in turn", "first ends first", "second is dropped"])
@pytest.mark.parametrize("run", [run_in_generator, run_in_managed_generator, run_with_helper])
def test_two_generators_that_are_advanced_in_turn(tiny, run, order):
    """A generator has no context of its own: its ``generation()`` is still current while another one runs."""
    accelerated = fxmask.compile(tiny, fxmask.rectify(tiny, every_other(tiny)), backend="eager")
    calls = [make_calls(seed=seed) for seed in (1, 2)]
    wanted = [fxmask.reference.run(tiny, every_other(tiny), c) for c in calls]
    first, second = (run(accelerated, c) for c in calls)
    found: list[list[torch.Tensor]] = [[], []]
    if order == "in turn":
        for a, b in zip(first, second, strict=True):
            found[0].append(a)
            found[1].append(b)
    elif order == "first ends first":
        found[0].append(next(first))
        found[1].append(next(second))
        found[0] += list(first)
        found[1] += list(second)
    else:
        found[0].append(next(first))
        found[1].append(next(second))
        second.close()
        found[0] += list(first)
        wanted[1] = wanted[1][:1]
    for a, b in zip(found, wanted, strict=True):
        assert len(a) == len(b)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert accelerated._fxmask.marks.current() is None, "nothing stale is left"


def test_a_generation_inside_another_is_the_inner_one(tiny):
    accelerated = fxmask.compile(tiny, fxmask.rectify(tiny, every_other(tiny)), backend="eager")
    marks = accelerated._fxmask.marks
    with accelerated.generation() as outer:
        assert marks.current() is outer
        with marked(accelerated):
            assert marks.current() is not outer
        with accelerated.generation() as inner:
            assert marks.current() is inner
        assert marks.current() is outer


def test_generators_in_tasks(tiny):
    accelerated = fxmask.compile(tiny, fxmask.rectify(tiny, every_other(tiny)), backend="eager")
    calls = [make_calls(seed=seed) for seed in (1, 2, 3)]

    async def run(calls):
        found = []
        with accelerated.generation():
            for call in calls:
                found.append(accelerated(**call))
                await asyncio.sleep(0)
        return found

    async def main():
        return await asyncio.gather(*(run(c) for c in calls))

    for found, c in zip(asyncio.run(main()), calls, strict=True):
        wanted = fxmask.reference.run(tiny, every_other(tiny), c)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_rollout_that_ends_by_stop_iteration_says_that_nothing_was_accelerated(tiny):
    accelerated = fxmask.compile(tiny, fxmask.rectify(tiny, every_other(tiny)), backend="eager")
    steps = iter(make_calls()[::-1])  # not the plan's order
    with pytest.warns(UserWarning, match="nothing was accelerated"), contextlib.suppress(StopIteration):
        with accelerated.generation():
            while True:
                accelerated(**next(steps))


@pytest.mark.parametrize("marked", [False, True])
def test_a_model_that_was_used_can_be_forgotten(marked):
    """Contexts live as long as their thread: they must not keep models, caches and weights."""
    torch.manual_seed(0)
    program = fxmask.capture(TinyTransformer().eval(), make_calls()[0])
    accelerated = fxmask.compile(program, fxmask.rectify(program, every_other(program)), backend="eager")
    with accelerated.generation() if marked else contextlib.nullcontext():
        for call in make_calls()[:3]:
            accelerated(**call)
    alive = [weakref.ref(x) for x in (accelerated, program.model, program.graph_module)]
    del accelerated, program
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3
