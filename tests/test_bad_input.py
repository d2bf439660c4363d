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
