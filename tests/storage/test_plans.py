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
from safetensors.torch import load_file, save_file

import fxmask
from fxmask import MaskError
from fxmask.storage.folders import PLAN
from fxmask.storage.plans import TENSORS

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
    assert sorted(path.name for path in (tmp_path / "plan").iterdir()) == [PLAN, TENSORS]
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
    import fxmask.storage.plans

    folder = tmp_path / "plan"
    accelerated.save(folder)
    before = (folder / PLAN).read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(fxmask.storage.plans, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        accelerated.save(folder)
    assert (folder / PLAN).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


def test_another_model_is_refused_with_what_differs(accelerated, tmp_path):
    accelerated.save(tmp_path / "plan")
    with pytest.raises(MaskError, match="another model.*fingerprint"):
        fxmask.load(tmp_path / "plan", tiny_dit(num_layers=1), progress=False)
    with pytest.raises(fxmask.FxmaskError):
        fxmask.load(tmp_path / "plan", tiny_unet(), progress=False)


def test_another_scheduler_is_refused_with_what_differs(accelerated, tmp_path):
    accelerated.save(tmp_path / "plan")
    with pytest.raises(MaskError, match="clip_sample: saved True, now False"):
        fxmask.load(tmp_path / "plan", accelerated.original, ddim(clip_sample=False), progress=False)


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
