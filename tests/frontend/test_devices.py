"""Models on other devices, seen without one: fake CUDA weights, on which a CPU tensor fails as on real ones."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_dit, tiny_unet

from fxmask._torch import FakeTensorMode
from fxmask.frontend import fake, infer
from fxmask.frontend.examples import example_call
from fxmask.frontend.infer import Trial, infer_call
from fxmask.ir.calls import Signature


@pytest.fixture
def on_cuda(monkeypatch):
    """Copies without memory have their weights on a GPU, as those of a model on a GPU have."""
    torch._C._ensureCUDADeviceGuardSet()
    make = fake._fake

    def moved(x, mode, device=None):
        return make(x, mode, device or torch.device("cuda", 0))

    def copied(model: torch.nn.Module, mode: FakeTensorMode) -> torch.nn.Module:
        with monkeypatch.context() as patch:
            patch.setattr(fake, "_fake", moved)
            return fake.fake_copy(model, mode)

    monkeypatch.setattr(infer, "fake_copy", copied)


MODELS = {"unet": (tiny_unet, {}), "dit": (tiny_dit, {"class_labels": torch.tensor([1, 2])})}


@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_inferred_with_weights_on_a_gpu(name, on_cuda):
    make, given = MODELS[name]
    model = make()
    signature = Signature.of(model)
    trial = Trial(model, signature)
    assert trial.device.type == "cuda"
    found = infer_call(model, given, 2, signature)
    assert trial.run(found), trial.reason


@pytest.mark.parametrize("name", MODELS)
def test_the_first_line_of_the_readme_infers_the_sample(name, on_cuda):
    make, given = MODELS[name]
    model = make()
    call = example_call(model, torch.tensor(500), given, 2, torch.float32)
    assert call[Signature.of(model).sample].shape == (
        2,
        model.config.in_channels,
        model.config.sample_size,
        model.config.sample_size,
    )


def test_conditioning_goes_where_the_timestep_is():
    call = example_call(tiny_dit(), torch.tensor(500), {"class_labels": torch.tensor([1, 2])}, 2, torch.float32)
    assert {x.device for x in call.values() if isinstance(x, torch.Tensor)} == {torch.device("cpu")}
