"""Bisection of a wrong result: five injected faults, every form of input, errors, tolerances."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import TIMESTEPS, TinyTransformer, every_other, make_calls

import fxmask
from fxmask.backends.toolchain import cpu_compiler_problem
from fxmask.passes import form_values, merge_common
from fxmask.passes import rectify as rectify_pass
from fxmask.tools.diagnosis_runs import run_eagerly
from fxmask.tools.naive_planner import plan_faults


def masks(program, count=12):
    """Random masks over five steps, half of them with forecasts and blends."""
    names = [b.name for b in program.blocks if b.kind != "stage"]
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.rand(5, len(names), generator=generator) > 0.5
        rows[0] = True
        terms = {}
        if seed % 2:
            for b, name in enumerate(names):
                earlier = rows[:3, b].nonzero().flatten().tolist()
                own = [4] if rows[4, b] else []
                terms[4, name] = tuple((j, 0.5 + 0.25 * j) for j in earlier + own)
        yield fxmask.Mask(rows, TIMESTEPS, names, terms or None)


def with_plans(monkeypatch, change):
    """Make ``rectify`` return ``change(plan)``."""
    original = rectify_pass.rectify
    monkeypatch.setattr(rectify_pass, "rectify", lambda program, mask, **kw: change(original(program, mask, **kw)))


def with_steps(plan, change):
    return dataclasses.replace(plan, steps=tuple(change(i, step) for i, step in enumerate(plan.steps)))


def scaled(run, factor, block=None):
    """A runner whose results are wrong, in full or only where a mask loads ``block``."""

    def wrong(program, mask, steps):
        on = block is None or not bool(mask.compute[:, mask.blocks.index(block)].all())
        return [[x * (factor if on else 1.0) for x in row] for row in run(program, mask, steps)]

    return wrong


def loads_wrongly(monkeypatch, values=None):
    """Make step graphs load one and a half times what is stored, of some values or all."""
    original = form_values.ValueFormer.loaded

    def wrong(former, name):
        value = original(former, name)
        if values is not None and name not in values:
            return value
        node = former.graph.call_function(torch.ops.aten.mul.Tensor, (value, 1.5))
        node.meta = dict(value.meta)
        return node

    monkeypatch.setattr(form_values.ValueFormer, "loaded", wrong)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are tiny, and a second thread only waits for the first where other tests run, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def mask(tiny):
    return every_other(tiny)


# The second planner


def test_the_planners_agree(tiny, unet_program):
    for program in (tiny, unet_program):
        for mask in masks(program):
            assert plan_faults(program, mask, fxmask.rectify(program, mask)) == ()
            with fxmask.switched_off("rectify"):
                assert plan_faults(program, mask, fxmask.rectify(program, mask)) == ()


def test_plan_faults_are_named(tiny, mask):
    victim = tiny.branches[1].name
    names = list(mask.blocks)
    rows = torch.ones(5, len(names), dtype=torch.bool)
    rows[3:, names.index(victim)] = False
    mask = fxmask.Mask(rows, TIMESTEPS, names, {(4, victim): ((0, 0.5), (2, 0.5))})
    plan = fxmask.rectify(tiny, mask)

    def faults(step, **changed):
        return plan_faults(tiny, mask, with_steps(plan, lambda i, s: dataclasses.replace(s, **changed) if i == step else s))

    def load(step, *terms):
        return (plan.steps[step].load[0]._replace(terms=tuple((fxmask.ir.forecast.Slot(victim, 0, j), c) for j, c in terms)),)

    assert faults(2, store=()) == (f"step 2 does not store {victim}[0], which step 3 loads",)
    assert faults(2, live_out=()) == (f"the graph of step 2 does not return {victim}[0], which the step must store for step 3",)
    early = plan.steps[4].drop[-1:]
    assert early[0].step == 2
    assert faults(3, drop=early)[0] == f"step 3 drops {victim}[0] of step 2, which step 4 loads"
    assert faults(3, load=load(3, (1, 1.0))) == (f"load of {victim}[0] at step 3 reads step 1, the mask says step 2",)
    assert faults(4, load=load(4, (0, 0.5), (2, 0.75))) == (
        f"load of {victim}[0] at step 4 has the coefficients [0.5, 0.75], the mask says [0.5, 0.5]",
    )
    assert faults(3, load=())[0].startswith(f"step 3 does not load {victim}[0]")
    assert faults(1, compute=plan.steps[1].compute - {victim}) == (
        f"step 1 does not compute block {victim}, although the mask computes it and its value is needed",
    )


# Five faults


def test_fault_1_a_needed_store_is_dropped(tiny, mask, monkeypatch, caplog):
    victim = tiny.branches[1].name

    def forget(plan):
        def without(i, step):
            return dataclasses.replace(step, store=tuple(x for x in step.store if x[0] != victim))

        return with_steps(plan, without)

    with_plans(monkeypatch, forget)
    found = fxmask.diagnose(tiny, mask, make_calls())
    assert found.culprit == "rectify"
    assert found.plan_faults == (f"step 2 does not store {victim}[0], which step 3 loads",)
    assert isinstance(found.error, KeyError)
    assert found.step == 1, "the first step that loads"
    assert found.difference is None
    assert [block for _, block in found.loads] == [victim]
    assert not found.full_mask_fails
    assert "does not store" in caplog.text


def test_fault_2_a_needed_block_is_off(tiny, mask, monkeypatch):
    victim = tiny.branches[1].name
    original = rectify_pass.rectify

    def lazy(program, mask, **options):
        compute = mask.compute.clone()
        compute[2, mask.blocks.index(victim)] = False
        return original(program, dataclasses.replace(mask, compute=compute), **options)

    monkeypatch.setattr(rectify_pass, "rectify", lazy)
    found = fxmask.diagnose(tiny, mask, make_calls())
    assert found.culprit == "rectify"
    assert found.plan_faults == (
        f"step 2 does not compute block {victim}, although the mask computes it and its value is needed",
    )
    assert found.full_mask_fails, "the mask that computes everything is planned wrongly, too"
    assert found.step == 2


def test_fault_3_a_wrong_source(tiny, monkeypatch):
    victim = tiny.branches[1].name
    names = [b.name for b in tiny.blocks]
    rows = torch.ones(5, len(names), dtype=torch.bool)
    rows[2, names.index(victim)] = rows[4, names.index(victim)] = False
    mask = fxmask.Mask(rows, TIMESTEPS, names)

    def stale(plan):
        def older(load):
            terms = tuple((slot._replace(step=1) if load.step == 4 else slot, c) for slot, c in load.terms)
            return load._replace(terms=terms)

        return with_steps(
            plan,
            lambda i, step: dataclasses.replace(
                step, load=tuple(map(older, step.load)), drop=(), store=step.live_out if i in (1, 3) else step.store
            ),
        )

    with_plans(monkeypatch, stale)
    found = fxmask.diagnose(tiny, mask, make_calls())
    assert found.culprit == "rectify"
    assert f"load of {victim}[0] at step 4 reads step 1, the mask says step 3" in found.plan_faults
    assert found.loads == ((4, victim),)
    assert found.step == 4


def test_fault_4_an_optional_pass(tiny, mask, monkeypatch):
    """Merging nodes whatever their numbers: both halves of a chunk become one."""
    original = merge_common._hashable

    def careless(value):
        return type(value) if isinstance(value, (int, float)) else original(value)

    monkeypatch.setattr(merge_common, "_hashable", careless)
    found = fxmask.diagnose(tiny, mask, make_calls())
    assert found.culprit == "merge_common"
    assert found.plan_faults == ()
    assert found.full_mask_fails
    assert "none is to blame" in str(found)


def test_fault_5_inside_specialize_step(tiny, mask, monkeypatch):
    victim = tiny.branches[2]
    loads_wrongly(monkeypatch, victim.values)
    found = fxmask.diagnose(tiny, mask, make_calls())
    assert found.culprit == "specialize_step"
    assert [block for _, block in found.loads] == [victim.name]
    assert found.reduced_failure.step == found.loads[0][0]
    assert found.step_faults[0].startswith(f"the graph of step {found.loads[0][0]} gets output 0 wrong")
    assert found.difference > 0
    assert found.error is None
    scope = {"model": tiny.model, "calls": make_calls()}
    exec(found.reproducer(), scope)
    assert scope["mask"] == found.mask


def test_a_fault_of_what_runs_the_steps(tiny, mask, monkeypatch):
    """Plan and graphs are right, and every pass is innocent."""
    from fxmask.runtime import executor

    original = executor._compact
    monkeypatch.setattr(executor, "_compact", lambda tensor: original(tensor) + 1)
    found = fxmask.diagnose(tiny, mask, make_calls())
    assert found.culprit is None
    assert len(found.loads) == 1
    assert "what runs the steps" in str(found)


# Forms of input


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_a_right_trajectory(name, request):
    program, (_, trajectory) = (request.getfixturevalue(f"{name}_{x}") for x in ("program", "trajectory"))
    mask = fxmask.policies.interval(2)(program, trajectory.timesteps)
    assert fxmask.diagnose(program, mask, trajectory) is None


def test_a_wrong_trajectory(dit_program, dit_trajectory, monkeypatch):
    trajectory = dit_trajectory[1]
    mask = fxmask.policies.interval(2)(dit_program, trajectory.timesteps)
    loads_wrongly(monkeypatch)
    found = fxmask.diagnose(dit_program, mask, trajectory)
    assert found.culprit == "specialize_step"
    assert found.step == 1
    assert 0 < found.difference < float("inf")


def test_lanes_have_caches_of_their_own(tiny, mask):
    steps = [list(pair) for pair in zip(make_calls(seed=1), make_calls(seed=2), strict=True)]
    assert fxmask.diagnose(tiny, mask, steps) is None
    assert fxmask.diagnose(tiny, mask, steps, run=fxmask.reference.run, tolerance=0.0) is None
    shared = {}

    def mixed(program, mask, steps):
        """Both lanes read one cache."""
        return [[fxmask.reference.run_step(program, mask, i, call, shared) for call in step] for i, step in enumerate(steps)]

    found = fxmask.diagnose(tiny, mask, steps, run=mixed)
    assert (found.step, found.lane) == (1, 0)
    assert found.culprit == "backend"
    assert found.lanes == 2
    assert "at step 1, lane 0" in str(found)


def test_forecasts_and_blends(tiny, monkeypatch):
    calls = make_calls()
    for mask in masks(tiny):
        assert fxmask.diagnose(tiny, mask, calls) is None
    names = [b.name for b in tiny.blocks]
    victim = tiny.branches[0].name
    rows = torch.ones(5, len(names), dtype=torch.bool)
    rows[2, names.index(victim)] = False
    terms = {(2, victim): ((0, -1.0), (1, 2.0)), (3, victim): ((1, 0.25), (3, 0.75))}
    mask = fxmask.Mask(rows, TIMESTEPS, names, terms)
    assert fxmask.diagnose(tiny, mask, calls) is None
    original = form_values.ValueFormer.blended
    monkeypatch.setattr(form_values.ValueFormer, "blended", lambda former, name, computed: computed)
    found = fxmask.diagnose(tiny, mask, calls)
    monkeypatch.setattr(form_values.ValueFormer, "blended", original)
    assert found.culprit == "specialize_step"
    assert (found.loads, found.blends) == ((), ((3, victim),))
    assert dict(found.mask.forecast.terms) == {(3, victim): ((1, 0.25), (3, 0.75))}
    scope = {"model": tiny.model, "calls": calls}
    exec(found.reproducer(), scope)
    assert scope["mask"] == found.mask


def test_forecasts_of_other_values(tiny):
    """What a forecast reads may be another block's value, or the sample of this or an earlier step."""
    names = [b.name for b in tiny.blocks]
    first, second = (b.name for b in tiny.branches[:2])
    rows = torch.ones(5, len(names), dtype=torch.bool)
    rows[3, names.index(second)] = rows[4, names.index("output")] = False
    terms = {
        (3, second): (((first, 1), 0.5), (0, 0.5)),
        (4, "output"): ((("input", 4), 0.5), (("input", 2), 0.25), (3, 0.5)),
        (2, "output"): ((2, 0.5), (("input", 2), 0.5)),
    }
    mask = fxmask.Mask(rows, TIMESTEPS, names, terms)
    plan = fxmask.rectify(tiny, mask)
    assert plan_faults(tiny, mask, plan) == ()
    assert fxmask.diagnose(tiny, mask, make_calls()) is None
    forgetful = with_steps(plan, lambda i, s: dataclasses.replace(s, store=tuple(x for x in s.store if x[0] != "input")))
    assert plan_faults(tiny, mask, forgetful) == ("step 2 does not store input[0], which step 4 loads",)


def test_agreement_needs_no_diagnosis(tiny, mask):
    assert fxmask.diagnose(tiny, mask, make_calls()) is None
    assert fxmask.diagnose(tiny, fxmask.Mask.ones(tiny, TIMESTEPS), make_calls()) is None
    accelerated = fxmask.compile(tiny, fxmask.rectify(tiny, mask), backend="eager")
    assert fxmask.diagnose(tiny, mask, make_calls(), run=accelerated) is None


# Errors


@pytest.mark.parametrize("make", ["function", "accelerated"])
def test_an_error_is_reported_where_it_is(tiny, mask, monkeypatch, make):
    from fxmask.runtime import executor

    original = executor.Executor.run_step

    def fails(self, step, *args, **kwargs):
        if step == 3:
            raise RuntimeError("out of ideas")
        return original(self, step, *args, **kwargs)

    monkeypatch.setattr(executor.Executor, "run_step", fails)
    run = run_eagerly if make == "function" else fxmask.compile(tiny, fxmask.rectify(tiny, mask), backend="eager")
    found = fxmask.diagnose(tiny, mask, make_calls(), run=run)
    assert found.step == 3
    assert isinstance(found.error, RuntimeError)
    assert found.difference is None
    assert "raises RuntimeError at step 3: out of ideas" in str(found)
    assert found.full_mask_fails


def test_an_error_before_the_first_step_has_no_step(tiny, mask, monkeypatch):
    def broken(plan):
        raise fxmask.PassError("no plan today")

    with_plans(monkeypatch, broken)
    found = fxmask.diagnose(tiny, mask, make_calls())
    assert found.step is None
    assert found.culprit == "rectify"
    assert found.plan_faults == ("rectify raises PassError: no plan today",)
    assert "raises PassError before its first step" in str(found)


def test_bad_input_is_no_failure(tiny, mask, dit_trajectory):
    calls = make_calls()
    bad = [
        ((tiny.model, mask, calls), "program is a TinyTransformer"),
        ((tiny, mask.compute, calls), "mask is a Tensor"),
        ((tiny, mask, calls[:3]), "the mask has 5 steps, but 3 calls"),
        ((tiny, mask, calls[0]), "calls is a dict"),
        ((tiny, mask, [[]] * 5), "step 0 is a list"),
        ((tiny, mask, make_calls(batch=3)), r"x = torch.float32\[3, 6, 4\].* captured with torch.float32\[2, 6, 4\]"),
        ((tiny, mask, [{"y": 1}] * 5), "cannot be called like this"),
        ((tiny, fxmask.Mask(torch.ones(5, 1), TIMESTEPS, ["nothing"]), calls), r"does not have: \['nothing'\]"),
        ((tiny, dataclasses.replace(mask, fingerprint="other"), calls), "fingerprint other"),
    ]
    for arguments, message in bad:
        with pytest.raises((fxmask.InputError, fxmask.MaskError), match=message):
            fxmask.diagnose(*arguments)
    ones = fxmask.Mask.ones(tiny, TIMESTEPS)
    accelerated = fxmask.compile(tiny, fxmask.rectify(tiny, ones), backend="eager")
    runs = [
        (accelerated, "another mask"),
        (7, "run is a int"),
        (lambda program, mask, steps: [], "returned 0 results for 5 steps"),
    ]
    for run, message in runs:
        with pytest.raises(fxmask.InputError, match=message):
            fxmask.diagnose(tiny, mask, calls, run=run)
    with pytest.raises(fxmask.InputError, match="step 0 is called at timestep 1, the mask has 900"):
        fxmask.diagnose(tiny, ones, make_calls(timesteps=(1.0, 2.0, 3.0, 4.0, 5.0)), run=accelerated)


# Other ways to run


def test_a_wrong_backend(tiny, mask):
    found = fxmask.diagnose(tiny, mask, make_calls(), run=scaled(run_eagerly, 1.5))
    assert found.culprit == "backend"
    assert found.full_mask_fails
    assert (found.loads, found.blends) == ((), ())
    victim = tiny.branches[1].name
    found = fxmask.diagnose(tiny, mask, make_calls(), run=scaled(run_eagerly, 1.5, victim))
    assert found.culprit == "backend"
    assert not found.full_mask_fails
    assert [block for _, block in found.loads] == [victim]
    assert "run=run" in found.reproducer()


def test_tolerance_is_relative(tiny, mask):
    slightly = scaled(run_eagerly, 1 + 1e-5)
    assert fxmask.diagnose(tiny, mask, make_calls(), run=slightly) is None
    assert fxmask.diagnose(tiny, mask, make_calls(), run=slightly, tolerance=1e-6) is not None
    assert fxmask.diagnose(tiny, mask, make_calls(), run=scaled(run_eagerly, 1.1), tolerance=0.2) is None


def test_an_accelerated_model_with_a_wrong_plan(tiny, mask):
    plan = fxmask.rectify(tiny, mask)
    plan = with_steps(plan, lambda i, s: dataclasses.replace(s, store=s.store[1:]) if i == 2 else s)
    accelerated = fxmask.compile(tiny, plan, backend="eager")
    found = fxmask.diagnose(tiny, mask, make_calls(), run=accelerated)
    assert found.culprit == "rectify"
    assert found.step == 3
    assert found.plan_faults[0].startswith("step 2 does not store")


@pytest.mark.skipif(cpu_compiler_problem() is not None, reason=f"{cpu_compiler_problem()}")
def test_inductor_may_round():
    torch.manual_seed(0)
    program = fxmask.capture(TinyTransformer(depth=1).eval(), make_calls()[0])
    mask = every_other(program)
    accelerated = fxmask.compile(program, fxmask.rectify(program, mask), backend="inductor")
    assert fxmask.diagnose(program, mask, make_calls(), run=accelerated) is None
