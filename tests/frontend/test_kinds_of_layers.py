"""What stands in the way of a plain graph is captured as what it computes, or refused with cause and remedy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import TIMESTEPS, TinyLayer, TinyTransformer
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import fxmask
from fxmask import CaptureError

TOKENS = 32  # of queries


def call_of(seed: int = 0, tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(2, tokens, 4, generator=torch.Generator().manual_seed(seed)), "t": torch.tensor(900)}


def run_of(tokens: int = TOKENS) -> list[dict[str, torch.Tensor]]:
    return [{**call_of(step, tokens), "t": torch.tensor(int(t))} for step, t in enumerate(TIMESTEPS)]


@torch.no_grad()
def output(model: Any, call: dict[str, Any]) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(**call)


def accelerate(program: fxmask.Program, every: int = 1) -> fxmask.AcceleratedModel:
    mask = fxmask.policies.interval(every)(program, TIMESTEPS) if every > 1 else fxmask.Mask.ones(program, TIMESTEPS)
    return fxmask.compile(program, fxmask.rectify(program, mask), backend="eager")


def check_captured(model: torch.nn.Module, calls: list[dict[str, Any]], tolerance: float = 1e-5) -> fxmask.Program:
    """Every step under Mask.ones is the model's, and a mask does what the reference does."""
    wanted = [output(model, call) for call in calls]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = fxmask.capture(model, calls[0])
    accelerated, masked = accelerate(program), accelerate(program, 2)
    for call, value in zip(calls, wanted, strict=True):
        torch.testing.assert_close(output(accelerated, call), value, rtol=0, atol=tolerance * float(value.abs().max()))
    reference = fxmask.reference.run(program, masked.plan.source, calls)
    for call, value in zip(calls, reference, strict=True):
        torch.testing.assert_close(output(masked, call), value, rtol=0, atol=tolerance * float(value.abs().max()))
    return program


# flex_attention


class FlexLayer(TinyLayer):
    """Attention with functions of positions, in four heads."""

    options: dict[str, Any] = {}  # noqa: RUF012
    kv_heads = 4
    sums = False

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        gate_attention, gate_mlp = self.gate(time).unsqueeze(1).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        k, v = k[:, : self.kv_heads], v[:, : self.kv_heads]
        found = flex_attention(q, k, v, return_lse=self.sums, **self.options)
        attention = found[0] * found[1].unsqueeze(-1).sigmoid() if self.sums else found
        x = x + gate_attention * self.out(attention.transpose(1, 2).flatten(2))
        return x + gate_mlp * self.mlp(x)


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
DOCUMENTS = torch.arange(TOKENS) // 10


def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
    return i >= j


def window(b: Any, h: Any, i: Any, j: Any) -> Any:
    return (i - j).abs() < 4


def documents(b: Any, h: Any, i: Any, j: Any) -> Any:
    return DOCUMENTS[i] == DOCUMENTS[j]


def nothing_for_the_first(b: Any, h: Any, i: Any, j: Any) -> Any:
    return (j < i) & (i > 0)


def masked(mask_mod: Callable[..., Any]) -> Callable[[], dict[str, Any]]:
    return lambda: {"block_mask": create_block_mask(mask_mod, None, None, TOKENS, TOKENS, device="cpu")}


def scored(score_mod: Callable[..., Any], **more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"score_mod": score_mod, **more}


FLEX: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "scale": lambda: {"scale": 0.3},
    "causal": masked(causal),
    "window": masked(window),
    "documents": masked(documents),
    "rows without keys": masked(nothing_for_the_first),
    "distance": scored(lambda s, b, h, i, j: s + 0.1 * (i - j)),
    "slope per head": scored(lambda s, b, h, i, j: s + SLOPES[h] * (j - i)),
    "soft cap": scored(lambda s, b, h, i, j: 2 * torch.tanh(s / 2)),
    "scaled by the position": scored(lambda s, b, h, i, j: s * (1 + 0.01 * i)),
    "masked in the score": scored(lambda s, b, h, i, j: torch.where(i >= j, s, -float("inf"))),
    "per sample": scored(lambda s, b, h, i, j: s - 0.2 * b * (j % 3)),
    "score and mask": lambda: {**masked(causal)(), **scored(lambda s, b, h, i, j: s + 0.1 * j, scale=0.5)()},
}


@pytest.mark.parametrize("kind", FLEX)
def test_flex_attention(kind):
    torch.manual_seed(0)
    model = TinyTransformer(16).eval()
    model.layers = torch.nn.ModuleList(FlexLayer(16) for _ in range(2)).eval()
    for layer in model.layers:
        layer.options = FLEX[kind]()
    program = check_captured(model, run_of())
    assert program.blocks[0].name.startswith("layers.0.qkv"), "attention is a block as in any transformer"
    assert program.macs > 2 * 2 * TOKENS * (4 * 16 * 16 + 8 * 16 * 16), "attention is counted, as itself or as its products"
    assert "flex_attention" not in str(program.graph_module.graph)


@pytest.mark.parametrize("sums", [False, True])
def test_flex_attention_with_fewer_heads_of_keys_and_with_sums(sums):
    torch.manual_seed(0)
    model = TinyTransformer(16).eval()
    model.layers = torch.nn.ModuleList(FlexLayer(16) for _ in range(2)).eval()
    for layer in model.layers:
        layer.kv_heads, layer.sums, layer.options = 2, sums, {**masked(causal)(), "enable_gqa": True}
    check_captured(model, run_of())


def test_flex_attention_whose_blocks_say_more_than_its_function_is_refused():
    from torch.nn.attention.flex_attention import BlockMask

    torch.manual_seed(0)
    model = TinyTransformer(16).eval()
    model.layers = torch.nn.ModuleList(FlexLayer(16) for _ in range(2)).eval()
    counts = torch.ones(1, 1, 2, dtype=torch.int32)
    blocks = torch.zeros(1, 1, 2, 2, dtype=torch.int32)
    for layer in model.layers:
        layer.options = {"block_mask": BlockMask.from_kv_blocks(counts, blocks, BLOCK_SIZE=16)}
    with pytest.raises(CaptureError, match=r"blocks leave out keys.*Give the block mask a mask_mod"):
        fxmask.capture(model, call_of())


# Custom operators


@torch.library.custom_op("fxmask_tests::decay", mutates_args=())
def decay(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    h, rows = torch.zeros_like(x[:, 0]), []
    for row in x.unbind(1):
        h = h * a + row
        rows.append(h)
    return torch.stack(rows, 1)


@decay.register_fake
def _(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("fxmask_tests::fill", mutates_args={"out"})
def fill(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x.tanh() * 2)


@torch.library.custom_op("fxmask_tests::add_and_count", mutates_args={"x"})
def add_and_count(x: torch.Tensor, amount: float) -> torch.Tensor:
    x.add_(amount)
    return x.sum(-1, keepdim=True)


@add_and_count.register_fake
def _(x: torch.Tensor, amount: float) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], 1))


@torch.library.custom_op("fxmask_tests::without_fake", mutates_args=())
def without_fake(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1


def filled(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    fill(x, out)
    return out


def filled_part(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    fill(x[:, :2], out[:, 2:4])
    return out


def written_and_returned(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    return y * add_and_count(y, 0.5)


CUSTOM = {
    "functional": decay,
    "written to": filled,
    "written to a view": filled_part,
    "written to and returned": written_and_returned,
}


class WithOperator(TinyTransformer):
    def __init__(self, operator: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.operator, self.decay = operator, torch.nn.Parameter(torch.full((8,), 0.5))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        time = self.embed(t.reshape(-1, 1).to(x.dtype) / 1000)
        x = self.inp(x)
        for layer in self.layers:
            x = layer(x, time) + self.operator(x, self.decay)
        return self.head(x)


@pytest.mark.parametrize("kind", CUSTOM)
def test_custom_operators(kind):
    torch.manual_seed(0)
    check_captured(WithOperator(CUSTOM[kind]).eval(), run_of(6))


def test_a_custom_operator_without_shapes_is_refused_by_name():
    model = WithOperator(lambda x, a: without_fake(x)).eval()
    with pytest.raises(CaptureError, match=r"fxmask_tests::without_fake.*register_fake"):
        fxmask.capture(model, call_of())


# Weights that are no plain numbers


def dit() -> torch.nn.Module:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=2, sample_size=8, patch_size=2,
        num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
    ).eval()  # fmt: skip


def dit_call() -> dict[str, Any]:
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"hidden_states": x, "timestep": torch.tensor([900, 900]), "class_labels": torch.tensor([1, 2])}


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16])
def test_layerwise_casting(stored):
    model, call = dit(), dit_call()
    model.enable_layerwise_casting(storage_dtype=stored, compute_dtype=torch.float32)
    types = {name: p.dtype for name, p in model.named_parameters()}
    assert stored in types.values()
    wanted = output(model, call).sample
    program = fxmask.capture(model, call)
    assert {name: p.dtype for name, p in model.named_parameters()} == types, "weights stay as they are stored"
    accelerated = accelerate(program)
    torch.testing.assert_close(output(accelerated, call).sample, wanted)
    assert {weight.dtype for weight in program.weights.values()} >= {stored}, "nothing is kept in the wide type"
    torch.testing.assert_close(output(model, call).sample, wanted)


def test_dynamic_int8_is_refused_by_name():
    from torch.ao.quantization import quantize_dynamic

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = quantize_dynamic(TinyTransformer().eval(), {torch.nn.Linear}, dtype=torch.qint8)
        with pytest.raises(CaptureError, match=r"quantised layers.*before it is quantised.*torchao"):
            fxmask.capture(model, call_of())


def in_layers(module: torch.nn.Module, path: str) -> bool:
    return path.startswith("layers") and isinstance(module, torch.nn.Linear)


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao(config):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = TinyTransformer(32).eval()
        plain = fxmask.capture(model, call_of())
        quantization.quantize_(model, getattr(quantization, config)(), in_layers)
        program = check_captured(model, run_of(), tolerance=1e-4)
    assert [b.name for b in program.blocks] == [b.name for b in plain.blocks]
    assert abs(program.macs - plain.macs) < 0.01 * plain.macs


# What wraps a model, or its parts


class Padded(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.text = torch.nn.TransformerEncoder(layer, 2)
        self.net = TinyTransformer()

    def forward(self, x: torch.Tensor, t: torch.Tensor, words: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        words = self.text(words, src_key_padding_mask=padding)
        return self.net(x + words.mean(1, keepdim=True)[..., :4], t)


def test_the_fast_path_of_nested_tensors_is_refused_by_name():
    torch.manual_seed(0)
    model = Padded().eval()
    padding = torch.tensor([[False, False, True], [False, False, False]])
    call = {**call_of(), "words": torch.randn(2, 3, 8), "padding": padding}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(CaptureError, match=r"set_fastpath_enabled\(False\)"):
            fxmask.capture(model, call)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            wanted, program = output(model, call), fxmask.capture(model, call)
            torch.testing.assert_close(output(accelerate(program), call), wanted)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)


def compiled_in_place(model: torch.nn.Module) -> torch.nn.Module:
    model.compile(backend="eager")
    return model


def layers_compiled_in_place(model: torch.nn.Module) -> torch.nn.Module:
    for layer in model.layers:  # type: ignore[union-attr]
        layer.compile(backend="eager")
    return model


def layer_wrapped(model: torch.nn.Module) -> torch.nn.Module:
    model.layers[0] = torch.compile(model.layers[0], backend="eager")  # type: ignore[index, operator]
    return model


def peft_wrapped(model: torch.nn.Module) -> torch.nn.Module:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["qkv", "out"], init_lora_weights=False))
    return wrapped.eval()


WRAPS = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    ".compile()": compiled_in_place,
    "layers' .compile()": layers_compiled_in_place,
    "a layer under torch.compile": layer_wrapped,
    "PEFT": peft_wrapped,
}


@pytest.mark.parametrize("kind", WRAPS)
def test_wrapped_modules(kind):
    torch.manual_seed(0)
    model = WRAPS[kind](TinyTransformer().eval())
    calls = run_of(6)
    plain = fxmask.capture(TinyTransformer().eval(), calls[0])
    wanted = [output(model, call) for call in calls]
    program = fxmask.capture(model, calls[0])
    accelerated = accelerate(program)
    for call, value in zip(calls, wanted, strict=True):
        torch.testing.assert_close(output(accelerated, call), value)
    assert [b.kind for b in program.blocks] == [b.kind for b in plain.blocks]


class Checkpointed(TinyTransformer):
    reentrant: bool | None = True

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        from torch.utils.checkpoint import checkpoint

        time = self.embed(t.reshape(-1, 1).to(x.dtype) / 1000)
        x = self.inp(x)
        for layer in self.layers:
            x = checkpoint(layer, x, time, use_reentrant=self.reentrant)
        return self.head(x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_has_the_plain_models_blocks(reentrant):
    torch.manual_seed(0)
    model = Checkpointed().eval()
    model.reentrant = reentrant
    plain = TinyTransformer().eval()
    plain.load_state_dict(model.state_dict())
    program = check_captured(model, run_of(6))
    assert [b.kind for b in program.blocks] == [b.kind for b in fxmask.capture(plain, call_of(0, 6)).blocks]


# Hooks that libraries put around modules


def first_block_cache(model: Any) -> None:
    from diffusers import FirstBlockCacheConfig

    model.enable_cache(FirstBlockCacheConfig(threshold=1e9))


def broadcast(model: Any) -> None:
    from diffusers import PyramidAttentionBroadcastConfig

    model.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 2),
            current_timestep_callback=lambda: 0.5,
            spatial_attention_block_identifiers=("transformer_blocks",),
        )
    )


def taylor_seer(model: Any) -> None:
    diffusers = pytest.importorskip("diffusers")
    if not hasattr(diffusers, "TaylorSeerCacheConfig"):
        pytest.skip("this diffusers has no TaylorSeer cache")
    model.enable_cache(diffusers.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1))


OWN_CACHES = {"FirstBlockCache": first_block_cache, "PyramidAttentionBroadcast": broadcast, "TaylorSeer": taylor_seer}


def flux() -> torch.nn.Module:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip


def flux_calls() -> list[dict[str, Any]]:
    text = {"encoder_hidden_states": torch.randn(1, 3, 8), "pooled_projections": torch.randn(1, 8)}
    places = {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}
    return [{"hidden_states": torch.randn(1, 4, 4), "timestep": torch.tensor([t / 1000]), **text, **places} for t in TIMESTEPS]


@pytest.fixture(scope="module")
def flux_program() -> Iterator[fxmask.Program]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield fxmask.capture(flux(), flux_calls()[0])


@pytest.mark.parametrize("kind", OWN_CACHES)
def test_own_caches_of_diffusers_are_refused_by_name(kind):
    model = flux()
    OWN_CACHES[kind](model)
    with pytest.raises(CaptureError, match=r"cache of diffusers' own.*disable_cache\(\)"):
        fxmask.capture(model, flux_calls()[0])
    model.disable_cache()  # type: ignore[operator]
    fxmask.capture(model, flux_calls()[0])


@pytest.mark.parametrize("kind", ["FirstBlockCache"])
def test_own_caches_that_are_switched_on_later_are_named(kind):
    model = flux()
    calls = flux_calls()
    program = fxmask.capture(model, calls[0])
    mask = fxmask.policies.interval(2)(program, tuple(t / 1000 for t in TIMESTEPS))
    accelerated = fxmask.compile(program, fxmask.rectify(program, mask), backend="eager")
    OWN_CACHES[kind](accelerated)
    twin = flux()
    OWN_CACHES[kind](twin)
    with torch.no_grad(), pytest.warns(UserWarning, match="cache of diffusers' own"), accelerated.cache_context("run"):
        found = [accelerated(**call).sample for call in calls]
    with torch.no_grad(), twin.cache_context("run"):  # type: ignore[operator]
        wanted = [twin(**call).sample for call in calls]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_group_offloading_is_refused_by_name():
    model = flux()
    model.enable_group_offload(  # type: ignore[operator]
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
    )
    with pytest.raises(CaptureError, match=r"offloaded by hooks.*\.to\(device\)"):
        fxmask.capture(model, flux_calls()[0])


def test_hooks_of_accelerate():
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    model = TinyTransformer().eval()
    hooks.add_hook_to_module(model.layers[0], hooks.AlignDevicesHook(execution_device="cpu", offload=True, weights_map={}))
    with pytest.raises(CaptureError, match=r"AlignDevicesHook around 'layers.0'"):
        fxmask.capture(model, call_of())


# A sample that is a list


def test_a_list_of_latents():
    from diffusers import ZImageTransformer2DModel

    torch.manual_seed(0)
    model = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[64, 32, 32],
    ).eval()  # fmt: skip
    for name, p in model.named_parameters():
        if "pad_token" in name:
            torch.nn.init.normal_(p)
    words = [torch.randn(6, 16) for _ in range(2)]
    times = (0.1, 0.3, 0.5, 0.7, 0.9)
    calls = [{"x": [torch.randn(4, 1, 8, 8) for _ in range(2)], "t": torch.full((2,), t), "cap_feats": words} for t in times]
    program = fxmask.capture(model, calls[0])
    for every in (1, 2):
        mask = fxmask.policies.interval(every)(program, times) if every > 1 else fxmask.Mask.ones(program, times)
        accelerated = fxmask.compile(program, fxmask.rectify(program, mask), backend="eager")
        found = [output(accelerated, call) for call in calls]
        wanted = fxmask.reference.run(program, mask, calls) if every > 1 else [output(model, call) for call in calls]
        for a, b in zip(found, wanted, strict=True):
            assert isinstance(a.sample, list)
            for x, y in zip(a.sample, b.sample, strict=True):
                torch.testing.assert_close(x, y)
