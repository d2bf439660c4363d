"""What kinds of pipeline in `pipelines.py` are made of: a registry, tiny text encoders and autoencoders with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

WORDS = "a the of on in red blue house cat dog hill sea photo painting night morning ugly blurred".split()
SPECIAL = ("<pad>", "<start>", "<end>", "<unk>")
LENGTH = 12  # tokens of a prompt
FIRST, SECOND, NEGATIVE = "a red house on the hill", "a photo of a cat in the night", "ugly blurred"


@dataclass(frozen=True)
class Kind:
    """One kind of pipeline.

    Attributes:
        build: makes it, and a call of it.
        second: what another prompt changes in that call.
        unguided: what switches guidance off; ``None`` if there is none.
        larger: what another size changes; ``None`` if there is one size.
        batch: what two samples at once change.
        steps: of the call.
        step_names: arguments that say how many steps.
        bfloat16: whether the pipeline itself runs in that type.
    """

    build: Callable[[], tuple[Any, dict[str, Any]]]
    second: Mapping[str, Any] = field(default_factory=lambda: {"prompt": SECOND})
    unguided: Mapping[str, Any] | None = field(default_factory=lambda: {"guidance_scale": 1.0})
    larger: Mapping[str, Any] | None = field(default_factory=lambda: {"height": 48})
    batch: Mapping[str, Any] = field(default_factory=lambda: {"num_images_per_prompt": 2})
    steps: int = 8
    step_names: tuple[str, ...] = ("num_inference_steps",)


KINDS: dict[str, Kind] = {}


def kind(**options: Any) -> Callable[[Callable[[], tuple[Any, dict[str, Any]]]], Callable[[], tuple[Any, dict[str, Any]]]]:
    """Registers what builds a kind, under its name."""

    def register(build: Callable[[], tuple[Any, dict[str, Any]]]) -> Callable[[], tuple[Any, dict[str, Any]]]:
        KINDS[build.__name__] = Kind(build, **options)
        return build

    return register


def seeded(seed: int = 0) -> torch.Generator:
    """A generator."""
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers, the same ones each time."""
    return torch.randn(*shape, generator=seeded(seed))


def made(model_class: Any, *, seed: int = 0, **config: Any) -> Any:
    """A model with random weights in eval mode, none of them all zero, so that every block changes something."""
    torch.manual_seed(seed)
    model = model_class(**config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1 and not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def tokenizer() -> Any:
    """One token for each of a few words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    numbers = {word: n for n, word in enumerate((*SPECIAL, *WORDS))}
    plain = Tokenizer(models.WordLevel(numbers, unk_token=SPECIAL[3]))
    plain.normalizer = normalizers.Lowercase()
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(SPECIAL[1], 1), (SPECIAL[2], 2)]
    plain.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=plain, model_max_length=LENGTH, **names)


def clip_text(width: int = 16, projected: bool = False) -> Any:
    """A CLIP text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    sizes = {"vocab_size": 40, "hidden_size": width, "intermediate_size": 2 * width, "projection_dim": 12}
    depth = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": LENGTH}
    config = CLIPTextConfig(**sizes, **depth, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(1)
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5_text(width: int = 24) -> Any:
    """A T5 text encoder."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(2)
    config = T5Config(vocab_size=40, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    return T5EncoderModel(config).eval()


def autoencoder() -> Any:
    """Halves both sides."""
    from diffusers import AutoencoderKL

    return made(
        AutoencoderKL,
        seed=3,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=32,
    )


class Pixels(torch.nn.Module):
    """Stands for an autoencoder whose latents are what is made."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        usual = {"scaling_factor": 1.0, "shift_factor": 0.0, "latent_channels": 4, "block_out_channels": (1, 1)}
        self.config = SimpleNamespace(**{**usual, "force_upcast": False, **config})
        self.scale = torch.nn.Parameter(torch.ones(1), requires_grad=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.scale.dtype

    @property
    def device(self) -> torch.device:
        return self.scale.device

    def decode(self, latents: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(sample=latents)


def unet(**changes: Any) -> Any:
    """A latent U-Net with cross-attention."""
    from diffusers import UNet2DConditionModel

    config = {
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return made(UNet2DConditionModel, **{**config, **changes})


def image(size: int = 32, channels: int = 3, seed: int = 5) -> torch.Tensor:
    """An image between 0 and 1, ``[1, C, H, W]``."""
    return noise(1, channels, size, size, seed=seed).sigmoid()


def embeddings(width: int, length: int = 7, seed: int = 0) -> torch.Tensor:
    """Stands for an encoded prompt."""
    return noise(1, length, width, seed=seed)


def ones(length: int = 7) -> torch.Tensor:
    """An attention mask without padding."""
    return torch.ones(1, length, dtype=torch.int64)


def quiet(pipe: Any) -> Any:
    """The same without progress bars."""
    pipe.set_progress_bar_config(disable=True)
    return pipe
