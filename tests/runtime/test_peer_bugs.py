"""Bugs seen in other caching libraries, each a test here."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from conftest import TIMESTEPS, TinyTransformer, ddim, every_other, make_calls, tiny_dit, tiny_unet

import fxmask


def accelerate(program: fxmask.Program, timesteps: tuple[float, ...] = TIMESTEPS) -> fxmask.AcceleratedModel:
    return fxmask.compile(program, fxmask.rectify(program, every_other(program, timesteps)), backend="eager")


def same(got: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_three_identical_runs_are_identical(tiny):
    """A bare transformer that starts a new image on the previous image's cache."""
    accelerated, calls = accelerate(tiny), make_calls()
    runs = [[accelerated(**call) for call in calls] for _ in range(3)]
    assert same(runs[0], runs[1])
    assert same(runs[0], runs[2])


def test_separate_conditional_calls_do_cache(dit_trajectory, dit_program):
    """A flag that is unset, and silently nothing is cached. Here lanes are found; each lane caches."""
    _, trajectory = dit_trajectory
    accelerated = accelerate(dit_program, trajectory.timesteps)
    null = torch.full((2,), 1000)
    full = [dit_program.model(**call).sample for (call,) in trajectory.calls]
    got = []
    for (call,) in trajectory.calls:
        got.append(accelerated(**call).sample)
        accelerated(**{**call, "class_labels": null})
    assert torch.equal(got[2], full[2])
    assert not torch.equal(got[1], full[1])
    assert not torch.equal(got[3], full[3])


def test_start_of_an_img2img_run_does_not_stick(tiny):
    """After an img2img run a start step that sticks makes later images use a stale cache."""
    accelerated, calls = accelerate(tiny), make_calls()
    for call in calls[2:]:
        accelerated(**call)
    assert same([accelerated(**call) for call in calls], fxmask.reference.run(tiny, every_other(tiny), calls))


def test_keyword_timestep(tiny):
    """A keyword `timestep=` that raises IndexError."""
    accelerated, calls = accelerate(tiny), make_calls()
    positional = [accelerated(call["x"], call["t"]) for call in calls]
    assert same([accelerated(t=call["t"], x=call["x"]) for call in calls], positional)


def test_the_second_image_is_cached_too(tiny):
    """Step counters that never reset: the second image gets no caching."""
    accelerated = accelerate(tiny)
    for seed in (0, 1, 2):
        calls = make_calls(seed=seed)
        got = [accelerated(**call) for call in calls]
        assert not torch.equal(got[1], tiny.model(**calls[1]))


@pytest.mark.parametrize("size", [(2, 1, 16, 16), (3, 1, 8, 8), (1, 1, 8, 16)])
def test_resolution_or_batch_changes_between_requests(size):
    """A shape mismatch in the cache, or recompilation every time."""
    model = tiny_unet()
    trajectory = fxmask.record(model, ddim(), num_inference_steps=4, batch_size=2)
    accelerated = accelerate(fxmask.capture(model, trajectory.calls[0][0]), trajectory.timesteps)
    calls = [{"sample": torch.randn(size), "timestep": call["timestep"]} for (call,) in trajectory.calls]
    program = fxmask.capture(model, calls[0])
    mask = fxmask.policies.interval(2)(program, trajectory.timesteps)
    expected = [x.sample for x in fxmask.reference.run(program, mask, calls)]
    for _ in range(2):
        for (call,) in trajectory.calls:
            accelerated(**call)
        assert same([accelerated(**call).sample for call in calls], expected)
    assert len(accelerated.programs) == 2, "captured once for each form of call"


def test_shape_change_in_the_middle_of_a_run(tiny):
    accelerated = accelerate(tiny)
    small, large = make_calls(), make_calls(batch=3)
    for call in small[:2]:
        accelerated(**call)
    assert torch.equal(accelerated(**large[2]), tiny.model(**large[2])), "nothing is cached for this shape"


def test_caches_are_freed(tiny):
    """Cache memory that grows with every run."""
    accelerated, calls = accelerate(tiny), make_calls()
    with accelerated.generation() as run:
        accelerated(**calls[0])
        held = [weakref.ref(t) for lane in run._lanes for t in lane.cache.values()]
        assert held
        for call in calls[1:]:
            accelerated(**call)
        gc.collect()
        assert all(reference() is None for reference in held)


def test_lora_merged_after_compilation():
    """Compiled code that keeps the old weights."""
    torch.manual_seed(0)
    model = TinyTransformer().eval()
    calls = make_calls()
    accelerated = accelerate(fxmask.capture(model, calls[0]))
    before = [accelerated(**call) for call in calls]
    layer = model.layers[0].mlp[0]
    low = torch.randn(layer.weight.shape[0], 2), torch.randn(2, layer.weight.shape[1])
    with torch.no_grad():
        layer.weight += low[0] @ low[1]
    merged = [accelerated(**call) for call in calls]
    assert not torch.equal(merged[0], before[0])
    assert torch.equal(merged[0], model(**calls[0]))
    with torch.no_grad():
        layer.weight -= low[0] @ low[1]
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 2)
    assert torch.equal(accelerated(**calls[0]), model(**calls[0])), "a replaced parameter is seen"


def test_offloading_between_steps():
    """Weights that are elsewhere between calls, fetched by a hook of the original's forward."""
    torch.manual_seed(0)
    model = TinyTransformer().eval()
    calls = make_calls()
    accelerated = accelerate(fxmask.capture(model, calls[0]))
    expected = [model(**call) for call in calls]
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.register_forward_pre_hook(lambda module, args: module.load_state_dict(weights, assign=True) and None)
    model.register_forward_hook(lambda module, args, output: module.to("meta") and None)
    model.to("meta")
    with pytest.warns(UserWarning, match="original model runs, unaccelerated"):
        got = [accelerated(**call) for call in calls]
    assert same(got, expected)


def test_guidance_doubles_the_batch_of_one_model_only():
    """One request with guidance (batch doubled), the next without: each has caches of its own shape."""
    model = tiny_dit()
    generator = torch.Generator().manual_seed(0)
    conditioning = {"class_labels": torch.randint(10, (2,), generator=generator)}
    trajectory = fxmask.record(model, ddim(), num_inference_steps=4, batch_size=2, example_inputs=conditioning)
    accelerated = accelerate(fxmask.capture(model, trajectory.calls[0][0]), trajectory.timesteps)
    first = [accelerated(**call).sample for (call,) in trajectory.calls]
    for (call,) in trajectory.calls:
        doubled = {k: torch.cat([v, v]) for k, v in call.items() if isinstance(v, torch.Tensor)}
        accelerated(**doubled)
    assert same([accelerated(**call).sample for (call,) in trajectory.calls], first)
