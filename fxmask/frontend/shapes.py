"""Shapes that a denoiser's config suggests. The only place that reads a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

# The only `config` keys that are ever read, and what for.
CONFIG: dict[str, tuple[str, ...]] = {
    "channels": ("in_channels", "num_channels", "channels"),
    "size": ("sample_size", "image_size", "img_size"),
    "height": ("sample_height",),
    "width": ("sample_width",),
    "frames": ("sample_frames", "num_frames", "video_length"),
    "patch": ("patch_size",),
    "text": (
        "joint_attention_dim",
        "caption_channels",
        "text_embed_dim",
        "text_dim",
        "cap_feat_dim",
        "encoder_hid_dim",
        "encoder_hidden_size",
        "cross_attention_input_dim",
        "cross_attention_dim",
        "cross_attention_dim_t5",
        "embedding_dim",
    ),
    "pooled": (
        "pooled_projection_dim",
        "cond_embed_dim",
        "global_states_input_dim",
        "embedding_dim",
        "projection_class_embeddings_input_dim",
    ),
    "length": ("text_len", "text_len_t5", "max_text_seq_length", "max_sequence_length", "num_embeddings"),
    "micro": ("addition_time_embed_dim",),
    "codes": ("codebook_size",),
}


DEFAULT_SIZE = 32  # height and width where the config has none
TOKENS = 16  # length of a text where the config has none


def first_config(model: torch.nn.Module, meaning: str) -> Any:
    """The first value of the config keys for a meaning; ``None`` if there is none."""
    return next(iter(config_values(model, meaning)), None)


def config_values(model: torch.nn.Module, meaning: str) -> list[Any]:
    """Every value of the config keys for a meaning, each once."""
    config = getattr(model, "config", None)
    if isinstance(config, Mapping):
        values = [config.get(key) for key in CONFIG[meaning]]
    else:
        values = [getattr(config, key, None) for key in CONFIG[meaning]]
    return list(dict.fromkeys(tuple(v) if isinstance(v, list) else v for v in values if isinstance(v, (int, tuple, list))))


def sample_shapes(model: torch.nn.Module, batch: int) -> list[tuple[int, ...]]:
    """Shapes that the sample may have, the likeliest first."""
    channels = first_config(model, "channels")
    size = first_config(model, "size")
    patch = first_config(model, "patch")
    if isinstance(size, tuple):
        return [(batch, channels, *size)]
    side = size if isinstance(size, int) else DEFAULT_SIZE
    height, width = (first_config(model, name) or side for name in ("height", "width"))
    frames = first_config(model, "frames") or 4
    times = [frames, *({1 + (frames - 1) // 4, 4, 2} - {frames})]
    cut = max([p for p in (patch if isinstance(patch, tuple) else (patch,)) if isinstance(p, int)] or [1])
    shapes: list[tuple[int, ...]] = []
    for c in dict.fromkeys([c for c in (channels,) if isinstance(c, int)] or [4, 3, 1, 16]):
        shapes.append((batch, c, height, width))
        for t in times:
            shapes += [(batch, c, t, height, width), (batch, t, c, height, width)]
        shapes += [(batch, c, side), (batch, (side // cut) ** 2 if side // cut <= 64 else 64, c)]
    shapes += [(batch, d) for d in config_values(model, "text") if isinstance(d, int)]
    return shapes


def timestep_candidates(batch: int) -> list[torch.Tensor]:
    """Forms that a timestep may have."""
    return [torch.full((batch,), 500), torch.tensor(500), torch.full((batch,), 0.5), torch.tensor(0.5)]
