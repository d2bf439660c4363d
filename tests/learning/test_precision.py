"""Learning in float32, whatever the model's type and whatever the process allows float32 to be."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import pytest
import torch
from conftest import ddim, labels, tiny_dit

import fxmask
from fxmask import InputError
from fxmask._torch import exact_float32, float32_precisions
from fxmask.learning.precision import exact, wide_copy, widened
from fxmask.learning.refine import STEP, step_for
from fxmask.learning.room import Room


def recorded(model, count=2, steps=4, **options):
    return [
        fxmask.record(model, ddim(), num_inference_steps=steps, batch_size=2, example_inputs=labels, seed=seed, **options)
        for seed in range(count)
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_learns_the_mask_of_its_wide_twin(dtype):
    model = tiny_dit().to(dtype)
    twin = wide_copy(model, torch.float32)
    before = copy.deepcopy(model.state_dict())
    runs = recorded(model)
    program = fxmask.capture(model, runs[0].calls[0][0])
    options = {"speedup": 1.5, "effort": "quick", "progress": False}
    mask = fxmask.learn(program, runs, **options)
    twins = [run.in_type(twin, torch.float32) for run in runs]
    expected = fxmask.learn(fxmask.capture(twin, twins[0].calls[0][0]), twins, **options)
    assert torch.equal(mask.compute, expected.compute)
    assert mask.forecast == expected.forecast
    assert all(torch.equal(x, before[name]) and x.dtype is before[name].dtype for name, x in model.state_dict().items())
    final = runs[0].rollout(fxmask.compile(program, fxmask.rectify(program, mask), backend="eager"))
    assert final.dtype is dtype


def test_one_call_learns_wide_and_runs_narrow(caplog):
    model = tiny_dit().to(torch.bfloat16)
    with caplog.at_level(logging.INFO, "fxmask"):
        accelerated = fxmask.accelerate(
            model,
            ddim(),
            num_inference_steps=4,
            example_inputs=labels,
            effort="quick",
            backend="eager",
            progress=False,
            speedup=1.5,
        )
    assert "learned from a copy of it in torch.float32" in caplog.text
    assert accelerated.original is model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_stochastic_runs_are_recorded_again_with_the_same_noise():
    model = tiny_dit().to(torch.bfloat16)
    (run,) = recorded(model, 1, step_kwargs={"eta": 1.0})
    wide = run.in_type(wide_copy(model, torch.float32), torch.float32)
    assert wide.final.dtype is torch.float32
    assert torch.equal(wide.initial_noise, run.initial_noise.float())
    pairs = [(a, b) for mine, theirs in zip(wide.noises, run.noises, strict=True) for a, b in zip(mine, theirs, strict=False)]
    assert all(torch.equal(a, b.float()) for a, b in pairs)
    assert torch.allclose(wide.final, run.final.float(), atol=0.3)


def test_wide_copies_keep_ties_and_leave_the_model_alone():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).to(torch.float16)
    model[1].weight = model[0].weight
    made = wide_copy(model, torch.float32)
    assert made[1].weight is made[0].weight
    assert made[0].weight.dtype is torch.float32
    assert not made[0].weight.requires_grad
    assert model[0].weight.requires_grad
    assert model[0].weight.dtype is torch.float16


def test_where_no_copy_can_be_had_learning_goes_on_in_the_models_type(caplog):
    model = tiny_dit().to(torch.bfloat16)
    runs = recorded(model)
    program = fxmask.capture(model, runs[0].calls[0][0])
    assert widened(program, runs, torch.float32, Room(1000))[0] is program
    assert "the bound of memory is 1,000" in caplog.text
    assert widened(program, runs, torch.bfloat16, Room())[2] is None
    assert step_for(torch.float32) == STEP < step_for(torch.float16) < step_for(torch.bfloat16)


def test_a_wide_model_is_not_narrowed():
    model = tiny_dit()
    runs = recorded(model)
    program = fxmask.capture(model, runs[0].calls[0][0])
    assert widened(program, runs, torch.float32, Room())[:2] == (program, runs)


def test_unknown_types_are_refused():
    model = tiny_dit()
    runs = recorded(model)
    program = fxmask.capture(model, runs[0].calls[0][0])
    with pytest.raises(InputError, match="learn_dtype"):
        fxmask.learn(program, runs, learn_dtype=torch.int8)


def older():
    torch.set_float32_matmul_precision("high")


def newer():
    torch.backends.fp32_precision = "tf32"


def one_operator():
    torch.backends.cudnn.conv.fp32_precision = "ieee"


@pytest.fixture
def clean_precisions():
    with exact_float32():
        pass
    yield
    torch.backends.fp32_precision = "none"
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"


def state():
    def read(get):
        try:
            return get()
        except RuntimeError:
            return "mixed"

    older_way = read(torch.get_float32_matmul_precision), read(lambda: torch.backends.cudnn.allow_tf32)
    return older_way, float32_precisions(), torch.backends.fp32_precision


@pytest.mark.parametrize("allow", [older, newer, one_operator, lambda: None])
def test_precision_is_exact_inside_and_put_back_after_an_error(allow, clean_precisions):
    allow()
    before = state()

    def fails():
        with torch.autocast("cpu", torch.bfloat16), exact():
            assert set(float32_precisions()) == {"ieee"}
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.is_autocast_enabled("cpu")
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert state() == before


def test_capture_works_whichever_way_precision_was_set(clean_precisions):
    newer()
    model = tiny_dit()
    assert fxmask.capture(model).verified


def test_no_learner_touches_gradients_of_weights():
    model = tiny_dit()
    given = {name: p.requires_grad for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    runs = recorded(model, step_kwargs={"eta": 1.0})
    program = fxmask.capture(model, runs[0].calls[0][0])
    fxmask.learn(program, runs, speedup=1.5, effort="quick", progress=False)
    paper = fxmask.PaperOptions(epochs=1)
    fxmask.learn(program, [replace(runs[0])], speedup=1.5, learner="paper", options=paper, progress=False)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == given
    assert all(bool((p.grad == 7.0).all()) for p in model.parameters())
