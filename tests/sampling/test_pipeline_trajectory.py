"""Recording real pipelines: replays are exact, learning works from them, and the pipeline does what the replay did."""

from __future__ import annotations

import gc
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import ddim, tiny_unet
from pipelines import PIPELINES, STOCHASTIC, generator, randn, record, stable_diffusion, wan, wan_transformer

import fxmask
from fxmask import InputError
from fxmask.ir.outputs import first_tensor
from fxmask.sampling.sampler import ChangesSteps

pytestmark = pytest.mark.filterwarnings("ignore")  # pipelines warn about themselves


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    yield
    assert not [t.name for t in threading.enumerate() if "fxmask" in t.name]


def last_latents(pipe: Any, run: Callable[[], Any]) -> torch.Tensor:
    """What the pipeline's own scheduler returns last."""
    results: list[torch.Tensor] = []
    step = pipe.scheduler.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        results.append(first_tensor(result))
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
    assert isinstance(trajectory, fxmask.Sampler)
    assert isinstance(trajectory, ChangesSteps)
    assert trajectory.can_change_steps == (name not in STOCHASTIC), "with injected noise there is no run from the same noise"
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
    program = fxmask.capture(trajectory.denoiser, trajectory.calls[0][0], roles=trajectory.roles)
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


@pytest.mark.parametrize("name", ["dit", "heun", "image_to_image", "wan"])
def test_the_same_call_with_other_steps(name):
    _, _, trajectory = record(name)
    model, steps = trajectory.denoiser, trajectory.num_steps
    before = torch.get_rng_state()
    same, fewer = trajectory.with_steps(model, steps), trajectory.with_steps(model, steps // 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(same.final, trajectory.final)
    assert fewer.num_steps == steps // 2
    assert fewer.final.shape == trajectory.final.shape
    assert not torch.equal(fewer.final, trajectory.final)
    assert torch.equal(fewer.rollout(model), fewer.final)
    if name in ("dit", "wan"):  # the others scale noise by where they start, or make two calls a step
        assert torch.equal(fewer.initial_noise, trajectory.initial_noise)
        assert torch.equal(fewer.with_steps(model, steps).final, trajectory.final)


@pytest.mark.parametrize("extra", [{"timesteps": [900, 500, 100]}, {"eta": 1.0}])
def test_calls_whose_steps_cannot_change(extra):
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    pipe, call = stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = (DDIMScheduler if "eta" in extra else DPMSolverMultistepScheduler).from_config(pipe.scheduler.config)
    trajectory = fxmask.record_pipeline(pipe, **{"num_inference_steps": 3, **call, **extra}, generator=generator())
    assert not trajectory.can_change_steps
    with pytest.raises(InputError, match="cannot be made with another number of steps"):
        trajectory.with_steps(trajectory.denoiser, 2)


def test_one_of_two_denoisers_cannot_change_its_steps():
    pipe, call = two_denoisers()
    for name in ("transformer", "transformer_2"):
        assert not fxmask.record_pipeline(pipe, **call, component=name, generator=generator()).can_change_steps


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
    program = fxmask.capture(trajectory.denoiser, trajectory.calls[0][0], roles=trajectory.roles)
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


def two_denoisers() -> tuple[Any, dict[str, Any]]:
    """One for the first two of six steps, another for the rest."""
    pipe, call = wan()
    pipe.register_modules(transformer_2=wan_transformer(1))
    pipe.register_to_config(boundary_ratio=0.9)
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**call, "num_inference_steps": 6}


def test_two_denoisers_are_asked_for_by_name():
    pipe, call = two_denoisers()
    with pytest.raises(InputError, match=r"more than one denoiser.*component='transformer'\) and component='transformer_2'"):
        fxmask.record_pipeline(pipe, **call)
    with pytest.raises(InputError, match=r"component='vae' is called in no step of the sampler; it called \['transformer"):
        fxmask.record_pipeline(pipe, **call, component="vae")


def test_each_of_two_denoisers_by_itself():
    pipe, call = two_denoisers()
    names = ("transformer", "transformer_2")
    whole = last_latents(pipe, lambda: pipe(**call, generator=generator()))
    runs = [fxmask.record_pipeline(pipe, **call, component=name, generator=generator()) for name in names]
    first, second = runs
    assert [run.denoiser for run in runs] == [pipe.transformer, pipe.transformer_2]
    assert (first.num_steps, second.num_steps) == (2, 4)
    assert min(first.timesteps) > 900 > max(second.timesteps)
    assert torch.equal(first.final, second.initial_noise), "what one hands on, the other is handed"
    assert torch.equal(second.final, whole)
    called: list[str] = []
    for name in names:
        getattr(pipe, name).blocks[0].register_forward_pre_hook(lambda *_, name=name: called.append(name))
    for run in runs:
        called.clear()
        assert torch.equal(run.rollout(run.denoiser), run.final)
        assert set(called) == {run.component}, "the other one's steps are played back, or not reached"
    other = second.renoised(second.denoiser, 1)
    assert not torch.equal(other.final, second.final)
    assert torch.equal(other.rollout(other.denoiser), other.final)


def test_other_noise_of_the_second_denoiser_where_the_start_was_passed_in():
    pipe, call = two_denoisers()
    call["latents"] = randn(2, 4, 2, 8, 8)
    run = fxmask.record_pipeline(pipe, **call, component="transformer_2")
    assert not torch.equal(run.renoised(run.denoiser, 1).final, run.final)


def test_both_denoisers_are_accelerated():
    pipe, call = two_denoisers()
    whole = last_latents(pipe, lambda: pipe(**call, generator=generator()))
    for name in ("transformer", "transformer_2"):
        run = fxmask.record_pipeline(pipe, **call, component=name, generator=generator())
        program = fxmask.capture(run.denoiser, run.calls[0][0], roles=run.roles)
        mask = fxmask.policies.interval(2)(program, run.timesteps)
        setattr(pipe, name, fxmask.compile(program, fxmask.rectify(program, mask), backend="eager"))
    got = last_latents(pipe, lambda: pipe(**call, generator=generator()))
    assert 0 < float((got - whole).norm() / whole.norm()) < 0.1
    for accelerated in (pipe.transformer, pipe.transformer_2):
        assert all(r.followed == r.calls - 1 for r in accelerated.report().runs)


@pytest.mark.parametrize("how", ["torch.compile", "in place"])
def test_a_compiled_denoiser_is_recorded_as_it_was(how):
    pipe, _, trajectory = record("stable_diffusion")
    _, call = stable_diffusion()
    original = pipe.unet
    if how == "in place":
        pipe.unet.compile(backend="eager")
    else:
        pipe.unet = torch.compile(pipe.unet, backend="eager")
        pipe.text_encoder = torch.compile(pipe.text_encoder, backend="eager")
    again = fxmask.record_pipeline(pipe, **call, num_inference_steps=4, generator=generator())
    assert again.denoiser is original
    assert torch.equal(again.final, trajectory.final)
    program = fxmask.capture(pipe.unet, again.calls[0][0], roles=again.roles)
    assert program.model is original


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
    program = fxmask.capture(pipe.net, trajectory.calls[0][0], roles=trajectory.roles)
    with pytest.raises(fxmask.InputError, match="starts or stops midway"):
        fxmask.learn(program, trajectory, speedup=1.5, effort="quick")
