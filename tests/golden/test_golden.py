"""What was learned, saved and exported before comes out again, and old files load; see ``make.py``.

What learning gives may change on purpose, and then ``name.json`` does. Saved plans are older; ``name-plan.json`` is theirs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import fxmask

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parent))

import make

LEARNED_WITH = json.loads((make.HERE / "environment.json").read_text())["torch"]
SAME = json.loads((make.HERE / "environment.json").read_text()) == json.loads(json.dumps(make.environment()))
bits = pytest.mark.skipif(not SAME, reason="bits depend on the version of PyTorch and the processor; these differ")


@pytest.mark.parametrize("name", make.CELLS)
def test_the_same_bits_are_learned(name):
    if make.written_with(name) != json.loads(json.dumps(make.environment())):
        pytest.skip("bits depend on the version of PyTorch and the processor; these differ")
    _, data = make.learn_cell(name)
    assert data == json.loads((make.HERE / f"{name}.json").read_text())


@pytest.mark.parametrize("name", ["unet-deterministic", "dit-stochastic", "unet-paper"])
def test_old_plans_load_and_run(name):
    model = make.dit() if name.startswith("dit") else make.unet()
    refused = ""
    try:
        accelerated = fxmask.load(make.HERE / name, model, progress=False)
    except fxmask.MaskError as error:
        refused = str(error)
    if refused:  # another PyTorch may capture other operators, and the plan says so
        assert torch.__version__.split("+")[0] != LEARNED_WITH
        assert "it has blocks of these names, but other operators" in refused
        return
    data = json.loads((make.HERE / f"{name}-plan.json").read_text())
    assert json.loads(json.dumps(make.as_data(accelerated.plan.source))) == data
    call = dict(accelerated.program.example.arguments)
    with accelerated.generation():
        for timestep in accelerated.mask.timesteps:
            output = accelerated(**{**call, "timestep": torch.tensor(int(timestep))})
    assert bool(torch.isfinite(output.sample).all())


@bits
def test_an_old_package_loads_and_runs():
    accelerated = fxmask.load(make.HERE / f"{make.PACKAGED}-package", make.dit(), allow_compiled=True, progress=False)
    again = fxmask.load(make.HERE / make.PACKAGED, make.dit(), progress=False)
    call = dict(accelerated.program.example.arguments)
    for model in (accelerated, again):
        with model.generation():
            for timestep in model.mask.timesteps:
                model.last = model(**{**call, "timestep": torch.tensor(int(timestep))}).sample
    torch.testing.assert_close(accelerated.last, again.last, rtol=1e-4, atol=1e-5)
