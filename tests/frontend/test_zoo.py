"""Every model of the zoo is captured exactly and its blocks own its MACs, or it is refused with every reason."""

from __future__ import annotations

import pytest
import torch
from conftest import ddim
from zoo import ZOO, agrees_with_reference, difference, examine, make_calls, random_mask, table

import fxmask
from fxmask import CaptureError, InputError
from fxmask.frontend.infer import infer_call
from fxmask.frontend.recapture import recapture
from fxmask.frontend.rungs import LADDER
from fxmask.ir.calls import Signature
from fxmask.ir.outputs import flatten_output

pytestmark = pytest.mark.filterwarnings("ignore")  # models and tracers warn about themselves

# Told apart by what a step may be spared: branches alone, or with the values of whole stages.
LEAST = 0.9


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if e.extra else n for n, e in ZOO.items()])
def test_zoo(name):
    entry = ZOO[name]
    pytest.importorskip(entry.source if entry.source != "plain" else "torch")
    if name == "einops":
        pytest.importorskip("einops")
    row, program = examine(entry)
    if entry.refused is not None:
        assert entry.refused in row.refusal
        assert all(rung in row.refusal for rung in LADDER), "each rung and its reason is listed"
        return
    assert program is not None, row.refusal
    assert row.difference == 0
    assert row.agrees
    assert program.verified
    assert sum(block.macs for block in program.branches) <= program.macs
    if entry.family == "transformer":
        assert row.branch_share >= LEAST, program.summary()
        assert sum(block.macs for block in program.branches) >= LEAST * program.macs, program.summary()
    elif entry.family == "unet":
        assert row.any_share >= LEAST, program.summary()
    names = [block.name for block in program.blocks]
    assert len(set(names)) == len(names)
    assert all(any(c.isalpha() for c in name) for name in names)
    assert all(name in program.summary() for name in names)
    assert row.entry.name.removeprefix("timm ") in table([row])


def capture(name: str) -> tuple[fxmask.Program, torch.nn.Module, dict]:
    model, call = ZOO[name].make()
    return fxmask.capture(model, call, roles=ZOO[name].roles), model, call


def test_joint_attention_is_one_block_with_both_streams():
    program, *_ = capture("SD3Transformer2DModel")
    for layer in range(2):  # the last layer has no text stream to go on with
        block = program.block(f"transformer_blocks.{layer}.attn")
        assert len(block.values) == 2
        alone = [program_saving(program, (value,)) for value in block.values]
        assert block.macs > 1.5 * sum(alone)


def program_saving(program: fxmask.Program, values: tuple[str, ...]) -> int:
    from fxmask.passes.dataflow import Dataflow

    flow = Dataflow.of(program.graph_module.graph)
    return flow.saving([program.node(value) for value in values])


def test_parallel_attention_and_mlp_is_one_block():
    program, *_ = capture("FluxTransformer2DModel")
    for layer in range(2):
        assert f"single_transformer_blocks.{layer}" in [block.name for block in program.branches]


def test_dense_experts_are_one_block_per_layer():
    program, *_ = capture("dense mixture of experts")
    assert len(program.branches) == 3


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "WaveNet, skips summed"])
def test_a_second_capture_has_the_same_blocks(name):
    """Another batch size: sets and merged blocks keep their names, kinds and number of values."""
    program, model, call = capture(name)

    def grown(x):
        if isinstance(x, torch.Tensor) and x.dim() and x.shape[0] == 2:
            return torch.cat([x, x[:1]])
        return x

    other = {key: grown(value) for key, value in call.items()}
    again = recapture(program, program.signature.bind((), other))
    assert [(b.name, b.kind, len(b.values)) for b in again.blocks] == [(b.name, b.kind, len(b.values)) for b in program.blocks]
    assert again.fingerprint == program.fingerprint
    calls = make_calls(ZOO[name], other, again.signature)
    assert difference(again, model, calls) == 0
    assert agrees_with_reference(again, calls)


def test_a_second_capture_with_other_blocks_is_refused():
    class Grows(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            for layer in self.layers[: x.shape[1]]:
                x = x + layer(x.tanh())
            return x * t.reshape(-1, 1, 1).cos()

    program = fxmask.capture(Grows().eval(), {"x": torch.randn(2, 4, 8), "t": torch.tensor(3)})
    with pytest.raises(CaptureError, match="no block"):
        recapture(program, program.signature.bind((), {"x": torch.randn(2, 2, 8), "t": torch.tensor(3)}))


def test_values_of_masks_are_part_of_what_a_graph_is_for():
    """A mask whose values decide sizes: another one needs another graph, and gets it."""
    program, model, call = capture("MochiTransformer3DModel")
    assert program.signature.fixed == ("encoder_attention_mask",)
    assert "encoder_attention_mask" not in program.inputs
    mask = random_mask(program, 3)
    accelerated = fxmask.compile(program, fxmask.rectify(program, mask), backend="eager")
    other = call["encoder_attention_mask"].clone()
    other[:, 3:] = False
    for given in (call["encoder_attention_mask"], other):
        changed = {**call, "encoder_attention_mask": given, "timestep": torch.full((2,), 900)}
        with torch.no_grad():
            expected = flatten_output(model(**changed))[0][0]
        assert torch.equal(flatten_output(accelerated(**changed))[0][0], expected)


def test_two_arguments_that_are_one_tensor():
    class Two(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            return x * first - second * t.reshape(-1, 1)

    same = torch.randn(2, 3)
    model, call = Two().eval(), {"x": torch.randn(2, 3), "t": torch.tensor(3), "first": same, "second": same}
    program = fxmask.capture(model, call)
    calls = [{**call, "second": torch.randn(2, 3)}]
    assert difference(program, model, calls) == 0


def test_arguments_in_another_order_in_memory():
    program, model, call = capture("PixArtTransformer2DModel (sigma)")
    turned = call["hidden_states"].transpose(2, 3).contiguous().transpose(2, 3)
    assert not turned.is_contiguous()
    assert difference(program, model, [{**call, "hidden_states": turned}]) < 1e-5


def test_an_export_that_loses_positions_is_refused_or_right():
    """Written through ``.data`` when called; a strict export drops them in silence."""
    program, model, call = capture("CogVideoXTransformer3DModel (other frames)")
    assert (
        difference(program, model, make_calls(ZOO["CogVideoXTransformer3DModel (other frames)"], call, program.signature)) == 0
    )


# inputs


@pytest.mark.parametrize(
    "name",
    [
        "UNet2DConditionModel (SD)",
        "UNet2DConditionModel (SDXL)",
        "DiTTransformer2DModel",
        "PixArtTransformer2DModel (alpha)",
        "SD3Transformer2DModel",
        "SanaTransformer2DModel",
        "CogVideoXTransformer3DModel",
        "WanTransformer3DModel",
        "PriorTransformer",
    ],
)
def test_arguments_are_inferred(name):
    model, _ = ZOO[name].make()
    call = infer_call(model, None, 2, Signature.of(model))
    with torch.no_grad():
        output = flatten_output(model(**call))[0][0]
    assert output.shape[0] == 2


def test_capture_without_arguments():
    model, call = ZOO["PixArtTransformer2DModel (sigma)"].make()
    program = fxmask.capture(model)
    assert program.verified
    assert {"hidden_states", "encoder_hidden_states", "timestep"} <= set(program.inputs)
    program = fxmask.capture(model, {"hidden_states": call["hidden_states"], "timestep": call["timestep"]})
    assert "encoder_hidden_states" in program.inputs, "what the model cannot do without is inferred"
    model, call = ZOO["UNet2DConditionModel (SD)"].make()
    program = fxmask.capture(model, {"sample": call["sample"], "timestep": 3})
    assert "encoder_hidden_states" in program.inputs, "and so is an argument without a default"


def test_what_cannot_be_inferred_is_asked_for_by_name():
    class Asks(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, secret: torch.Tensor) -> torch.Tensor:
            return x * secret.reshape(7, 11).sum() * t

    with pytest.raises(InputError, match=r"secret"):
        fxmask.capture(Asks().eval())


def test_recording_asks_for_real_conditioning_with_its_shape():
    model, _ = ZOO["UNet2DConditionModel (SD)"].make()
    with pytest.raises(InputError, match=r"(?s)'encoder_hidden_states'.*float32 \[2, 16, 24\]"):
        fxmask.record(model, ddim(), num_inference_steps=3, batch_size=2)
    model, _ = ZOO["PixArtTransformer2DModel (sigma)"].make()
    with pytest.raises(InputError, match=r"(?s)encoder_hidden_states.*float32 \[2, 16, 24\]"):
        fxmask.record(model, ddim(), num_inference_steps=3, batch_size=2)


def test_recording_finds_the_shape_of_a_video():
    model, call = ZOO["CogVideoXTransformer3DModel"].make()
    trajectory = fxmask.record(
        model,
        ddim(),
        num_inference_steps=2,
        batch_size=2,
        example_inputs={"encoder_hidden_states": call["encoder_hidden_states"]},
    )
    assert trajectory.initial_noise.dim() == 5


def test_recording_asks_for_a_size_that_no_config_has():
    model, call = ZOO["WanTransformer3DModel"].make()
    with pytest.raises(InputError, match=r"(?s)shape of 'hidden_states' cannot be inferred.*float32 \[2, 4, 4, 32, 32\]"):
        fxmask.record(
            model,
            ddim(),
            num_inference_steps=2,
            batch_size=2,
            example_inputs={"encoder_hidden_states": call["encoder_hidden_states"]},
        )


# without weights


def test_a_model_without_weights():
    with torch.device("meta"):
        from diffusers import DiTTransformer2DModel

        model = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=3, sample_size=16, norm_num_groups=8
        ).eval()
    real, *_ = capture("DiTTransformer2DModel")
    for given in (None, {n: x.to("meta") for n, x in real.example.tensors.items()}):
        program = fxmask.capture(model, given)
        assert not program.verified
        assert "NOT VERIFIED" in program.summary()
        assert [(b.name, b.macs, b.bytes) for b in program.blocks] == [(b.name, b.macs, b.bytes) for b in real.blocks]
        with pytest.raises(CaptureError, match="without weights"):
            program.require_verified()
    assert all(p.is_meta for p in model.parameters())


def test_trials_leave_the_model_alone():
    """Tables that a model caches when called must not become fake."""
    model, call = ZOO["QwenImageTransformer2DModel"].make()
    with pytest.raises(InputError):
        infer_call(model, None, 2, Signature.of(model))
    with torch.no_grad():
        assert torch.isfinite(flatten_output(model(**call))[0][0]).all()
