"""Recording real pipelines: replays are exact, learning works from them, and the pipeline does what the replay did."""

from __future__ import annotations

import gc
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ddim, tiny_dit, tiny_unet

import fxmask
from fxmask import InputError

pytestmark = pytest.mark.filterwarnings("ignore")  # pipelines warn about themselves

PIPELINES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {}


def pipeline(build: Callable[[], tuple[Any, dict[str, Any]]]) -> Callable[[], tuple[Any, dict[str, Any]]]:
    PIPELINES[build.__name__] = build
    return build


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    yield
    assert not [t.name for t in threading.enumerate() if "fxmask" in t.name]


class Vae(torch.nn.Module):
    """Latents are pixels."""

    def __init__(self) -> None:
        super().__init__()
        channels = (1, 1)
        self.config = SimpleNamespace(scaling_factor=1.0, block_out_channels=channels, latent_channels=4, force_upcast=False)
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def decode(self, latents: torch.Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(sample=latents)


def digits() -> Any:
    pytest.importorskip("transformers")
    pytest.importorskip("sklearn")
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    try:
        import digits as module
    finally:
        sys.path.pop(0)
    return module


# Image


@pipeline
def ddpm() -> tuple[Any, dict[str, Any]]:
    from diffusers import DDPMPipeline, DDPMScheduler

    return DDPMPipeline(unet=tiny_unet(), scheduler=DDPMScheduler()), {"batch_size": 2, "output_type": "np"}


@pipeline
def dit() -> tuple[Any, dict[str, Any]]:
    """Guidance doubles the batch."""
    from diffusers import DiTPipeline

    return DiTPipeline(transformer=tiny_dit(), vae=Vae(), scheduler=ddim()), {"class_labels": [3, 7], "output_type": "np"}


@pipeline
def stable_diffusion() -> tuple[Any, dict[str, Any]]:
    pipe = digits().load_pipeline("ldm")
    return pipe, {"prompt": ["a one", "the digit two"], "guidance_scale": 2.5, "output_type": "latent"}


def small_stable_diffusion() -> tuple[Any, dict[str, Any]]:
    """The same with a smaller denoiser, of random weights."""
    pipe, call = stable_diffusion()
    config = {**pipe.unet.config, "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 4}
    torch.manual_seed(0)
    pipe.unet = type(pipe.unet).from_config({**config, "layers_per_block": 1}).eval()
    return pipe, call


@pipeline
def euler_ancestral() -> tuple[Any, dict[str, Any]]:
    from diffusers import EulerAncestralDiscreteScheduler

    pipe, call = small_stable_diffusion()
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe, call


@pipeline
def heun() -> tuple[Any, dict[str, Any]]:
    """Two denoiser calls for every step but the last one; scales the model's input."""
    from diffusers import HeunDiscreteScheduler

    pipe, call = small_stable_diffusion()
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe, call


@pipeline
def image_to_image() -> tuple[Any, dict[str, Any]]:
    """Starts in the middle, from an encoded image."""
    pipe, call = small_stable_diffusion()
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionImg2ImgPipeline

    pipe = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    image = randn(2, pipe.vae.config.in_channels, size, size).tanh()
    return pipe, {**call, "image": image, "strength": 0.67, "num_inference_steps": 6}


@pipeline
def pixart() -> tuple[Any, dict[str, Any]]:
    options = {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 8, "guidance_scale": 2.5}
    return digits().load_pipeline("pixart"), {"prompt": ["a one", "the digit two"], "output_type": "latent", **options}


@pipeline
def control_net() -> tuple[Any, dict[str, Any]]:
    pipe, call = small_stable_diffusion()
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    torch.manual_seed(0)
    channels = {"conditioning_channels": 1, "conditioning_embedding_out_channels": (8, 8)}
    control = ControlNetModel.from_unet(pipe.unet, load_weights_from_unet=False, **channels).eval()
    for parameter in control.parameters():  # the convolutions that feed the denoiser start at zero
        torch.nn.init.normal_(parameter, std=0.02)
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    parts = {**pipe.components, "controlnet": control, "requires_safety_checker": False}
    return StableDiffusionControlNetPipeline(**parts), {**call, "image": randn(2, 1, size, size).sigmoid()}


@pipeline
def sd3() -> tuple[Any, dict[str, Any]]:
    """Flow matching."""
    pytest.importorskip("transformers")
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        pos_embed_max_size=8,
    ).eval()
    pipe = StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), Vae(), *[None] * 6)
    text = {"prompt_embeds": randn(2, 5, 16), "negative_prompt_embeds": randn(2, 5, 16, seed=1)}
    pooled = {"pooled_prompt_embeds": randn(2, 12), "negative_pooled_prompt_embeds": randn(2, 12, seed=1)}
    return pipe, {**text, **pooled, "height": 8, "width": 8, "output_type": "latent"}


@pipeline
def flux() -> tuple[Any, dict[str, Any]]:
    """Timesteps are divided by 1,000 before the denoiser sees them; latents are packed."""
    pytest.importorskip("transformers")
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    ).eval()
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), Vae(), None, None, None, None, transformer)
    text = {"prompt_embeds": randn(1, 5, 16), "pooled_prompt_embeds": randn(1, 12)}
    return pipe, {**text, "num_images_per_prompt": 2, "height": 8, "width": 8, "output_type": "latent"}


# Video and audio


def _wan_transformer(seed: int = 0) -> torch.nn.Module:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=16,
        ffn_dim=64,
        num_layers=3,
        rope_max_seq_len=32,
    ).eval()


class VideoVae(Vae):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(scale_factor_temporal=4, scale_factor_spatial=8, z_dim=4)


@pipeline
def wan() -> tuple[Any, dict[str, Any]]:
    """Video; conditional and unconditional calls are separate lanes."""
    pytest.importorskip("transformers")
    from diffusers import UniPCMultistepScheduler, WanPipeline

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(None, None, vae=VideoVae(), scheduler=scheduler, transformer=_wan_transformer())
    text = {"prompt_embeds": randn(1, 7, 24), "negative_prompt_embeds": randn(1, 7, 24, seed=1), "num_videos_per_prompt": 2}
    return pipe, {**text, "height": 64, "width": 64, "num_frames": 5, "guidance_scale": 4.0, "output_type": "latent"}


@pipeline
def stable_audio() -> tuple[Any, dict[str, Any]]:
    pytest.importorskip("transformers")
    from diffusers import EDMDPMSolverMultistepScheduler, StableAudioDiTModel, StableAudioPipeline
    from diffusers.pipelines.stable_audio import StableAudioProjectionModel

    torch.manual_seed(0)
    transformer = StableAudioDiTModel(
        sample_size=48,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=32,
        cross_attention_input_dim=16,
    ).eval()
    projection = StableAudioProjectionModel(text_encoder_dim=16, conditioning_dim=16, min_value=0, max_value=32).eval()
    vae = Vae()
    vae.hop_length, vae.sampling_rate = 4, 16
    vae.config.sampling_rate = 16
    vae.config.audio_channels = 1
    scheduler = EDMDPMSolverMultistepScheduler(solver_order=2, prediction_type="v_prediction", sigma_data=1.0)
    pipe = StableAudioPipeline(vae, None, projection, None, transformer, scheduler)
    mask = torch.ones(2, 7, dtype=torch.int64)
    text = {"prompt_embeds": randn(2, 7, 16), "attention_mask": mask, "audio_end_in_s": 8.0, "guidance_scale": 3.0}
    return pipe, {**text, "output_type": "latent"}


STOCHASTIC = ("ddpm", "euler_ancestral")


def record(name: str, **options: Any) -> tuple[Any, Callable[[], Any], fxmask.PipelineTrajectory]:
    pipe, call = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 4, **call, **options}
    before = {key: value for key, value in vars(pipe).items() if not key.startswith("_")}
    trajectory = fxmask.record_pipeline(pipe, **call, generator=generator())
    assert all(vars(pipe)[key] is value for key, value in before.items())
    return pipe, lambda: pipe(**call, generator=generator()), trajectory


def last_latents(pipe: Any, run: Callable[[], Any]) -> torch.Tensor:
    """What the pipeline's own scheduler returns last."""
    results: list[torch.Tensor] = []
    step = pipe.scheduler.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        results.append(fxmask.calls.first_tensor(result))
        return result

    watched.__signature__ = inspect.signature(step)  # which pipelines look at
    pipe.scheduler.step = watched
    try:
        run()
    finally:
        del pipe.scheduler.step
    return results[-1]


@pytest.mark.parametrize("name", PIPELINES)
def test_replay_is_exact(name):
    pipe, run, trajectory = record(name)
    model = getattr(pipe, trajectory.component)
    assert trajectory.denoiser is model
    assert torch.equal(last_latents(pipe, run), trajectory.final), "the recording is what the pipeline does"
    for _ in range(2):
        assert torch.equal(trajectory.rollout(model), trajectory.final)
    assert trajectory.stochastic == (name in STOCHASTIC)
    rows = 4 if name == "dit" else 2  # DiTPipeline gives its scheduler both halves of the guidance batch
    assert trajectory.batch_size == rows == trajectory.final.shape[0]
    assert not trajectory.can_change_steps
    with pytest.raises(InputError, match="num_inference_steps=3"):
        trajectory.with_steps(model, 3)
    for (step, lane), call in zip(trajectory.order, drive(trajectory, trajectory.outputs), strict=True):
        expected = trajectory.calls[step][lane]
        assert call.keys() == expected.keys()
        assert torch.equal(call[trajectory.sample], expected[trajectory.sample])


def drive(trajectory: fxmask.Trajectory, outputs: Any) -> Iterator[dict[str, Any]]:
    """The calls of a replay that is given these predictions."""
    loop = trajectory.loop()
    call = next(loop)
    for step, lane in trajectory.order:
        yield call
        if (step, lane) != trajectory.order[-1]:
            call = loop.send(outputs[step][lane])
    loop.close()


@pytest.mark.parametrize("name", PIPELINES)
def test_learning_and_the_accelerated_pipeline(name):
    pipe, run, trajectory = record(name)
    program = fxmask.capture(trajectory.denoiser, trajectory.calls[0][0], trajectory.roles)
    mask = fxmask.learn(program, trajectory, speedup=1.5, effort="quick")
    plan = fxmask.rectify(program, mask)
    assert plan.mac_ratio == pytest.approx(1.5, rel=0.03)
    accelerated = fxmask.compile(program, plan, backend="eager")
    expected = trajectory.rollout(accelerated)
    assert not torch.equal(expected, trajectory.final)
    setattr(pipe, trajectory.component, accelerated)
    with accelerated.generation():
        latents = last_latents(pipe, run)
    assert torch.equal(latents, expected)


def test_what_is_recorded():
    lanes = {name: record(name)[2] for name in ("wan", "heun", "flux", "image_to_image", "control_net")}
    assert [len(step) for step in lanes["wan"].calls] == [2] * 4
    assert lanes["wan"].order[:3] == ((0, 0), (0, 1), (1, 0))
    assert lanes["heun"].num_steps == 7, "the second call of a second-order step is a step"
    assert lanes["flux"].timesteps[0] == 1.0
    assert lanes["flux"].timesteps[-1] < 1.0
    assert lanes["image_to_image"].num_steps == 4
    assert lanes["image_to_image"].timesteps[0] < 700
    roles = lanes["control_net"].roles
    assert roles["encoder_hidden_states"] == "conditioning"
    assert roles["down_block_additional_residuals"] == roles["mid_block_additional_residual"] == "step"
    assert set(lanes["wan"].roles.values()) == {"conditioning"}
    first, second = (step[0]["encoder_hidden_states"] for step in lanes["wan"].calls[:2])
    assert first is second, "conditioning is kept once"


@pytest.mark.parametrize("name", ["stable_diffusion", "euler_ancestral", "image_to_image", "wan"])
def test_other_noise(name):
    _, _, trajectory = record(name)
    state = torch.get_rng_state()
    model = trajectory.denoiser
    others = [trajectory.renoised(model, seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(others[0].final, others[1].final)
    assert not torch.equal(others[0].final, others[2].final)
    assert not torch.equal(others[0].final, trajectory.final)
    assert torch.equal(others[0].rollout(model), others[0].final)
    assert others[0].timesteps == trajectory.timesteps
    assert abs(float(others[0].initial_noise.std() / trajectory.initial_noise.std()) - 1) < 0.3
    for other in others:
        text = [t.calls[0][0]["encoder_hidden_states"] for t in (other, trajectory)]
        assert torch.equal(*text), "the prompts are the same"


def test_other_noise_where_the_start_was_passed_in():
    _, _, trajectory = record("stable_diffusion", latents=randn(2, 4, 8, 8))
    other = trajectory.renoised(trajectory.denoiser, 1)
    assert not torch.equal(other.initial_noise, trajectory.initial_noise)
    assert torch.equal(other.rollout(other.denoiser), other.final)


def test_what_the_user_does_meanwhile_does_not_matter():
    """Replays in lockstep, from one pipe whose parts are replaced and whose inputs are changed."""
    from diffusers import EulerDiscreteScheduler

    latents = randn(2, 4, 8, 8)
    pipe, _, trajectory = record("stable_diffusion", latents=latents)
    other = trajectory.renoised(trajectory.denoiser, 1)
    model = pipe.unet
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.unet = pipe.text_encoder = None
    latents.zero_()
    loops = [t.loop() for t in (trajectory, other, trajectory)]
    calls = [next(loop) for loop in loops]
    finals = []
    for _ in trajectory.order:
        for n, loop in enumerate(loops):
            try:
                calls[n] = loop.send(model(**calls[n])[0])
            except StopIteration as end:
                finals.append(end.value)
    assert [torch.equal(a, t.final) for a, t in zip(finals, (trajectory, other, trajectory), strict=True)] == [True] * 3


def test_replays_encode_and_decode_nothing():
    pipe, _, trajectory = record("image_to_image", output_type="np")
    seen: list[str] = []
    for part in (next(pipe.text_encoder.children()), pipe.vae.encoder, pipe.vae.decoder):
        part.register_forward_pre_hook(lambda module, _: seen.append(type(module).__name__))
    assert torch.equal(trajectory.rollout(pipe.unet), trajectory.final)
    assert seen == []


def test_progress_bars(capfd):
    pipe, call = stable_diffusion()
    pipe.set_progress_bar_config(desc="mine")
    trajectory = fxmask.record_pipeline(pipe, **call, num_inference_steps=2)
    assert "mine" in capfd.readouterr().err
    trajectory.rollout(pipe.unet)
    trajectory.renoised(pipe.unet, 1)
    assert "mine" not in capfd.readouterr().err
    pipe(**call, num_inference_steps=2)
    assert "mine" in capfd.readouterr().err


# Ends


def test_a_loop_that_is_left():
    _, _, trajectory = record("wan")
    loop = trajectory.loop()
    loop.close()
    loop = trajectory.loop()
    next(loop)
    assert any("fxmask" in t.name for t in threading.enumerate())
    loop.close()
    assert not any("fxmask" in t.name for t in threading.enumerate())
    loop = trajectory.loop()
    next(loop)
    del loop
    gc.collect()
    with pytest.raises(ZeroDivisionError):
        trajectory.rollout(lambda **_: 1 / 0)


def test_errors_inside_the_pipeline_surface():
    pipe, call = stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    fail = False

    def callback(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if fail and step == 1:
            raise LookupError("in the callback")
        return kwargs

    trajectory = fxmask.record_pipeline(pipe, **call, num_inference_steps=3, callback_on_step_end=callback)
    trajectory.rollout(pipe.unet)
    fail = True
    with pytest.raises(LookupError, match="in the callback"):
        trajectory.rollout(pipe.unet)
    with pytest.raises(LookupError, match="in the callback"):
        fxmask.record_pipeline(pipe, **call, num_inference_steps=3, callback_on_step_end=callback)
    assert "forward" not in vars(pipe.unet)
    assert "step" not in vars(pipe.scheduler)


def test_an_accelerated_pipe_is_recorded_with_the_original():
    pipe, _, trajectory = record("stable_diffusion")
    program = fxmask.capture(trajectory.denoiser, trajectory.calls[0][0], trajectory.roles)
    mask = fxmask.policies.interval(2)(program, trajectory.timesteps)
    pipe.unet = fxmask.compile(program, fxmask.rectify(program, mask), backend="eager")
    _, call = stable_diffusion()
    again = fxmask.record_pipeline(pipe, **call, num_inference_steps=4, generator=generator())
    assert torch.equal(again.final, trajectory.final)
    assert again.denoiser is trajectory.denoiser


def test_generators_move_on():
    pipe, call = stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    moving = generator()
    first, second = (fxmask.record_pipeline(pipe, **call, num_inference_steps=2, generator=moving) for _ in range(2))
    assert not torch.equal(first.initial_noise, second.initial_noise)
    assert torch.equal(second.rollout(pipe.unet), second.final)


# Refusals


@pytest.mark.parametrize("component", [None, "transformer", "transformer_2"])
def test_two_denoisers(component):
    pipe, call = wan()
    pipe.register_modules(transformer_2=_wan_transformer(1))
    pipe.register_to_config(boundary_ratio=0.9)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(InputError, match="'transformer(_2)?'.*'transformer(_2)?'.*more than one denoiser"):
        fxmask.record_pipeline(pipe, **call, num_inference_steps=4, component=component)


class Guided:
    """A pipeline of nobody: another network is called after the denoiser, and the scheduler is a class of its own."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.net, self.critic = tiny_unet(), torch.nn.Conv2d(1, 1, 1)

    def __call__(self, steps: int = 3) -> None:
        self.scheduler.set_timesteps(steps)
        x = torch.randn(2, 1, 8, 8)
        for t in self.scheduler.timesteps:
            with torch.no_grad():
                x = self.scheduler.step(self.net(x, t).sample + 0.1 * self.critic(x), t, x).prev_sample


def test_component_is_chosen():
    pipe = Guided(ddim())
    by_default, chosen = fxmask.record_pipeline(pipe), fxmask.record_pipeline(pipe, component="net")
    assert (by_default.component, chosen.component) == ("critic", "net")
    assert torch.equal(chosen.rollout(pipe.net), chosen.final)
    with pytest.raises(InputError, match=r"component='unet' is no module of Guided; it has \['net', 'critic'\]"):
        fxmask.record_pipeline(pipe, component="unet")


class Copying(Guided):
    """Two schedulers, one of them a copy that is made in every call: pictures and sound of one denoiser."""

    def __call__(self, steps: int = 3) -> None:
        other = __import__("copy").deepcopy(self.scheduler)
        x = torch.randn(2, 1, 8, 8)
        for scheduler in (self.scheduler, other):
            scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            with torch.no_grad():
                noise = self.net(x, t).sample
            x = self.scheduler.step(noise, t, x).prev_sample
            other.step(noise, t, x)


def test_two_schedulers_of_one_denoiser():
    pipe = Copying(ddim())
    trajectory = fxmask.record_pipeline(pipe)
    assert trajectory.num_steps == 3
    assert torch.equal(trajectory.rollout(pipe.net), trajectory.final)


def test_no_loop_to_be_seen():
    class Stepless(Guided):
        def __call__(self) -> None:
            self.critic(torch.randn(2, 1, 8, 8))

    with pytest.raises(InputError, match=r"never called scheduler.step.*\['critic'\].*fxmask.record\("):
        fxmask.record_pipeline(Stepless(ddim()))
    with pytest.raises(InputError, match="pipe must be a pipeline.*got UNet2DModel"):
        fxmask.record_pipeline(tiny_unet())
    with pytest.raises(InputError, match="pipe must be a pipeline"):
        fxmask.record_pipeline("pipe")


def test_no_noise_no_other_noise():
    class Fixed(Guided):
        def __call__(self, x: torch.Tensor) -> None:
            self.scheduler.set_timesteps(3)
            x = x.flip(0)
            for t in self.scheduler.timesteps:
                with torch.no_grad():
                    x = self.scheduler.step(self.net(x, t).sample, t, x).prev_sample

    trajectory = fxmask.record_pipeline(Fixed(ddim()), randn(2, 1, 8, 8))
    assert torch.equal(trajectory.rollout(trajectory.denoiser), trajectory.final)
    with pytest.raises(InputError, match="draws no noise"):
        trajectory.renoised(trajectory.denoiser, 1)


def test_guidance_that_starts_midway_is_recorded_but_not_learned_from():
    class Uneven(Guided):
        def __call__(self, steps=6):
            self.scheduler.set_timesteps(steps)
            x = torch.randn(2, 1, 8, 8)
            for i, t in enumerate(self.scheduler.timesteps):
                with torch.no_grad():
                    e = self.net(x, t).sample
                    if i > 2:
                        e = e + 0.1 * self.net(x + 1, t).sample
                    x = self.scheduler.step(e, t, x).prev_sample

    pipe = Uneven(ddim())
    trajectory = fxmask.record_pipeline(pipe)
    assert torch.equal(trajectory.rollout(pipe.net), trajectory.final)
    program = fxmask.capture(pipe.net, trajectory.calls[0][0], trajectory.roles)
    with pytest.raises(fxmask.InputError, match="starts or stops midway"):
        fxmask.learn(program, trajectory, speedup=1.5, effort="quick")
