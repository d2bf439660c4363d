"""Inside real diffusers pipelines."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import ddim, tiny_dit, tiny_unet

import fxmask

pytestmark = pytest.mark.filterwarnings("ignore")  # pipelines warn about themselves; our own warnings are asked for by name


def accelerate(model: torch.nn.Module, scheduler: object, steps: int, **options: object) -> fxmask.AcceleratedModel:
    trajectory = fxmask.record(model, scheduler, num_inference_steps=steps, batch_size=2, **options)
    program = fxmask.capture(model, trajectory.calls[0][0])
    mask = fxmask.policies.interval(2)(program, trajectory.timesteps)
    return fxmask.compile(program, fxmask.rectify(program, mask), backend="eager")


def cached_calls(accelerated: fxmask.AcceleratedModel) -> list[int]:
    """Count the nodes that run, by watching the executor."""
    counts: list[int] = []
    for executor in [accelerated.executor]:
        original = executor.run_step
        executor.run_step = lambda step, *a, o=original, e=executor: (counts.append(len(e.plan.steps[step].load)), o(step, *a))[
            1
        ]
    return counts


@pytest.mark.parametrize("name", ["DDPMPipeline", "DDIMPipeline"])
def test_unconditional_pipelines(name):
    import diffusers

    model = tiny_unet()
    scheduler = diffusers.DDPMScheduler() if name == "DDPMPipeline" else ddim()
    pipe = getattr(diffusers, name)(unet=model, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)

    def sample() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.as_tensor(pipe(batch_size=2, generator=generator, num_inference_steps=6, output_type="np").images)

    full = sample()
    accelerated = accelerate(model, pipe.scheduler, 6)
    pipe.unet = accelerated
    counts = cached_calls(accelerated)
    first = sample()
    assert [count > 0 for count in counts] == [False, True] * 3
    assert torch.equal(first, sample()), "the second image does not see the first one's caches"
    assert not torch.equal(first, full)
    with accelerated.generation():
        assert torch.equal(first, sample())


class IdentityVae(torch.nn.Module):
    """What DiTPipeline needs of a VAE: latents are pixels."""

    config = SimpleNamespace(scaling_factor=1.0)
    dtype = torch.float32
    device = torch.device("cpu")

    def decode(self, latents: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=latents)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_dit_pipeline(guidance_scale):
    """Classifier-free guidance doubles the batch; the null class is 1000."""
    from diffusers import DiTPipeline

    model = tiny_dit()
    pipe = DiTPipeline(transformer=model, vae=IdentityVae(), scheduler=ddim())
    pipe.set_progress_bar_config(disable=True)

    def sample() -> torch.Tensor:
        result = pipe([3, 7], guidance_scale, torch.Generator().manual_seed(0), num_inference_steps=6, output_type="np")
        return torch.as_tensor(result.images)

    full = sample()
    conditioning = {"class_labels": torch.tensor([3, 7])}
    accelerated = accelerate(model, pipe.scheduler, 6, example_inputs=conditioning)
    pipe.transformer = accelerated
    first = sample()
    assert torch.equal(first, sample())
    assert not torch.equal(first, full)
    ones = fxmask.Mask.ones(accelerated.program, accelerated.mask.timesteps)
    pipe.transformer = fxmask.compile(accelerated.program, fxmask.rectify(accelerated.program, ones), backend="eager")
    assert torch.equal(sample(), full)


def test_save_pretrained_saves_the_original(tmp_path):
    from diffusers import DDIMPipeline

    model = tiny_unet()
    pipe = DDIMPipeline(unet=model, scheduler=ddim())
    pipe.unet = accelerate(model, pipe.scheduler, 4)
    pipe.save_pretrained(tmp_path)
    again = DDIMPipeline.from_pretrained(tmp_path)
    assert type(again.unet) is type(model)
    assert all(torch.equal(a, b) for a, b in zip(again.unet.state_dict().values(), model.state_dict().values(), strict=True))


def test_from_pipe_takes_the_accelerated_model():
    """diffusers looks whether ``type(unet)`` is the class that it expects."""
    from diffusers import AutoPipelineForImage2Image, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
    from pipelines import small_stable_diffusion

    pipe, call = small_stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    run = fxmask.record_pipeline(pipe, **call, num_inference_steps=4)
    program = fxmask.capture(run.denoiser, run.calls[0][0], roles=run.roles)
    mask = fxmask.policies.interval(2)(program, run.timesteps)
    accelerated = pipe.unet = fxmask.compile(program, fxmask.rectify(program, mask), backend="eager")
    for cls in (StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, AutoPipelineForImage2Image):
        assert cls.from_pipe(pipe).unet is accelerated
    again = StableDiffusionPipeline.from_pipe(StableDiffusionImg2ImgPipeline.from_pipe(pipe))
    again.set_progress_bar_config(disable=True)
    images = [p(**call, num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images for p in (pipe, again)]
    assert torch.equal(*images)


def test_the_class_of_an_accelerated_model():
    import copy
    import pickle

    unet, dit = tiny_unet(), tiny_dit()
    accelerated = accelerate(unet, ddim(), 3)
    other = accelerate(dit, ddim(), 3, example_inputs={"class_labels": torch.tensor([3, 7])})
    for model, original in ((accelerated, unet), (other, dit)):
        assert isinstance(model, fxmask.AcceleratedModel)
        assert isinstance(model, type(original))
        assert type(model) == type(original)  # noqa: E721 (as libraries compare it)
        assert type(original) in {type(model): 0}
    assert type(accelerated) != type(other)  # noqa: E721
    assert type(accelerated) is not fxmask.AcceleratedModel
    for again in (copy.deepcopy(accelerated), pickle.loads(pickle.dumps(accelerated))):
        assert type(again) is type(accelerated)
        assert again.plan == accelerated.plan
    assert {"report", "original", "save"} <= set(dir(accelerated))


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"])
def test_second_order_solver(name):
    """DeepCache sees Heun's steps as 0, 1, 1, 3, 3, ...; here each call is a step of its own."""
    import diffusers

    model, scheduler = tiny_unet(), getattr(diffusers, name)()
    trajectory = fxmask.record(model, scheduler, num_inference_steps=4, batch_size=2)
    assert trajectory.num_steps == 7
    assert torch.equal(trajectory.rollout(model), trajectory.final)
    accelerated = accelerate(model, scheduler, 4)
    expected = fxmask.reference.run(accelerated.program, accelerated.mask, trajectory)
    for _ in range(2):
        got = [accelerated(**call).sample for (call,) in trajectory.calls]
        assert all(torch.equal(a, b.sample) for a, b in zip(got, expected, strict=True))


def test_no_warning_of_ours_in_ordinary_use():
    from diffusers import DDIMPipeline

    model = tiny_unet()
    pipe = DDIMPipeline(unet=model, scheduler=ddim())
    pipe.set_progress_bar_config(disable=True)
    pipe.unet = accelerate(model, pipe.scheduler, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            pipe(batch_size=2, num_inference_steps=4)
    assert [w for w in caught if "fxmask" in w.filename or "accelerated" in str(w.message)] == []
