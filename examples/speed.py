"""How fast step graphs are beside torch.compile, and what compiling them costs; writes examples/results/speed.md.

    python examples/speed.py                     # everything; hours on two cores, an interrupted run goes on
    python examples/speed.py --parts dit         # some parts: dit unet pixart cold kernels
    fxmask bench examples/speed.py:dit_s         # any of the shapes below by hand

Weights are random: nothing here depends on them.
"""

from __future__ import annotations

from typing import Any

import torch

Case = tuple[torch.nn.Module, dict[str, Any]]


def dit_s(layers: int = 12) -> Case:
    """The DiT-S shape: 384 wide, 256 tokens, batch 2."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=layers, sample_size=32
    )
    call = {
        "hidden_states": torch.randn(2, 4, 32, 32),
        "timestep": torch.tensor([500, 500]),
        "class_labels": torch.tensor([1, 2]),
    }
    return model, call


def dit_s_24() -> Case:
    """Twice the layers."""
    return dit_s(24)


def unet() -> Case:
    """The DDPM U-Net for CIFAR-10 at full size, 35.7 M parameters, batch 2."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )
    return model, {"sample": torch.randn(2, 3, 32, 32), "timestep": torch.tensor(500)}


def pixart() -> Case:
    """A PixArt shape: 12 layers, 384 wide, 256 image tokens, 300 caption tokens, batch 2."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=64,
        in_channels=4,
        out_channels=8,
        num_layers=12,
        cross_attention_dim=384,
        sample_size=32,
        caption_channels=1024,
        use_additional_conditions=False,
    )
    call = {
        "hidden_states": torch.randn(2, 4, 32, 32),
        "encoder_hidden_states": torch.randn(2, 300, 1024),
        "timestep": torch.tensor([500, 500]),
        "encoder_attention_mask": (torch.arange(300)[None] < torch.tensor([[20], [300]])).float(),
    }
    return model, call
