"""Small random-weight instances of denoisers that nobody prepared for, and a table of what fxmask makes of them.

``python tests/frontend/zoo.py --output examples/results/zoo.md [--only NAME]`` writes the table; ``test_zoo.py``
checks every row. An entry builds a model and the arguments of one call; nothing here is known to the library.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import fxmask
from fxmask.ir.outputs import flatten_output
from fxmask.tools.diagnosis import run_eagerly

os.environ.setdefault("HF_HUB_OFFLINE", "1")

BATCH = 2
Made = tuple[nn.Module, dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Attributes:
        name: what the table calls it.
        source: ``"diffusers"``, ``"timm"`` or ``"plain"``.
        family: ``"transformer"`` (branches own its MACs), ``"unet"`` (branches and stages do) or ``"other"``.
        build: makes the model and the arguments of one call, from the seed that torch has.
        roles: passed to ``fxmask.capture``.
        refused: part of the message with which capture must refuse the model; ``None`` if it must be captured.
        extra: beyond what was asked for; tested only with the slow tests.
    """

    name: str
    source: str
    family: str
    build: Callable[[], Made]
    roles: Mapping[str, str] = field(default_factory=dict)
    refused: str | None = None
    extra: bool = False

    def make(self) -> Made:
        """The model in eval mode and one call, the same each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, call = self.build()
            model.eval()
            wake(model)
        return model, call


ZOO: dict[str, Entry] = {}


def wake(model: nn.Module) -> None:
    """Random numbers for weights that start as zeros, so that no branch or gate is silent."""
    for p in model.parameters():
        if p.is_floating_point() and p.numel() and not p.any():
            nn.init.normal_(p, std=0.2)


def entry(
    source: str, family: str, name: str | None = None, **options: Any
) -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    def add(build: Callable[[], Made]) -> Callable[[], Made]:
        made = Entry(name or build.__name__, source, family, build, **options)
        ZOO[made.name] = made
        return build

    return add


def t(value: int = 901, batch: int = BATCH) -> torch.Tensor:
    return torch.full((batch,), value)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(BATCH, *shape)


# diffusers: U-Nets


@entry("diffusers", "unet", "UNet2DModel")
def unet_2d() -> Made:
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    return model, {"sample": randn(3, 16, 16), "timestep": t()}


def _unet_condition(**config: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    defaults = {
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "layers_per_block": 2,
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**{**defaults, **config})


@entry("diffusers", "unet", "UNet2DConditionModel (SD)")
def unet_sd() -> Made:
    return _unet_condition(), {"sample": randn(4, 16, 16), "timestep": t(), "encoder_hidden_states": randn(7, 24)}


@entry("diffusers", "unet", "UNet2DConditionModel (SDXL)")
def unet_sdxl() -> Made:
    model = _unet_condition(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 12,
    )
    added = {"text_embeds": randn(12), "time_ids": torch.randint(1, 64, (BATCH, 6)).float()}
    call = {"sample": randn(4, 16, 16), "timestep": t(), "encoder_hidden_states": randn(7, 24), "added_cond_kwargs": added}
    return model, call


@entry("diffusers", "unet", "UNet2DConditionModel (LDM)")
def unet_ldm() -> Made:
    model = _unet_condition(
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        only_cross_attention=(False, False, False),
    )
    return model, {"sample": randn(3, 16, 16), "timestep": t(), "encoder_hidden_states": randn(1, 24)}


@entry("diffusers", "unet", "UNet1DModel")
def unet_1d() -> Made:
    from diffusers import UNet1DModel

    model = UNet1DModel(
        sample_size=64,
        extra_in_channels=64,
        block_out_channels=(32, 32, 64),
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
    )
    return model, {"sample": randn(2, 64), "timestep": t()}


@entry("diffusers", "unet", "UNet3DConditionModel")
def unet_3d() -> Made:
    from diffusers import UNet3DConditionModel

    model = UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )
    return model, {"sample": randn(4, 3, 8, 8), "timestep": t(), "encoder_hidden_states": randn(5, 16)}


@entry("diffusers", "unet", "UNetSpatioTemporalConditionModel", extra=True)
def unet_spatio_temporal() -> Made:
    from diffusers import UNetSpatioTemporalConditionModel

    model = UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=16,
        num_attention_heads=(2, 2),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        num_frames=3,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    )
    call = {"sample": randn(3, 8, 8, 8), "timestep": t(), "encoder_hidden_states": randn(1, 16)}
    return model, {**call, "added_time_ids": torch.rand(BATCH, 3)}


@entry("diffusers", "unet", "UVit2DModel")
def uvit() -> Made:
    from diffusers import UVit2DModel

    model = UVit2DModel(
        hidden_size=32,
        cond_embed_dim=8,
        micro_cond_encode_dim=4,
        micro_cond_embed_dim=20,
        encoder_hidden_size=32,
        vocab_size=40,
        codebook_size=32,
        in_channels=32,
        block_out_channels=32,
        num_res_blocks=1,
        block_num_heads=4,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        sample_size=8,
    )
    call = {"input_ids": torch.randint(32, (BATCH, 8, 8)), "encoder_hidden_states": randn(7, 32)}
    return model, {**call, "pooled_text_emb": randn(8), "micro_conds": torch.rand(BATCH, 5) * 64}


class ControlledUNet(nn.Module):
    """A U-Net with the control net that feeds it, as one denoiser."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers import ControlNetModel

        self.unet = _unet_condition(layers_per_block=1)
        self.control = ControlNetModel(
            block_out_channels=(16, 32),
            layers_per_block=1,
            cross_attention_dim=24,
            attention_head_dim=4,
            norm_num_groups=8,
            conditioning_embedding_out_channels=(4, 8),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        )

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, hint: torch.Tensor) -> torch.Tensor:
        down, middle = self.control(sample, timestep, text, hint, return_dict=False)
        more = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return self.unet(sample, timestep, text, **more).sample


@entry("diffusers", "unet", "ControlNet inside a U-Net")
def controlled_unet() -> Made:
    call = {"sample": randn(4, 16, 16), "timestep": t(), "text": randn(7, 24), "hint": randn(3, 32, 32)}
    return ControlledUNet(), call


@entry(
    "diffusers",
    "unet",
    "U-Net fed by a ControlNet",
    roles={"down_block_additional_residuals": "step", "mid_block_additional_residual": "step"},
)
def fed_unet() -> Made:
    down = [randn(16, 16, 16), randn(16, 16, 16), randn(16, 8, 8), randn(32, 8, 8)]
    call = {"sample": randn(4, 16, 16), "timestep": t(), "encoder_hidden_states": randn(7, 24)}
    control = {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": randn(32, 8, 8)}
    return _unet_condition(layers_per_block=1), {**call, **control}


# diffusers: transformers


@entry("diffusers", "transformer", "DiTTransformer2DModel")
def dit() -> Made:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=3, sample_size=16, norm_num_groups=8
    )
    return model, {"hidden_states": randn(4, 16, 16), "timestep": t(), "class_labels": torch.tensor([1, 2])}


def _pixart(**config: Any) -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    defaults = {
        "num_attention_heads": 4,
        "attention_head_dim": 12,
        "num_layers": 3,
        "cross_attention_dim": 48,
        "sample_size": 16,
        "caption_channels": 24,
        "norm_num_groups": 8,
    }
    return PixArtTransformer2DModel(**{**defaults, **config})


@entry("diffusers", "transformer", "PixArtTransformer2DModel (alpha)")
def pixart_alpha() -> Made:
    added = {"resolution": torch.full((BATCH, 2), 128.0), "aspect_ratio": torch.ones(BATCH, 1)}
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]]).expand(BATCH, -1)
    call = {"hidden_states": randn(4, 16, 16), "encoder_hidden_states": randn(7, 24), "timestep": t()}
    model = _pixart(use_additional_conditions=True)
    return model, {**call, "added_cond_kwargs": added, "encoder_attention_mask": mask}


@entry("diffusers", "transformer", "PixArtTransformer2DModel (sigma)")
def pixart_sigma() -> Made:
    call = {"hidden_states": randn(4, 16, 16), "encoder_hidden_states": randn(7, 24), "timestep": t()}
    model = _pixart(use_additional_conditions=False, interpolation_scale=2)
    return model, {**call, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def _sd3(**config: Any) -> Made:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=12,
        pos_embed_max_size=24,
        **config,
    )
    call = {"hidden_states": randn(4, 16, 16), "encoder_hidden_states": randn(17, 24), "pooled_projections": randn(12)}
    return model, {**call, "timestep": t()}


@entry("diffusers", "transformer", "SD3Transformer2DModel")
def sd3() -> Made:
    return _sd3()


@entry("diffusers", "transformer", "SD3Transformer2DModel (3.5, dual attention)", extra=True)
def sd35() -> Made:
    return _sd3(dual_attention_layers=(0, 1), qk_norm="rms_norm")


@entry("diffusers", "transformer", "FluxTransformer2DModel")
def flux() -> Made:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    call = {"hidden_states": randn(36, 8), "encoder_hidden_states": randn(17, 24), "pooled_projections": randn(12)}
    ids = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(6.0), torch.arange(6.0), indexing="ij"), -1).reshape(36, 3)
    call |= {"timestep": torch.full((BATCH,), 0.9), "img_ids": ids, "txt_ids": torch.zeros(17, 3)}
    return model, {**call, "guidance": torch.full((BATCH,), 3.5)}


@entry("diffusers", "transformer", "HunyuanDiT2DModel")
def hunyuan_dit() -> Made:
    from diffusers import HunyuanDiT2DModel
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    model = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=16,
        hidden_size=32,
        num_layers=4,
        cross_attention_dim=24,
        cross_attention_dim_t5=24,
        pooled_projection_dim=16,
        text_len=5,
        text_len_t5=6,
        norm_type="layer_norm",
    )
    call = {"hidden_states": randn(4, 16, 16), "timestep": t().float(), "encoder_hidden_states": randn(5, 24)}
    call |= {"text_embedding_mask": torch.ones(BATCH, 5), "encoder_hidden_states_t5": randn(6, 24)}
    call |= {"text_embedding_mask_t5": torch.ones(BATCH, 6), "image_meta_size": torch.rand(BATCH, 6) * 64}
    call |= {"style": torch.zeros(BATCH, dtype=torch.int64)}
    rotary = get_2d_rotary_pos_embed(16, ((0, 0), (8, 8)), (8, 8), output_type="pt")
    return model, {**call, "image_rotary_emb": rotary}


@entry("diffusers", "transformer", "AuraFlowTransformer2DModel")
def aura_flow() -> Made:
    from diffusers import AuraFlowTransformer2DModel

    model = AuraFlowTransformer2DModel(
        sample_size=16,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    timestep = torch.full((BATCH,), 0.9)
    return model, {"hidden_states": randn(4, 16, 16), "encoder_hidden_states": randn(17, 24), "timestep": timestep}


@entry("diffusers", "transformer", "LuminaNextDiT2DModel")
def lumina() -> Made:
    from diffusers import LuminaNextDiT2DModel
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    model = LuminaNextDiT2DModel(
        sample_size=16,
        hidden_size=32,
        num_layers=3,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=24,
    )
    call = {"hidden_states": randn(4, 16, 16), "timestep": torch.full((BATCH,), 0.9), "encoder_hidden_states": randn(7, 24)}
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]]).expand(BATCH, -1)
    return model, {
        **call,
        "encoder_mask": mask,
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 24, 24),
        "cross_attention_kwargs": {},
    }


@entry("diffusers", "transformer", "Lumina2Transformer2DModel", extra=True)
def lumina2() -> Made:
    from diffusers import Lumina2Transformer2DModel

    model = Lumina2Transformer2DModel(
        sample_size=16,
        in_channels=4,
        hidden_size=48,
        num_layers=3,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(8, 8, 8),
        axes_lens=(32, 24, 24),
        cap_feat_dim=24,
    )
    call = {"hidden_states": randn(4, 16, 16), "timestep": torch.full((BATCH,), 0.9), "encoder_hidden_states": randn(7, 24)}
    return model, {**call, "encoder_attention_mask": torch.ones(BATCH, 7, dtype=torch.bool)}


@entry("diffusers", "transformer", "SanaTransformer2DModel")
def sana() -> Made:
    from diffusers import SanaTransformer2DModel

    model = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=8,
    )
    return model, {"hidden_states": randn(4, 8, 8), "encoder_hidden_states": randn(7, 24), "timestep": t()}


def _cogvideox(**config: Any) -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    defaults = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 16,
        "text_embed_dim": 24,
        "num_layers": 3,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 9,
        "max_text_seq_length": 7,
    }
    return CogVideoXTransformer3DModel(**{**defaults, **config})


@entry("diffusers", "transformer", "CogVideoXTransformer3DModel")
def cogvideox() -> Made:
    return _cogvideox(), {"hidden_states": randn(3, 4, 8, 8), "encoder_hidden_states": randn(7, 24), "timestep": t()}


@entry("diffusers", "transformer", "CogVideoXTransformer3DModel (other frames)")
def cogvideox_other() -> Made:
    """Positions are written through ``.data`` when called: a strict export drops them without a word."""
    call = {"hidden_states": randn(2, 4, 8, 8), "encoder_hidden_states": randn(7, 24), "timestep": t()}
    return _cogvideox(num_layers=2), call


@entry("diffusers", "transformer", "LTXVideoTransformer3DModel")
def ltx() -> Made:
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=3,
        caption_channels=24,
    )
    call = {"hidden_states": randn(48, 8), "encoder_hidden_states": randn(7, 24), "timestep": t()}
    call |= {"encoder_attention_mask": torch.ones(BATCH, 7, dtype=torch.bool)}
    return model, {**call, "num_frames": 3, "height": 4, "width": 4}


@entry("diffusers", "transformer", "WanTransformer3DModel")
def wan() -> Made:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=16,
        ffn_dim=64,
        num_layers=3,
        rope_max_seq_len=32,
    )
    return model, {"hidden_states": randn(4, 3, 8, 8), "timestep": t(), "encoder_hidden_states": randn(7, 24)}


@entry("diffusers", "transformer", "MochiTransformer3DModel")
def mochi() -> Made:
    from diffusers import MochiTransformer3DModel

    model = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=24,
        time_embed_dim=8,
        max_sequence_length=7,
    )
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]]).expand(BATCH, -1).bool()
    call = {"hidden_states": randn(4, 2, 12, 12), "encoder_hidden_states": randn(7, 24), "timestep": t()}
    return model, {**call, "encoder_attention_mask": mask}


@entry("diffusers", "transformer", "HunyuanVideoTransformer3DModel", extra=True)
def hunyuan_video() -> Made:
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=24,
        pooled_projection_dim=12,
        rope_axes_dim=(4, 4, 8),
    )
    call = {"hidden_states": randn(4, 3, 8, 8), "timestep": t(), "encoder_hidden_states": randn(7, 24)}
    call |= {"encoder_attention_mask": torch.ones(BATCH, 7, dtype=torch.bool), "pooled_projections": randn(12)}
    return model, {**call, "guidance": torch.full((BATCH,), 6000.0)}


@entry("diffusers", "transformer", "AllegroTransformer3DModel", extra=True)
def allegro() -> Made:
    from diffusers import AllegroTransformer3DModel
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    model = AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=3,
        sample_height=8,
        sample_width=8,
        sample_frames=3,
        caption_channels=16,
    )
    *rotary, t, h, w = get_3d_rotary_pos_embed_allegro(12, ((0, 0), (4, 4)), (4, 4), 3, (1.0, 1.0, 1.0))
    grid = torch.cartesian_prod(t.long(), h.long(), w.long()).reshape(-1, 3).transpose(0, 1).reshape(3, 1, -1).contiguous()
    call = {"hidden_states": randn(4, 3, 8, 8), "encoder_hidden_states": randn(7, 16), "timestep": torch.full((BATCH,), 901)}
    call |= {"attention_mask": torch.ones(BATCH, 3, 8, 8), "encoder_attention_mask": torch.ones(BATCH, 7)}
    return model, {**call, "image_rotary_emb": (tuple(rotary), tuple(grid))}


@entry("diffusers", "transformer", "LatteTransformer3DModel", extra=True)
def latte() -> Made:
    from diffusers import LatteTransformer3DModel

    model = LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=24,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=16,
        video_length=3,
    )
    return model, {"hidden_states": randn(4, 3, 8, 8), "timestep": t(), "encoder_hidden_states": randn(7, 16)}


@entry("diffusers", "transformer", "CosmosTransformer3DModel", extra=True)
def cosmos() -> Made:
    from diffusers import CosmosTransformer3DModel

    model = CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        text_embed_dim=24,
        adaln_lora_dim=4,
        max_size=(4, 16, 16),
        rope_scale=(2.0, 1.0, 1.0),
    )
    call = {"hidden_states": randn(4, 3, 8, 8), "timestep": t(), "encoder_hidden_states": randn(7, 24)}
    return model, {**call, "fps": 24, "padding_mask": torch.zeros(1, 1, 8, 8)}


@entry("diffusers", "transformer", "CogView4Transformer2DModel", extra=True)
def cogview4() -> Made:
    from diffusers import CogView4Transformer2DModel

    model = CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=24,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=16,
        sample_size=16,
        rope_axes_dim=(16, 16),
    )
    size = torch.tensor([[64.0, 64.0]]).expand(BATCH, -1)
    call = {"hidden_states": randn(4, 16, 16), "encoder_hidden_states": randn(7, 24), "timestep": t()}
    return model, {**call, "original_size": size, "target_size": size, "crop_coords": size * 0}


@entry("diffusers", "transformer", "ChromaTransformer2DModel", extra=True)
def chroma() -> Made:
    from diffusers import ChromaTransformer2DModel

    model = ChromaTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    ids = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(8.0), torch.arange(8.0), indexing="ij"), -1).reshape(64, 3)
    call = {"hidden_states": randn(64, 8), "encoder_hidden_states": randn(17, 24), "timestep": torch.full((BATCH,), 0.9)}
    return model, {**call, "img_ids": ids, "txt_ids": torch.zeros(17, 3)}


@entry("diffusers", "transformer", "StableAudioDiTModel")
def stable_audio() -> Made:
    from diffusers import StableAudioDiTModel
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    model = StableAudioDiTModel(
        sample_size=48,
        in_channels=8,
        out_channels=8,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=12,
        cross_attention_input_dim=24,
    )
    rotary = get_1d_rotary_pos_embed(8, 49, use_real=True, repeat_interleave_real=False)
    call = {"hidden_states": randn(8, 48), "timestep": torch.full((BATCH,), 0.9), "encoder_hidden_states": randn(7, 24)}
    return model, {**call, "global_hidden_states": randn(1, 12), "rotary_embedding": rotary}


@entry("diffusers", "transformer", "PriorTransformer")
def prior() -> Made:
    from diffusers import PriorTransformer

    model = PriorTransformer(
        num_attention_heads=2, attention_head_dim=16, num_layers=3, embedding_dim=24, num_embeddings=7, additional_embeddings=4
    )
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]]).expand(BATCH, -1)
    call = {"hidden_states": randn(24), "timestep": t(), "proj_embedding": randn(24), "encoder_hidden_states": randn(7, 24)}
    return model, {**call, "attention_mask": mask.bool()}


@entry("diffusers", "transformer", "QwenImageTransformer2DModel")
def qwen_image() -> Made:
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 4, 8),
    )
    call = {"hidden_states": randn(36, 16), "encoder_hidden_states": randn(17, 24), "timestep": torch.full((BATCH,), 0.9)}
    call |= {"encoder_hidden_states_mask": torch.ones(BATCH, 17, dtype=torch.bool)}
    return model, {**call, "img_shapes": [[(1, 6, 6)]] * BATCH}


# timm: backbones made into noise predictors


class NoisePredictor(nn.Module):
    """An image backbone with a time-conditioned stem and head; its features become pixels again."""

    def __init__(self, name: str, size: int = 32, **config: Any) -> None:
        super().__init__()
        import timm

        make = getattr(timm.models, name, None) or functools.partial(timm.create_model, name, pretrained=False)
        self.backbone = make(num_classes=0, **config)
        self.size = size
        with torch.no_grad():
            features = self.grid(self.backbone.eval().forward_features(torch.zeros(1, 3, size, size)))
        width, side = features.shape[1], features.shape[2]
        self.time = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 3 + 2 * width))
        self.head = nn.Conv2d(width, 3 * (size // side) ** 2, 1)
        self.scale = size // side

    def grid(self, features: torch.Tensor) -> torch.Tensor:
        """``[B, C, h, w]`` of tokens with or without class tokens, or of either order of channels."""
        if features.dim() == 3:
            side = int(features.shape[1] ** 0.5)
            features = features[:, features.shape[1] - side * side :].unflatten(1, (side, side))
            return features.permute(0, 3, 1, 2)
        width = self.backbone.num_features
        return features if features.shape[1] == width else features.permute(0, 3, 1, 2)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        angles = t.reshape(-1, 1) * torch.exp(-torch.arange(8, device=x.device)).to(x.dtype)
        time = self.time(torch.cat([angles.sin(), angles.cos()], -1))[:, :, None, None]
        features = self.grid(self.backbone.forward_features(x + time[:, :3]))
        shift, scale = time[:, 3:].chunk(2, 1)
        return F.pixel_shuffle(self.head(features * (1 + scale) + shift), self.scale)


PARALLEL = "vit_small_patch16_18x2_224"  # two attentions side by side, then two MLPs
EXTRA = ("maxvit_pico_rw_256", "MetaFormer", "xcit_nano_12_p8_224", "resnet18", "vit_base_patch16_rope_224")
TOKENS: dict[str, Any] = {"img_size": 32, "patch_size": 4, "depth": 3, "embed_dim": 48, "num_heads": 3}
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit_tiny_patch16_224": ("transformer", TOKENS),
    "swin_tiny_patch4_window7_224": (
        "transformer",
        {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)},
    ),
    "convnext_atto": ("unet", {"depths": (3, 3, 3, 3), "dims": (16, 16, 32, 32), "patch_size": 2}),
    "coatnet_nano_rw_224": ("unet", {"img_size": 64}),
    "maxvit_pico_rw_256": ("unet", {"img_size": 64}),
    "MlpMixer": ("transformer", {"img_size": 32, "patch_size": 4, "num_blocks": 3, "embed_dim": 48}),
    "eva02_tiny_patch14_224": ("transformer", TOKENS),
    "beit_base_patch16_224": ("transformer", TOKENS),
    "MetaFormer": ("unet", {"depths": (1, 2, 2, 2), "dims": (16, 16, 32, 32)}),
    "xcit_nano_12_p8_224": ("unet", {"img_size": 32, "depth": 6, "embed_dim": 64, "num_heads": 2, "cls_attn_layers": 1}),
    "resnet18": ("unet", {"channels": (16, 16, 32, 32), "stem_width": 16}),
    "vit_base_patch16_rope_224": ("transformer", {**TOKENS, "depth": 2}),
    PARALLEL: ("transformer", {**TOKENS, "depth": 2}),
}


def _backbone(name: str, config: dict[str, Any]) -> Made:
    size = int(config.get("img_size", 32))
    return NoisePredictor(name, size, **config), {"x": randn(3, size, size), "t": t()}


for _name, (_family, _config) in BACKBONES.items():
    entry("timm", _family, f"timm {_name}", extra=_name in EXTRA)(lambda name=_name, config=_config: _backbone(name, config))


# plain PyTorch, each in another person's style


def frequencies(t: torch.Tensor, width: int) -> torch.Tensor:
    angles = t.reshape(-1, 1).float() * torch.exp(torch.linspace(0, -8, width // 2, device=t.device))
    return torch.cat([angles.sin(), angles.cos()], -1)


class EinopsDenoiser(nn.Module):
    """einops throughout; pre-norm attention over patches."""

    def __init__(self, dim: int = 32, depth: int = 3, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.patches = nn.Linear(3 * 4, dim)
        self.time = nn.Linear(16, dim)
        self.qkv = nn.ModuleList(nn.Linear(dim, 3 * dim, bias=False) for _ in range(depth))
        self.out = nn.ModuleList(nn.Linear(dim, dim) for _ in range(depth))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)) for _ in range(depth)
        )
        self.norm = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))
        self.pixels = nn.Linear(dim, 3 * 4)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        from einops import einsum, rearrange

        h = x.shape[-2] // 2
        x = self.patches(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2))
        x = x + rearrange(self.time(frequencies(t, 16)), "b d -> b 1 d")
        for norm, qkv, out, mlp in zip(self.norm, self.qkv, self.out, self.mlp, strict=True):
            q, k, v = rearrange(qkv(norm(x)), "b n (three h d) -> three b h n d", three=3, h=self.heads)
            weights = (einsum(q, k, "b h i d, b h j d -> b h i j") * q.shape[-1] ** -0.5).softmax(-1)
            x = out(rearrange(einsum(weights, v, "b h i j, b h j d -> b h i d"), "b h n d -> b n (h d)")) + x
            x = mlp(x) + x
        return rearrange(self.pixels(x), "b (h w) (c p q) -> b c (h p) (w q)", h=h, p=2, q=2)


@entry("plain", "transformer", "einops")
def einops_style() -> Made:
    return EinopsDenoiser(), {"x": randn(3, 16, 16), "t": t()}


class FunctionalDenoiser(nn.Module):
    """Weights in a ParameterDict, everything through torch.nn.functional; post-norm, and a gate learned per channel."""

    def __init__(self, dim: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.depth = depth
        shapes: dict[str, tuple[int, ...]] = {"enter": (dim, 4), "leave": (4, dim), "time": (dim, 16)}
        for i in range(depth):
            shapes |= {f"q{i}": (dim, dim), f"kv{i}": (2 * dim, dim), f"o{i}": (dim, dim), f"gate{i}": (dim,)}
            shapes |= {f"up{i}": (4 * dim, dim), f"down{i}": (dim, 4 * dim)}
        self.w = nn.ParameterDict({name: torch.randn(shape) * shape[-1] ** -0.5 for name, shape in shapes.items()})

    def forward(self, latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        w = self.w
        x = F.linear(latents, w["enter"]) + F.linear(frequencies(sigma, 16), w["time"])[:, None]
        for i in range(self.depth):
            q, (k, v) = F.linear(x, w[f"q{i}"]), F.linear(x, w[f"kv{i}"]).chunk(2, -1)
            a = F.linear(F.scaled_dot_product_attention(q, k, v), w[f"o{i}"])
            x = F.layer_norm(x + torch.tanh(w[f"gate{i}"]) * a, (x.shape[-1],))
            x = F.layer_norm(x + F.linear(F.gelu(F.linear(x, w[f"up{i}"])), w[f"down{i}"]), (x.shape[-1],))
        return F.linear(x, w["leave"])


@entry("plain", "transformer", "functional, post-norm")
def functional_style() -> Made:
    return FunctionalDenoiser(), {"latents": randn(64, 4), "sigma": torch.full((BATCH,), 0.9)}


class InPlaceUNet(nn.Module):
    """A score-based U-Net that writes in place wherever it can, with preallocated skips."""

    def __init__(self, ch: int = 16) -> None:
        super().__init__()
        self.inp = nn.Conv2d(1, ch, 3, padding=1)
        self.temb = nn.Linear(16, ch)
        self.enc = nn.ModuleList([self.block(ch), self.block(ch)])
        self.down = nn.Conv2d(ch, ch, 3, 2, 1)
        self.mid = nn.ModuleList([self.block(ch), self.block(ch)])
        self.up = nn.ConvTranspose2d(ch, ch, 4, 2, 1)
        self.merge = nn.Conv2d(2 * ch, ch, 1)
        self.dec = nn.ModuleList([self.block(ch), self.block(ch)])
        self.outp = nn.Conv2d(ch, 1, 3, padding=1)

    @staticmethod
    def block(ch: int) -> nn.Module:
        return nn.Sequential(
            nn.GroupNorm(4, ch), nn.ReLU(inplace=True), nn.Conv2d(ch, ch, 3, padding=1), nn.ReLU(), nn.Conv2d(ch, ch, 3, 1, 1)
        )

    def forward(self, x_t: torch.Tensor, noise_level: torch.Tensor) -> torch.Tensor:
        h = self.inp(x_t)
        h += self.temb(frequencies(noise_level, 16))[:, :, None, None]
        for f in self.enc:
            h += f(h).mul_(0.7)
        both = h.new_empty(h.shape[0], 2 * h.shape[1], *h.shape[2:])
        both[:, : h.shape[1]] = h
        h = self.down(h)
        for f in self.mid:
            h.add_(f(h))
        both[:, -h.shape[1] :].copy_(self.up(h))
        h = self.merge(both)
        for f in self.dec:
            h.add_(f(h))
        return self.outp(h.relu_())


@entry("plain", "unet", "in-place U-Net")
def in_place_style() -> Made:
    return InPlaceUNet(), {"x_t": randn(1, 16, 16), "noise_level": torch.full((BATCH,), 0.9)}


class LambdaDenoiser(nn.Module):
    """The network is a list of lambdas over modules; returns a dict."""

    def __init__(self, dim: int = 48, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        self.steps: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = []
        self.layers["in"] = nn.Linear(8, dim)
        self.steps.append(lambda x, e: self.layers["in"](x))
        for i in range(depth):
            self.layers[f"film{i}"] = nn.Linear(16, 2 * dim)
            self.layers[f"fc{i}"] = nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))
            self.steps.append(lambda x, e, i=i: x + self.layers[f"fc{i}"](self.film(i, x, e)))
        self.layers["out"] = nn.Linear(dim, 8)
        self.steps.append(lambda x, e: self.layers["out"](x))

    def film(self, i: int, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        scale, shift = self.layers[f"film{i}"](e)[:, None].chunk(2, -1)
        return F.layer_norm(x, (x.shape[-1],)) * (1 + scale) + shift

    def forward(self, x: torch.Tensor, *, t: torch.Tensor) -> dict[str, torch.Tensor]:
        e = frequencies(t, 16)
        for step in self.steps:
            x = step(x, e)
        return {"eps": x}


@entry("plain", "transformer", "list of lambdas")
def lambda_style() -> Made:
    return LambdaDenoiser(), {"x": randn(32, 8), "t": t()}


class SharedDenoiser(nn.Module):
    """One layer applied again and again (a universal transformer), sandwich norms."""

    def __init__(self, dim: int = 32, rounds: int = 4) -> None:
        super().__init__()
        self.rounds = rounds
        self.inp, self.outp, self.time = nn.Linear(4, dim), nn.Linear(dim, 4), nn.Linear(16, dim)
        self.attn = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(4))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x = self.inp(x) + self.time(frequencies(t, 16))[:, None]
        before, after, before_mlp, after_mlp = self.norms
        for _ in range(self.rounds):
            h = before(x)
            x = x + after(self.attn(h, h, h, need_weights=False)[0])
            x = x + after_mlp(self.mlp(before_mlp(x)))
        return self.outp(x)


@entry("plain", "transformer", "shared submodule, sandwich norms")
def shared_style() -> Made:
    return SharedDenoiser(), {"x": randn(48, 4), "t": t()}


class DenseExperts(nn.Module):
    """Every layer is a softmax-weighted sum of all experts."""

    def __init__(self, dim: int = 32, depth: int = 3, experts: int = 3) -> None:
        super().__init__()
        self.inp, self.outp, self.time = nn.Linear(4, dim), nn.Linear(dim, 4), nn.Linear(16, dim)
        self.router = nn.ModuleList(nn.Linear(dim, experts) for _ in range(depth))
        self.experts = nn.ModuleList(
            nn.ModuleList(nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim)) for _ in range(experts))
            for _ in range(depth)
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x = self.inp(x) + self.time(frequencies(t, 16))[:, None]
        for router, experts in zip(self.router, self.experts, strict=True):
            h = F.layer_norm(x, (x.shape[-1],))
            weights = router(h).softmax(-1)
            for k, expert in enumerate(experts):
                x = x + weights[..., k, None] * expert(h)
        return self.outp(x)


@entry("plain", "transformer", "dense mixture of experts")
def dense_experts() -> Made:
    return DenseExperts(), {"x": randn(32, 4), "t": t()}


class ConcatUNet1d(nn.Module):
    """A 1-D WaveNet-like denoiser: gated branches, skips that are summed at the end."""

    def __init__(self, ch: int = 24, depth: int = 4) -> None:
        super().__init__()
        self.inp, self.time = nn.Conv1d(1, ch, 1), nn.Linear(16, ch)
        self.dilated = nn.ModuleList(nn.Conv1d(ch, 2 * ch, 3, padding=2**i, dilation=2**i) for i in range(depth))
        self.both = nn.ModuleList(nn.Conv1d(ch, 2 * ch, 1) for _ in range(depth))
        self.out = nn.Sequential(nn.ReLU(), nn.Conv1d(ch, ch, 1), nn.ReLU(), nn.Conv1d(ch, 1, 1))

    def forward(self, audio: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        x, time = self.inp(audio), self.time(frequencies(step, 16))[:, :, None]
        total = torch.zeros_like(x)
        for dilated, both in zip(self.dilated, self.both, strict=True):
            gate, value = dilated(x + time).chunk(2, 1)
            residual, skip = both(gate.sigmoid() * value.tanh()).chunk(2, 1)
            x = (x + residual) * 0.5**0.5
            total = total + skip
        return self.out(total)


@entry("plain", "unet", "WaveNet, skips summed")
def wavenet() -> Made:
    return ConcatUNet1d(), {"audio": randn(1, 64), "step": t()}


class RoutedExperts(nn.Module):
    """Tokens go to the expert that wins: sizes depend on the data."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.router = nn.Linear(dim, 2)
        self.experts = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        choice = self.router(x).argmax(-1)
        y = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            where = (choice == k).nonzero(as_tuple=True)
            y[where] = expert(x[where])
        return x + y


@entry("plain", "other", "experts routed by data-dependent sizes", refused="data-dependent")
def routed_experts() -> Made:
    return RoutedExperts(), {"x": randn(8, 16), "t": t()}


class Scripted(nn.Module):
    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.inp = nn.Linear(dim, dim)
        self.mlp = torch.jit.script(nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x = self.inp(x)
        return x + self.mlp(x) * t.reshape(-1, 1, 1).cos()


@entry("plain", "other", "a TorchScript submodule")
def scripted() -> Made:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Scripted(), {"x": randn(8, 16), "t": t()}


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x + (self.early(x) if float(t.flatten()[0]) > 500 else self.late(x))


@entry("plain", "other", "a branch on the timestep's value", refused="a number is read from ['t']")
def branching() -> Made:
    return Branching(), {"x": randn(8, 16), "t": t()}


# the table


@dataclass(frozen=True)
class Row:
    """What fxmask made of one model; shares are of all MACs, the whole-output cut left out."""

    entry: Entry
    rung: str = ""
    nodes: int = 0
    branches: int = 0
    stages: int = 0
    branch_share: float = 0.0
    any_share: float = 0.0
    difference: float = 0.0
    agrees: bool = False
    seconds: float = 0.0
    refusal: str = ""


def make_calls(entry: Entry, call: Mapping[str, Any], signature: Any, steps: int = 4) -> list[dict[str, Any]]:
    """A sampling run: other samples, timesteps and per-step arguments at each step."""
    generator = torch.Generator().manual_seed(1)

    def fresh(x: Any) -> Any:
        if isinstance(x, (tuple, list)):
            return type(x)(fresh(v) for v in x)
        if not x.is_floating_point():
            return torch.randint(int(x.max()) + 1, x.shape, generator=generator).to(x.dtype)
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)

    calls = []
    for i in range(steps):
        changed = {
            name: fresh(call[name]) for name, role in {**entry.roles, signature.sample: "step"}.items() if role == "step"
        }
        if signature.timestep is not None:
            value = call[signature.timestep]
            changed[signature.timestep] = (value * (1 - i / (steps + 1))).to(value.dtype)
        calls.append({**call, **changed})
    return calls


def random_mask(
    program: fxmask.Program, steps: int, seed: int = 0, kinds: tuple[str, ...] = ("branch", "stage")
) -> fxmask.Mask:
    """Half of all entries compute; the first step does throughout."""
    names = [block.name for block in program.blocks if block.kind in kinds]
    compute = torch.rand(steps, len(names), generator=torch.Generator().manual_seed(seed)) > 0.5
    compute[0] = True
    return fxmask.Mask(compute, tuple(900.0 - 100 * i for i in range(steps)), tuple(names), fingerprint=program.fingerprint)


def owned(program: fxmask.Program, kinds: tuple[str, ...]) -> float:
    """Share of all MACs that die when every block of these kinds is skipped."""
    return program.coverage(kinds)


@contextlib.contextmanager
def slow_attention() -> Iterator[None]:
    """Without the fused inference kernel of nn.MultiheadAttention, which no tracer records."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def difference(program: fxmask.Program, model: nn.Module, calls: list[dict[str, Any]]) -> float:
    """Largest difference between the program with nothing skipped and the model; 0 only if every bit agrees."""
    steps = tuple(900.0 - 100 * i for i in range(len(calls)))
    ones = fxmask.Mask.ones(program, steps)
    worst = 0.0
    for call, got in zip(calls, run_eagerly(program, ones, calls), strict=True):
        with torch.no_grad(), slow_attention():
            expected = flatten_output(model(**call))[0]
        for a, b in zip(got, expected, strict=True):
            if not torch.equal(a, b):
                worst = max(worst, float((a.double() - b.double()).abs().max()), 5e-324)
    return worst


def agrees_with_reference(program: fxmask.Program, calls: list[dict[str, Any]], seed: int = 0) -> bool:
    """Whether a random mask gives the same bits as the interpreter that defines its meaning."""
    mask = random_mask(program, len(calls), seed)
    expected = [flatten_output(x)[0] for x in fxmask.reference.run(program, mask, calls)]
    got = run_eagerly(program, mask, calls)
    return all(torch.equal(a, b) for x, y in zip(got, expected, strict=True) for a, b in zip(x, y, strict=True))


def examine(entry: Entry) -> tuple[Row, fxmask.Program | None]:
    """Capture one model and measure what the table says of it."""
    model, call = entry.make()
    started = time.perf_counter()
    try:
        program = fxmask.capture(model, call, roles=entry.roles)
    except fxmask.CaptureError as error:
        return Row(entry, seconds=time.perf_counter() - started, refusal=str(error)), None
    seconds = time.perf_counter() - started
    calls = make_calls(entry, call, program.signature)
    row = Row(
        entry=entry,
        rung=program.rung,
        nodes=len(program.graph_module.graph.nodes),
        branches=len(program.branches),
        stages=sum(block.kind == "stage" for block in program.blocks),
        branch_share=owned(program, ("branch",)),
        any_share=owned(program, ("branch", "stage")),
        difference=difference(program, model, calls),
        agrees=all(agrees_with_reference(program, calls, seed) for seed in range(2)),
        seconds=seconds,
    )
    return row, program


HEADER = """# The zoo

Small random-weight instances, made by `python tests/frontend/zoo.py --output examples/results/zoo.md` (one thread; torch
{torch}). Shares are of all MACs, the whole-output cut left out. *All ones*: largest difference between the program that
computes everything and the model, over 4 calls (the model without the fused inference kernel of `nn.MultiheadAttention`, which
differs from its own other path by rounding). *Random masks*: 2 masks over 4 steps, specialised graphs against the reference
interpreter, bit for bit.

| model | rung | nodes | branches | stages | branches own | with stages | all ones | random masks | capture |
|---|---|---|---|---|---|---|---|---|---|
"""


def line(r: Row) -> str:
    name = f"{r.entry.source}: {r.entry.name.removeprefix('timm ')}"
    if r.refusal:
        return f"| {name} | refused, see below | | | | | | | | {r.seconds:.1f} s |"
    return (
        f"| {name} | {r.rung} | {r.nodes} | {r.branches} | {r.stages} | {r.branch_share:.1%} | {r.any_share:.1%} | "
        f"{r.difference:.3g} | {'agree' if r.agrees else 'DIFFER'} | {r.seconds:.1f} s |"
    )


def table(rows: list[Row]) -> str:
    text = HEADER.format(torch=torch.__version__.split("+")[0]) + "\n".join(map(line, rows)) + "\n"
    refused = [r for r in rows if r.refusal]
    if refused:
        text += "\nRefused, cleanly:\n"
    for r in refused:
        text += f"\n{r.entry.name}:\n\n```\n{r.refusal}\n```\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", help="part of a model's name")
    parser.add_argument("--summary", action="store_true", help="print the blocks too")
    given = parser.parse_args()
    rows = []
    for made in ZOO.values():
        if given.only and given.only.lower() not in made.name.lower():
            continue
        try:
            row, program = examine(made)
        except Exception as error:
            if given.output:
                raise
            print(f"{made.name}: {type(error).__name__}: {str(error)[:600]}")
            continue
        rows.append(row)
        print(line(row), flush=True)
        if row.refusal and not given.output:
            print(row.refusal)
        if given.summary and program is not None:
            print(program.summary())
    if given.output:
        here = f"{Path(__file__).resolve().parents[2]}/"
        given.output.write_text(table(rows).replace(here, ""))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{len(rows)} models, peak memory {peak:.2f} GiB", file=sys.stderr)


if __name__ == "__main__":
    main()
