"""Bad input to the public call: each message names the remedy."""

from __future__ import annotations

import types

import pytest
import torch
from conftest import TinyTransformer, ddim, labels, tiny_dit, tiny_unet

import fxmask


def test_two_outcomes():
    with pytest.raises(fxmask.OutcomeError, match=r"drop all but one of speedup, macs, max_error"):
        fxmask.accelerate(tiny_unet(), ddim(), speedup=2.0, macs=0.5)


def test_an_outcome_beside_a_mask():
    mask = fxmask.Mask([[1]], [0], ["a"])
    with pytest.raises(fxmask.OutcomeError, match=r"drop speedup="):
        fxmask.accelerate(tiny_unet(), ddim(), speedup=2.0, mask=mask)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (types.SimpleNamespace(step=lambda *a: None), "no timesteps"),
        (types.SimpleNamespace(timesteps=[1, 0]), r"no step\(\) method"),
        (types.SimpleNamespace(step=lambda *a: None, timesteps=[]), "no timesteps"),
    ],
)
def test_scheduler_without_what_sampling_needs(scheduler, message):
    with pytest.raises(fxmask.SchedulerError, match=message):
        fxmask.accelerate(tiny_unet(), scheduler)


def test_conditioning_that_cannot_be_inferred():
    with pytest.raises(fxmask.InputError, match=r"(?s)class_labels.*example_inputs"):
        fxmask.accelerate(tiny_dit(), ddim())


def test_required_conditioning_is_asked_for_by_name():
    class Conditional(TinyTransformer):
        def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return super().forward(x + text, t)

    with pytest.raises(fxmask.InputError, match=r"needs \['text'\].*example_inputs=\{'text'"):
        fxmask.accelerate(Conditional().eval(), ddim(), example_inputs={"x": torch.randn(2, 6, 4)})


def test_sample_shape_that_cannot_be_inferred():
    with pytest.raises(fxmask.InputError, match=r"shape of 'x' cannot be inferred.*example_inputs=\{'x': tensor\}"):
        fxmask.accelerate(TinyTransformer().eval(), ddim())


def test_unknown_example_input():
    with pytest.raises(fxmask.InputError, match=r"has \['prompt'\], which"):
        fxmask.accelerate(tiny_unet(), ddim(), example_inputs={"prompt": torch.zeros(1)})
    with pytest.raises(fxmask.InputError, match="must be a dict"):
        fxmask.accelerate(tiny_unet(), ddim(), example_inputs=3)


def test_training_mode():
    with pytest.raises(fxmask.InputError, match=r"training mode.*model\.eval\(\)"):
        fxmask.accelerate(tiny_unet().train(), ddim())


def test_mask_of_the_wrong_shape():
    with pytest.raises(fxmask.MaskError, match=r"shape \(2, 2\).*need \(3, 1\)"):
        fxmask.Mask(torch.ones(2, 2), [3, 2, 1], ["a"])


def test_mask_for_other_steps():
    model = tiny_unet()
    trajectory = fxmask.record(model, ddim(), num_inference_steps=4, batch_size=2)
    program = fxmask.capture(model, trajectory.calls[0][0])
    mask = fxmask.policies.interval(2)(program, trajectory.timesteps)
    with pytest.raises(fxmask.MaskError, match="num_inference_steps"):
        fxmask.accelerate(model, ddim(), num_inference_steps=5, mask=mask, backend="eager")


def test_speedup_out_of_reach():
    with pytest.raises(fxmask.OutcomeError, match="out of reach"):
        fxmask.accelerate(tiny_unet(), ddim(), num_inference_steps=4, speedup=1000, progress=False)


def test_unknown_backend_is_noticed_before_learning():
    with pytest.raises(fxmask.BackendError, match="choose one of"):
        fxmask.accelerate(tiny_unet(), ddim(), backend="onnx")


def test_no_model():
    with pytest.raises(fxmask.InputError, match="must be a torch.nn.Module"):
        fxmask.accelerate(lambda x, t: x, ddim())


def test_step_kwargs_that_the_scheduler_does_not_take():
    with pytest.raises(fxmask.InputError, match="does not take"):
        fxmask.accelerate(tiny_dit(), ddim(), example_inputs=labels, step_kwargs={"nothing": 1})


@pytest.fixture(scope="module")
def parts():
    """A pipeline-like object, and what the stages make of it."""
    model = tiny_unet()
    run = fxmask.record(model, ddim(), num_inference_steps=4, batch_size=2)
    program = fxmask.capture(model, run.calls[0][0])
    mask = fxmask.policies.interval(2)(program, run.timesteps)

    class Pipe:
        def __init__(self):
            self.vae, self.unet, self.scheduler = torch.nn.Identity(), model, ddim()

        def __call__(self):
            """Never called."""

    return Pipe(), model, run, program, mask, fxmask.rectify(program, mask)


RIGHT = r"fxmask\.accelerate\(pipe\)\. Or record.*record_pipeline\(pipe, \.\.\.\)"
SLIPS = {
    "accelerate(pipe, scheduler)": (lambda p, *_: fxmask.accelerate(p, p.scheduler, speedup=2.0), "a scheduler of its own"),
    "accelerate(pipe, effort)": (lambda p, *_: fxmask.accelerate(p, effort="quick"), r"Pipe cannot be .*example_calls=\[\{"),
    "accelerate(model)": (lambda p, m, *_: fxmask.accelerate(m, speedup=2.0), "no scheduler was given; pass a diffusers"),
    "accelerate(model, pipe)": (lambda p, m, *_: fxmask.accelerate(m, p), r"Pipe has no step.*pass its scheduler, pipe\.sch"),
    "record(pipe)": (lambda p, *_: fxmask.record(p, p.scheduler), RIGHT),
    "record(model)": (lambda p, m, *_: fxmask.record(m), "no scheduler was given"),
    "capture(pipe)": (lambda p, *_: fxmask.capture(p), RIGHT),
    "capture(run)": (lambda p, m, run, *_: fxmask.capture(m, run), r"pass run\.calls\[0\]\[0\]"),
    "capture(lanes)": (lambda p, m, run, *_: fxmask.capture(m, run.calls[0]), r"got tuple.*pass run\.calls\[0\]\[0\]"),
    "load(pipe)": (lambda p, *_: fxmask.load("folder", p), r"no plans of a pipeline; fxmask\.save\(pipe"),
    "load(model, folder)": (lambda p, m, *_: fxmask.load(m, "folder"), r"folder comes first: fxmask\.load\(folder, model"),
    "rectify(program, plan)": (lambda p, m, r, program, mask, plan: fxmask.rectify(program, plan), "Plan; a plan is rectified"),
    "rectify(program, rows)": (
        lambda p, m, r, g, mask, _: fxmask.rectify(g, mask.compute),
        "must be a fxmask.Mask, got Tensor",
    ),
    "compile(program, mask)": (lambda p, m, r, g, mask, _: fxmask.compile(g, mask), r"rectify\(program, mask\)"),
    "compile(model, plan)": (lambda p, m, r, g, mask, plan: fxmask.compile(m, plan), r"compile\(fxmask.capture"),
    "learn(model, run)": (lambda p, m, run, *_: fxmask.learn(m, run), r"learn\(fxmask.capture"),
    "learn(speedup='2')": (lambda p, m, run, g, *_: fxmask.learn(g, run, speedup="2"), "must be a number, got str"),
    "pareto(speedups=2)": (lambda p, m, run, g, *_: fxmask.pareto(g, run, speedups=2.0), r"speedups=\(1\.5, 2\.0\)"),
    "interval(program, run)": (lambda p, m, run, g, *_: fxmask.policies.interval(2)(g, run), r"pass run\.timesteps"),
    "Mask.ones(program, run)": (lambda p, m, run, g, *_: fxmask.Mask.ones(g, run), r"pass run\.timesteps"),
    "rollout(program)": (lambda p, m, run, g, *_: run.rollout(g), "what fxmask.compile makes"),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_slips_are_told_the_right_call(parts, slip):
    call, message = SLIPS[slip]
    with pytest.raises(fxmask.FxmaskError, match=f"(?s){message}"):
        call(*parts)


def test_backend_may_be_given_by_position(parts):
    *_, program, _, plan = parts
    assert fxmask.compile(program, plan, "eager").how_compiled == ("eager", None)


@pytest.mark.parametrize("wrap", [torch.compile, None])
def test_an_accelerated_or_compiled_model_is_taken_for_its_original(parts, wrap):
    _, model, run, program, _, plan = parts
    wrapped = torch.compile(model) if wrap else fxmask.compile(program, plan, backend="eager")
    assert fxmask.capture(wrapped, run.calls[0][0]).model is model
    assert torch.equal(fxmask.record(wrapped, ddim(), num_inference_steps=4, batch_size=2).final, run.final)


@pytest.mark.parametrize("batch", [3, 12])  # one alone is broadcast
def test_conditioning_of_another_batch(batch):
    given = {"class_labels": torch.zeros(batch, dtype=torch.int64)}
    with pytest.raises(
        fxmask.InputError, match=rf"not for a batch of 8.*class_labels: int64 \[{batch}\].*function \(batch_size"
    ):
        fxmask.accelerate(tiny_dit(), ddim(), example_inputs=given, num_inference_steps=2, progress=False)


def test_scheduler_is_left_as_it_was():
    scheduler = ddim()
    before = dict(vars(scheduler))
    fxmask.record(tiny_unet(), scheduler, num_inference_steps=4, batch_size=2)
    assert scheduler.num_inference_steps == before["num_inference_steps"]
    assert scheduler.timesteps is before["timesteps"]


def test_every_error_has_one_root():
    for name in fxmask.__all__:
        value = getattr(fxmask, name)
        if isinstance(value, type) and issubclass(value, Exception):
            assert issubclass(value, fxmask.FxmaskError)
