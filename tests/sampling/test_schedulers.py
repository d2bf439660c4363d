"""Schedulers of every kind: each works, or says what to pass."""

from __future__ import annotations

import types

import pytest
import torch
from conftest import ddim, tiny_unet

import fxmask
from fxmask import InputError, SchedulerError
from fxmask.sampling.same_sampler import cannot_make, describe_difference, sampler_facts


@pytest.fixture(scope="module")
def model():
    return tiny_unet()


def make(name, **config):
    import diffusers

    return getattr(diffusers, name)(**config)


def record(model, scheduler, steps=4, **options):
    return fxmask.record(model, scheduler, num_inference_steps=steps, batch_size=2, **options)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("LCMScheduler", 1),
        ("LCMScheduler", 2),
        ("TCDScheduler", 4),
        ("DDIMScheduler", 1),
        ("EDMEulerScheduler", 4),
        ("EDMDPMSolverMultistepScheduler", 4),
        ("FlowMatchEulerDiscreteScheduler", 4),
        ("FlowMatchHeunDiscreteScheduler", 3),
        ("PNDMScheduler", 4),
        ("SASolverScheduler", 4),
        ("UniPCMultistepScheduler", 4),
        ("CogVideoXDDIMScheduler", 4),
        ("IPNDMScheduler", 4),
    ],
)
def test_replay_is_exact(model, name, steps):
    run = record(model, make(name), steps)
    assert torch.equal(run.rollout(model), run.final)
    assert bool(run.final.isfinite().all())


def test_timesteps_that_are_shifted_by_the_size_of_the_image(model):
    flow = make("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True)
    with pytest.raises(
        SchedulerError, match=r"set_timesteps\(4\) fails: `mu` must be passed.*scheduler_kwargs=\{'mu': \.\.\.\}"
    ):
        record(model, flow)
    run, other = (record(model, flow, scheduler_kwargs={"mu": mu}) for mu in (1.15, 0.5))
    assert run.timesteps != other.timesteps
    assert torch.equal(run.rollout(model), run.final)
    assert run.renoised(model, 1).timesteps == run.timesteps
    assert run.with_steps(model, 2).num_steps == 2
    mask = fxmask.policies.interval(2)(fxmask.capture(model, run.calls[0][0]), run.timesteps)
    with pytest.raises(SchedulerError, match="scheduler_kwargs"):
        fxmask.accelerate(model, flow, num_inference_steps=4, mask=mask, progress=False)
    accelerated = fxmask.accelerate(
        model, flow, num_inference_steps=4, mask=mask, scheduler_kwargs={"mu": 1.15}, backend="eager", progress=False
    )
    assert accelerated.mask.timesteps == run.timesteps


def test_timesteps_of_ones_own(model):
    run = record(model, make("FlowMatchEulerDiscreteScheduler"), scheduler_kwargs={"sigmas": [1.0, 0.5, 0.25]})
    assert run.timesteps == (1000.0, 500.0, 250.0)
    assert not run.can_change_steps
    assert record(model, make("DDPMScheduler"), scheduler_kwargs={"timesteps": [900, 500]}).timesteps == (900.0, 500.0)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (
            "RePaintScheduler",
            {},
            InputError,
            r"step needs \['original_image', 'mask'\].*step_kwargs=\{'original_image': \.\.\.",
        ),
        ("RePaintScheduler", {"steps": 20}, SchedulerError, "goes back in time.*record_pipeline"),
        ("CogVideoXDPMScheduler", {}, InputError, r"needs \['timestep_back', 'sample'\].*record_pipeline"),
        ("DDIMScheduler", {"step_kwargs": {"gamma": 1}}, InputError, r"step does not take \['gamma'\], it takes.*'eta'"),
        (
            "DDIMScheduler",
            {"scheduler_kwargs": {"mu": 1}},
            InputError,
            r"set_timesteps does not take \['mu'\].*scheduler_kwargs",
        ),
        ("DDIMScheduler", {"steps": 0}, SchedulerError, r"set_timesteps\(0\) fails.*another number of steps"),
        ("PNDMScheduler", {"steps": 2}, SchedulerError, r"set_timesteps\(2\) fails.*another number of steps"),
        ("EntropyBoundScheduler", {}, SchedulerError, r"made int64.*of a sample that was float32.*record_pipeline"),
    ],
)
def test_what_cannot_be_recorded_says_what_to_do(model, name, options, error, message):
    with pytest.raises(error, match=f"(?s){name}.*{message}"):
        record(model, make(name), **{"steps": 4, **options})


def test_extra_arguments_of_step_are_passed_on(model):
    known = {"original_image": torch.zeros(2, 1, 8, 8), "mask": torch.ones(2, 1, 8, 8)}
    run = record(model, make("RePaintScheduler"), 12, step_kwargs=known, scheduler_kwargs={"jump_n_sample": 1})
    assert run.num_steps == 12
    assert torch.equal(run.rollout(model), run.final)


def test_a_step_that_fails_is_told_apart_from_ours(model):
    def fail(output, timestep, sample):
        raise ZeroDivisionError("inside")

    scheduler = types.SimpleNamespace(timesteps=[3, 2], step=fail)
    with pytest.raises(SchedulerError, match=r"step fails at timestep 3, for the sample float32\[2, 1, 8, 8\].*inside"):
        record(model, scheduler)
    with pytest.raises(InputError, match="has no set_timesteps"):
        record(model, scheduler, scheduler_kwargs={"mu": 1})


def test_facts_about_a_sampler(model):
    run = record(model, ddim(), step_kwargs={"eta": 1.0})
    facts = sampler_facts(run)
    assert (facts["scheduler"]["class"], facts["num_inference_steps"]) == ("DDIMScheduler", 4)
    assert facts["scheduler_timesteps"] == list(run.timesteps)
    assert facts["step_kwargs"] == {"eta": 1.0}
    flow = make("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True)
    shifted = sampler_facts(record(model, flow, scheduler_kwargs={"mu": 1.15}))
    assert shifted["scheduler_kwargs"] == {"mu": 1.15}
    assert shifted["scheduler_timesteps"] is not None
    unknown = record(model, flow, scheduler_kwargs={"mu": torch.tensor(1.15)})
    assert sampler_facts(unknown)["scheduler_timesteps"] is None, "they cannot be made again"
    assert sampler_facts(object()) is None
    same, other = record(model, ddim(), step_kwargs={"eta": 1.0}, seed=1), record(model, ddim())
    assert describe_difference(run, same) is None
    assert describe_difference(run, other) == "eta 1.0 and None"


@pytest.mark.parametrize(
    ("timesteps", "scheduler", "refused"),
    [
        ((750, 500, 250, 0), ddim(), False),
        ((750, 500, 250, 0), ddim(timestep_spacing="trailing"), True),
        ((250, 0), ddim(), False),  # image to image: the end of a longer run
        ((0.75, 0.5, 0.25, 0.0), ddim(), False),  # the denoiser is given thousandths
        ((0.987, 0.9, 0.5, 0.1), ddim(), False),  # of something else: nobody can tell
        ((1.0, 0.75, 0.5, 0.25), "FlowMatchEulerDiscreteScheduler", False),  # sigmas that pipelines pass
        ((1.0, 0.9, 0.5, 0.25), "FlowMatchEulerDiscreteScheduler", True),
        ((999, 666, 666, 333, 333, 0, 0), "HeunDiscreteScheduler", False),  # two calls a step
        ((999, 666, 333, 0), "HeunDiscreteScheduler", True),
    ],
)
def test_timesteps_of_a_plan_that_does_not_know_its_scheduler(timesteps, scheduler, refused):
    scheduler = make(scheduler) if isinstance(scheduler, str) else scheduler
    assert (cannot_make(scheduler, timesteps) is not None) is refused
