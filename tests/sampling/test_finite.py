"""A model that is not finite is refused when it is recorded, with the name of what is not."""

from __future__ import annotations

import pytest
import torch
from conftest import TinyTransformer, ddim

import fxmask
from fxmask import InputError


def record(model: torch.nn.Module) -> fxmask.Trajectory:
    return fxmask.record(model, ddim(), num_inference_steps=3, batch_size=2, example_inputs={"x": torch.randn(2, 6, 4)})


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return TinyTransformer().eval()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_are_named(model, value):
    model.layers[1].mlp[0].weight.data[3, 2] = value
    with pytest.raises(
        InputError, match=r"not finite .* at step 0, timestep .* weights hold such values, layers\.1\.mlp\.0\.weight"
    ):
        record(model)


def test_the_first_module_that_overflows_is_named(model):
    class Half(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model.half()

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.net(x.half(), t).float()

    model.layers[0].mlp[0].weight.data.fill_(60000)
    named = r"first module with such a result is 'net\.layers\.0\.mlp\.0', in torch\.float16.*bfloat16"
    with pytest.raises(InputError, match=named):
        record(Half().eval())


def test_what_overflows_later_is_named_with_its_step(model):
    class Late(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.net(x, t) / (t.reshape(-1, 1, 1) > 400).to(x.dtype)

    with pytest.raises(InputError, match=r"at step 1, timestep .* first module with such a result is '\(the model itself\)'"):
        record(Late().eval())


def test_a_finite_model_is_recorded_and_left_as_it_was(model):
    assert len(record(model).calls) == 3
    assert not any(module._forward_hooks for module in model.modules())


def test_accelerate_refuses_too(model):
    model.head.bias.data[0] = float("nan")
    with pytest.raises(InputError, match=r"weights hold such values, head\.bias"):
        fxmask.accelerate(model, ddim(), num_inference_steps=4, example_inputs={"x": torch.randn(2, 6, 4)})
