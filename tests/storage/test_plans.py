"""Plans that last: saved, loaded in another process, refused where they do not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ddim, labels, tiny_dit, tiny_unet
from pipelines import record
from safetensors.torch import load_file, save_file

import fxmask
from fxmask import MaskError
from fxmask.storage.schema import PLAN, TENSORS

LOAD = """
import sys, torch
sys.path.insert(0, {tests!r})
from conftest import ddim, labels, tiny_dit
import fxmask
model = tiny_dit()
accelerated = fxmask.load({folder!r}, model, ddim())
run = fxmask.record(model, ddim(), num_inference_steps=6, batch_size=2, example_inputs=labels, seed=5)
torch.save((run.rollout(accelerated), str(accelerated.report())), {out!r})
"""


@pytest.fixture(scope="module")
def accelerated():
    return fxmask.accelerate(
        tiny_dit(),
        ddim(),
        num_inference_steps=6,
        speedup=1.8,
        example_inputs=labels,
        effort="quick",
        backend="eager",
        progress=False,
    )


def test_a_second_process_gives_the_same_samples_bit_for_bit(accelerated, tmp_path):
    accelerated.save(tmp_path / "plan")
    assert sorted(path.name for path in (tmp_path / "plan").iterdir()) == ["README.md", "mask.png", PLAN, TENSORS]
    assert [path.name for path in tmp_path.iterdir()] == ["plan"], "nothing temporary is left"
    script = LOAD.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path / "plan"), out=str(tmp_path / "out.pt"))
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    samples, report = torch.load(tmp_path / "out.pt", weights_only=True)
    run = fxmask.record(
        accelerated.original, ddim(), num_inference_steps=6, batch_size=2, example_inputs=labels, step_kwargs=None, seed=5
    )
    assert torch.equal(run.rollout(accelerated), samples)
    assert report == str(accelerated.report())


def test_save_replaces_a_plan_and_nothing_else(accelerated, tmp_path):
    folder = tmp_path / "plan"
    accelerated.save(folder)
    accelerated.save(folder)
    assert fxmask.load(folder, accelerated.original, progress=False).plan == accelerated.plan
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("mine")
    with pytest.raises(MaskError, match="holds no plan"):
        accelerated.save(tmp_path / "other")
    assert (tmp_path / "other" / "precious.txt").read_text() == "mine"


def test_a_failed_save_leaves_the_old_plan(accelerated, tmp_path, monkeypatch):
    import fxmask.storage.folders

    folder = tmp_path / "plan"
    accelerated.save(folder)
    before = (folder / PLAN).read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(fxmask.storage.folders, "replace_file", full)
    with pytest.raises(MaskError, match="no space.*check that there is room"):
        accelerated.save(folder)
    assert (folder / PLAN).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


def test_another_model_is_refused_with_what_differs(accelerated, tmp_path):
    accelerated.save(tmp_path / "plan")
    with pytest.raises(MaskError, match="another model.*fingerprint"):
        fxmask.load(tmp_path / "plan", tiny_dit(num_layers=1), progress=False)
    with pytest.raises(MaskError, match="it has blocks of these names, but other operators"):
        fxmask.load(tmp_path / "plan", tiny_dit(attention_head_dim=12), progress=False)
    with pytest.raises(fxmask.FxmaskError):
        fxmask.load(tmp_path / "plan", tiny_unet(), progress=False)


def test_another_scheduler_is_refused_with_what_differs(accelerated, tmp_path):
    accelerated.save(tmp_path / "plan")
    with pytest.raises(MaskError, match="clip_sample: saved True, now False"):
        fxmask.load(tmp_path / "plan", accelerated.original, ddim(clip_sample=False), progress=False)


@pytest.fixture(scope="module")
def recorded():
    """A denoiser, and a run of it in a pipeline."""
    pipe, _, run = record("dit")
    return pipe, run, fxmask.capture(run.denoiser, run.calls[0][0], roles=run.roles)


def saved(folder, program, mask):
    fxmask.compile(program, fxmask.rectify(program, mask), backend="eager").save(folder)
    return folder


def test_a_plan_from_a_pipeline_knows_its_scheduler(recorded, tmp_path):
    from diffusers import EulerDiscreteScheduler

    pipe, run, program = recorded
    mask = fxmask.learn(program, run, speedup=1.3, effort="quick", progress=False)
    folder = saved(tmp_path / "plan", program, mask)
    again = fxmask.load(folder, run.denoiser, pipe.scheduler, progress=False)
    assert again.mask == fxmask.rectify(program, mask).mask
    pipe.scheduler.set_timesteps(17)  # the pipeline sets it again
    fxmask.load(folder, run.denoiser, pipe.scheduler, progress=False)
    with pytest.raises(MaskError, match=r"timestep_spacing: saved 'leading', now 'trailing'"):
        fxmask.load(folder, run.denoiser, ddim(timestep_spacing="trailing"), progress=False)
    with pytest.raises(MaskError, match="class: saved 'DDIMScheduler', now 'EulerDiscreteScheduler'") as raised:
        fxmask.load(folder, run.denoiser, EulerDiscreteScheduler(), progress=False)
    assert "now None" not in str(raised.value), "only what both can be configured with is compared"
    again.save(tmp_path / "again")
    with pytest.raises(MaskError, match="trailing"):
        fxmask.load(tmp_path / "again", run.denoiser, ddim(timestep_spacing="trailing"), progress=False)
    with pytest.raises(fxmask.SchedulerError, match=r"pass its scheduler, pipe\.scheduler"):
        fxmask.load(folder, run.denoiser, pipe, progress=False)


def test_a_scheduler_without_a_configuration_is_known_by_its_timesteps(tmp_path):
    class Evenly:
        def __init__(self, first):
            self.first = first

        def set_timesteps(self, count):
            self.timesteps = [self.first * (count - i) // count for i in range(count)]

        def step(self, output, timestep, sample):
            return (sample - 0.1 * output,)

    model = tiny_dit()
    mine, other = Evenly(900), Evenly(800)
    options = {"num_inference_steps": 3, "example_inputs": labels, "backend": "eager", "progress": False}
    fxmask.accelerate(model, mine, speedup=1.3, effort="quick", **options).save(tmp_path / "plan")
    fxmask.load(tmp_path / "plan", model, mine, progress=False)
    with pytest.raises(MaskError, match=r"timesteps: saved 900, 600, 300 \(3 steps\), now 800, 533, 266 \(3 steps\)"):
        fxmask.load(tmp_path / "plan", model, other, progress=False)


def test_a_plan_that_does_not_know_its_scheduler_is_checked_by_its_timesteps(recorded, tmp_path):
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    pipe, run, program = recorded
    folder = saved(tmp_path / "plan", program, fxmask.policies.interval(2)(program, run.timesteps))
    shifted = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)  # whose timesteps nobody can tell
    for scheduler in (None, pipe.scheduler, DDPMScheduler(), shifted):
        assert fxmask.load(folder, run.denoiser, scheduler, progress=False).mask.timesteps == run.timesteps
    with pytest.raises(MaskError, match=r"(?s)timesteps: saved 750, 500, 250, 0 \(4 steps\), now 999, 749.*leave it out"):
        fxmask.load(folder, run.denoiser, ddim(timestep_spacing="trailing"), progress=False)


def test_damage_is_noticed(accelerated, tmp_path):
    folder = tmp_path / "plan"
    accelerated.save(folder)
    with pytest.raises(MaskError, match="holds no plan"):
        fxmask.load(tmp_path, accelerated.original)
    tensors = load_file(folder / TENSORS)
    tensors["coefficients"] += 1
    save_file(tensors, folder / TENSORS)
    with pytest.raises(MaskError, match="not the file"):
        fxmask.load(folder, accelerated.original)
    state = json.loads((folder / PLAN).read_text())
    (folder / PLAN).write_text(json.dumps({**state, "version": 99}))
    with pytest.raises(MaskError, match="version 99"):
        fxmask.load(folder, accelerated.original)
    (folder / PLAN).write_text("{")
    with pytest.raises(MaskError, match="damaged"):
        fxmask.load(folder, accelerated.original)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_plan_fits_the_model_in_another_type(accelerated, tmp_path, dtype):
    """Learned in float32, deployed in a type that is faster."""
    accelerated.save(tmp_path / "plan")
    model = tiny_dit().to(dtype)
    loaded = fxmask.load(tmp_path / "plan", model, progress=False)
    assert loaded.mask == accelerated.mask
    assert loaded.plan.mac_ratio == accelerated.plan.mac_ratio
    assert loaded.program.example.sample.dtype == dtype
    run = fxmask.record(model, ddim(), num_inference_steps=6, batch_size=2, example_inputs=labels, seed=5)
    assert run.rollout(loaded).dtype == run.final.dtype
    full = fxmask.compile(
        loaded.program, fxmask.rectify(loaded.program, fxmask.Mask.ones(loaded.program, run.timesteps)), "eager"
    )
    torch.testing.assert_close(run.rollout(full), run.final)
