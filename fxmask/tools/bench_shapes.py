"""Full-size denoisers by name: shapes of known models with random weights, which speed does not depend on.

Each is built on the default device and in the default type, and takes the batch size B.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from fxmask.errors import InputError

Case = tuple[torch.nn.Module, dict[str, Any]]


def diffusers_package() -> Any:
    """The package, which this one does without elsewhere.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise InputError(f"shapes of known models need diffusers: pip install diffusers ({error})") from error


def dit_xl_2(batch: int = 1, **smaller: Any) -> Case:
    """DiT-XL/2 at 256 pixels: 28 layers, 1,152 wide, 256 tokens."""
    config = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "sample_size": 32}
    model = diffusers_package().DiTTransformer2DModel(**{**config, "in_channels": 4, "out_channels": 8, **smaller})
    side = model.config.sample_size
    return model, {
        "hidden_states": torch.randn(batch, 4, side, side),
        "timestep": torch.full((batch,), 500),
        "class_labels": torch.arange(batch) % 1000,
    }


def pixart_sigma_1024(batch: int = 1, **smaller: Any) -> Case:
    """PixArt-Sigma at 1,024 pixels: 28 layers, 1,152 wide, 4,096 image and 300 caption tokens."""
    config = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "sample_size": 128, "out_channels": 8}
    config |= {"cross_attention_dim": 1152, "caption_channels": 4096, "interpolation_scale": 2, **smaller}
    model = diffusers_package().PixArtTransformer2DModel(**config, use_additional_conditions=False)
    side = model.config.sample_size
    words = torch.tensor([20, 300])[torch.arange(batch) % 2]
    return model, {
        "hidden_states": torch.randn(batch, 4, side, side),
        "encoder_hidden_states": torch.randn(batch, 300, model.config.caption_channels),
        "timestep": torch.full((batch,), 500),
        "encoder_attention_mask": (torch.arange(300)[None] < words[:, None]).to(torch.get_default_dtype()),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def sdxl(batch: int = 1, **smaller: Any) -> Case:
    """The U-Net of Stable Diffusion XL at 1,024 pixels."""
    config: dict[str, Any] = {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    model = diffusers_package().UNet2DConditionModel(**{**config, **smaller})
    side, c = model.config.sample_size, model.config
    pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
    pixels = float(8 * side)
    return model, {
        "sample": torch.randn(batch, 4, side, side),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, 77, c.cross_attention_dim),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(batch, pooled),
            "time_ids": torch.tensor([[pixels, pixels, 0.0, 0.0, pixels, pixels]]).repeat(batch, 1),
        },
    }


def flux(batch: int = 1, side: int = 64, **smaller: Any) -> Case:
    """FLUX.1-dev at 1,024 pixels: 19 joint and 38 single layers, 3,072 wide, 4,096 image and 512 text tokens."""
    model = diffusers_package().FluxTransformer2DModel(**{"guidance_embeds": True, **smaller})
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
    dtype = torch.get_default_dtype()
    return model, {
        "hidden_states": torch.randn(batch, side * side, model.config.in_channels),
        "encoder_hidden_states": torch.randn(batch, 512, model.config.joint_attention_dim),
        "pooled_projections": torch.randn(batch, model.config.pooled_projection_dim),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": places.to(dtype),
        "txt_ids": torch.zeros(512, 3),
        "guidance": torch.full((batch,), 3.5),
    }


SHAPES: dict[str, Callable[..., Case]] = {
    "dit-xl-2": dit_xl_2,
    "pixart-sigma-1024": pixart_sigma_1024,
    "sdxl": sdxl,
    "flux": flux,
}
SETS = {"gpu": tuple(SHAPES)}
