"""Capture: the graph computes what the model computes, or is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from conftest import TinyTransformer, make_calls, tiny_unet

import fxmask
from fxmask import CaptureError, InputError
from fxmask.ir.calls import Signature
from fxmask.ir.outputs import flatten_output


def run(program: fxmask.Program, call: dict[str, Any]) -> Any:
    bound = program.signature.bind((), call)
    return program.outputs(program.graph_module(*bound.tensors.values()), bound.arguments.get("return_dict"))


def test_unet_bit_for_bit(unet_trajectory, unet_program):
    model, trajectory = unet_trajectory
    for (call,) in trajectory.calls:
        assert torch.equal(run(unet_program, dict(call)).sample, model(**call).sample)
    assert torch.equal(
        run(unet_program, {**trajectory.calls[0][0], "return_dict": False})[0], model(**trajectory.calls[0][0])[0]
    )


def test_dit_bit_for_bit(dit_trajectory, dit_program):
    model, trajectory = dit_trajectory
    for (call,) in trajectory.calls:
        assert torch.equal(run(dit_program, dict(call)).sample, model(**call).sample)


def test_weights_are_shared_not_copied(tiny):
    own = {id(p) for p in tiny.model.parameters()}
    assert tiny.weights
    assert {id(p) for p in tiny.weights.values()} <= own


def test_graph_has_no_asserts_and_no_dead_code(unet_program):
    names = {str(node.target) for node in unet_program.graph_module.graph.nodes}
    assert not any("assert" in name for name in names)
    for node in unet_program.graph_module.graph.nodes:
        assert node.users or node.op in ("placeholder", "output")


def test_in_place_operators_are_gone():
    class InPlace(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            h = self.linear(x)
            h[:, :2].mul_(2)
            h.add_(x)
            return h

    model = InPlace().eval()
    call = {"x": torch.randn(3, 4), "t": torch.tensor(5)}
    program = fxmask.capture(model, call)
    assert not any(
        str(n.target).split(".")[1].endswith("_") for n in program.graph_module.graph.nodes if n.op == "call_function"
    )
    assert torch.equal(run(program, call), model(**call))


def test_training_mode_is_refused():
    with pytest.raises(InputError, match=r"call model\.eval\(\) first"):
        fxmask.capture(TinyTransformer(), make_calls()[0])


def test_unknown_role_is_refused():
    with pytest.raises(InputError, match="unknown roles"):
        fxmask.capture(TinyTransformer().eval(), make_calls()[0], roles={"x": "noise"})
    with pytest.raises(InputError, match="roles names 'nothing'"):
        fxmask.capture(TinyTransformer().eval(), make_calls()[0], roles={"nothing": "step"})


def test_roles_are_inferred_and_overridden():
    class Controlled(torch.nn.Module):
        def forward(self, noisy: torch.Tensor, when: torch.Tensor, residual: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return noisy * when.reshape(-1, 1) + residual + text

    call = {n: torch.randn(2, 3) for n in ("noisy", "residual", "text")} | {"when": torch.tensor([1, 2])}
    program = fxmask.capture(Controlled().eval(), call, roles={"residual": "step"})
    assert dict(program.roles) == {"noisy": "sample", "when": "timestep", "residual": "step", "text": "conditioning"}


def test_a_wrong_export_is_refused(monkeypatch):
    """A rung that exports without an error and computes something else must not be believed."""
    from fxmask.frontend.rungs import LADDER

    class Other(TinyTransformer):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return super().forward(x, t) + (0.001 if torch.compiler.is_exporting() else 0.0)

    torch.manual_seed(0)
    model, call = Other().eval(), make_calls()[0]
    program = fxmask.capture(model, call)
    assert program.rung == "traced with values"
    assert torch.equal(run(program, call), model(**call))
    monkeypatch.delitem(LADDER, "traced with values")
    with pytest.raises(CaptureError, match="differs from the model's by 0.001"):
        fxmask.capture(model, call)


@pytest.mark.parametrize(
    ("effect", "message"), [(0.0, "writes to its buffer"), (1.0, r"keeps state between calls in \['count'\]")]
)
def test_a_model_that_writes_to_a_buffer_is_refused(effect, message):
    class Counts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            self.count += 1
            return x + self.count * effect

    with pytest.raises(CaptureError, match=message):
        fxmask.capture(Counts().eval(), {"x": torch.randn(2, 4), "t": torch.tensor(900)})


@pytest.mark.parametrize("timestep", [7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7])])
def test_timestep_forms(timestep):
    model = tiny_unet()
    x = torch.randn(2, 1, 8, 8)
    program = fxmask.capture(model, {"sample": x, "timestep": timestep})
    for form in (7, torch.tensor(7), torch.tensor([7, 7])):
        bound = program.signature.bind((x, form), {})
        got = program.graph_module(*(v.to(program.example.tensors[k].dtype) for k, v in bound.tensors.items()))[0]
        assert torch.equal(got, model(x, 7).sample)


def test_outputs_of_any_kind():
    @dataclasses.dataclass
    class Out:
        first: torch.Tensor
        more: dict[str, Any]

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> Out:
            return Out(x * 2, {"list": [x + 1, None], "flag": True})

    x = torch.randn(2, 3)
    program = fxmask.capture(Model().eval(), {"x": x, "t": torch.tensor(1)})
    result = run(program, {"x": x, "t": torch.tensor(1)})
    assert isinstance(result, Out)
    assert torch.equal(result.first, x * 2)
    assert torch.equal(result.more["list"][0], x + 1)
    assert result.more["list"][1] is None
    assert result.more["flag"] is True


def test_output_that_is_no_tensor_is_refused():
    with pytest.raises(CaptureError, match="neither a tensor"):
        flatten_output(object())


def test_bind_refuses_wrong_arguments(tiny):
    with pytest.raises(InputError, match="cannot be called like this"):
        tiny.signature.bind((torch.zeros(1, 2, 4),), {"nothing": 1})
    with pytest.raises(InputError, match="must be a tensor"):
        tiny.signature.bind((), {"x": 3, "t": 1})


def test_signature_without_a_timestep():
    class Plain(torch.nn.Module):
        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            return latents * 2

    signature = Signature.of(Plain())
    assert (signature.sample, signature.timestep) == ("latents", None)


def test_no_grad_and_autocast_regions_are_inlined():
    class Regions(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                frequencies = (t.reshape(-1, 1).float() * torch.arange(4)).cos()
            with torch.autocast("cpu", enabled=False):
                h = self.linear(x)
            return x + frequencies * h

    model = Regions().eval()
    call = {"x": torch.randn(3, 4), "t": torch.tensor(5)}
    program = fxmask.capture(model, call)
    assert torch.equal(run(program, call), model(**call))
    assert not any("wrap" in str(node.target) for node in program.graph_module.graph.nodes)


def test_control_flow_is_refused():
    """Its branches are graphs of their own, into which blocks, liveness and MACs do not look."""

    class Chooses(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.late = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return x + torch.cond(t.sum() > 1500, self.early, self.late, (x,))

    with pytest.raises(CaptureError, match=r"non-strict\): CaptureError: the graph holds 'cond' .*; use torch.where"):
        fxmask.capture(Chooses().eval(), {"x": torch.randn(3, 4), "t": torch.tensor([700, 700, 700])})


def test_a_check_of_values_that_always_passes_is_no_obstacle():
    class Checked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x, t):
            if t.min().item() < 0:
                raise ValueError("no time before the beginning")
            return x + self.linear(x)

    model = Checked().eval()
    call = {"x": torch.randn(3, 4), "t": torch.tensor([5, 5, 5])}
    program = fxmask.capture(model, call)
    assert program.rung == "torch.export (draft)"
    assert torch.equal(program.graph_module(*program.example.tensors.values())[0], model(**call))
