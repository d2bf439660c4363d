"""Shared helpers of the example scripts: the digits data and their captions, the shipped checkpoints, a small classifier."""

import importlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits as sklearn_digits
from torch import Tensor, nn

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
IMAGE_SIZE = 16
NUM_CLASSES = 10
NULL_CLASS = 1000  # The index that diffusers' DiTPipeline hard-codes for "no class".
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTION_FORMS = (
    "{}",
    "a {}",
    "the digit {}",
    "the number {}",
    "a handwritten {}",
    "a picture of a {}",
    "a drawing of the number {}",
)
SPECIAL_TOKENS = ("<pad>", "<start>", "<end>", "<unknown>")  # Their places are their token numbers.
# Attributes that say how wide a layer is, in the order of its weight's dimensions.
WIDTHS = {
    nn.Conv2d: ("out_channels", "in_channels"),
    nn.Linear: ("out_features", "in_features"),
    nn.GroupNorm: ("num_channels",),
}
CAPTION_TOKENS = 8  # Room for the longest caption between its start and its end.


class DigitClassifier(nn.Module):
    """A small convolutional classifier whose penultimate feature is short enough for Frechet distances.

    Args:
        channels: Width of each of the three convolution stages; a stage halves the resolution.
        features: Length of the penultimate feature.
    """

    def __init__(self, channels: tuple[int, ...] = (32, 64, 64), features: int = 48) -> None:
        super().__init__()
        self.config = {"channels": list(channels), "features": features}
        stages: list[nn.Module] = []
        for wide_in, wide_out in zip((1, *channels[:-1]), channels, strict=True):
            # Group norm rather than batch norm: no running statistics to average or to ship.
            stages += [nn.Conv2d(wide_in, wide_out, 3, padding=1), nn.GroupNorm(8, wide_out), nn.SiLU()]
            stages += [nn.Conv2d(wide_out, wide_out, 3, padding=1), nn.GroupNorm(8, wide_out), nn.SiLU()]
            stages.append(nn.AvgPool2d(2))
        self.stages = nn.Sequential(*stages)
        self.embed = nn.Linear(channels[-1] * (IMAGE_SIZE >> len(channels)) ** 2, features)
        self.head = nn.Linear(features, NUM_CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """Returns the penultimate features [N, F] of images [N, 1, 16, 16] in [-1, 1]."""
        return F.silu(self.embed(self.stages(images).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Returns the class logits [N, 10] of images [N, 1, 16, 16] in [-1, 1]."""
        return self.head(self.features(images))


def load_digits() -> tuple[Tensor, Tensor]:
    """Returns scikit-learn's 1,797 digits: images float32 [N, 1, 16, 16] in [-1, 1] and labels int64 [N]."""
    data = sklearn_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16.0  # Grey values run from 0 to 16.
    images = F.interpolate(images, size=IMAGE_SIZE, mode="bicubic", align_corners=False)
    return images.clamp(0, 1) * 2 - 1, torch.from_numpy(data.target).long()


def captions_of(digit: int) -> list[str]:
    """Returns every caption that the text-conditional models were trained on for one digit, with words before figures."""
    return [form.format(name) for name in (DIGIT_WORDS[digit], str(digit)) for form in CAPTION_FORMS]


@cache
def caption_tokenizer() -> Any:
    """Builds the tokenizer of the captions: one token per word, no file and no hub.

    Returns:
        A `transformers.PreTrainedTokenizerFast`, which the diffusers pipelines take in place of CLIP's or T5's.
    """
    # Imported here because only the text-conditional models need them.
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for digit in range(NUM_CLASSES) for caption in captions_of(digit) for word in caption.split()})
    pad, start, end, unknown = SPECIAL_TOKENS
    numbers = {word: number for number, word in enumerate((*SPECIAL_TOKENS, *words))}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=unknown))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(token, numbers[token]) for token in (start, end)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=start,
        eos_token=end,
        unk_token=unknown,
        model_max_length=CAPTION_TOKENS,
    )


def tokenize_captions(captions: list[str]) -> tuple[Tensor, Tensor]:
    """Returns the token numbers and the mask of captions, int64 [N, 8] each; the mask is 0 on padding."""
    batch = caption_tokenizer()(captions, padding="max_length", max_length=CAPTION_TOKENS, truncation=True, return_tensors="pt")
    return batch.input_ids, batch.attention_mask


def encode_tokens(encoder: nn.Module, tokens: Tensor, mask: Tensor) -> dict[str, Any]:
    """Makes a denoiser's conditioning of tokens, in the form in which the encoder's pipeline passes it.

    Args:
        encoder: A `CLIPTextModel` or a `T5EncoderModel`.
        tokens: Token numbers [B, 8].
        mask: 1 on words, 0 on padding, [B, 8].

    Returns:
        Arguments of the denoiser: `encoder_hidden_states` [B, 8, 64]; after a T5 also `encoder_attention_mask` [B, 8]
        and the empty `added_cond_kwargs`.
    """
    if type(encoder).__name__ == "CLIPTextModel":
        return {"encoder_hidden_states": encoder(tokens)[0]}  # Like Stable Diffusion, without a mask.
    return {
        "encoder_hidden_states": encoder(tokens, attention_mask=mask)[0],
        "encoder_attention_mask": mask,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def encode_captions(encoder: nn.Module, captions: list[str]) -> dict[str, Any]:
    """Makes a denoiser's conditioning of captions; see `encode_tokens`."""
    return encode_tokens(encoder, *tokenize_captions(captions))


def build_model(config: dict) -> nn.Module:
    """Builds the (randomly initialised) model that a shipped `config.json` describes."""
    arguments = {key: value for key, value in config.items() if not key.startswith("_")}
    name = config["_class_name"]
    if name == DigitClassifier.__name__:
        return DigitClassifier(**arguments)
    if hasattr(diffusers, name):
        return getattr(diffusers, name)(**arguments)
    kind = getattr(importlib.import_module("transformers"), name)
    return kind(kind.config_class(**arguments))


def fit_widths(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Gives a model's layers the widths that weights have, as after structural pruning; their values become undefined.

    Convolutions, linear layers and group norms are resized. Norms keep their number of groups, attention its number of heads.

    Args:
        model: Built from its configuration; what fits already stays as it is.
        weights: A state dictionary of the same names.
    """
    for name, module in model.named_modules():
        sizes = next((sizes for kind, sizes in WIDTHS.items() if isinstance(module, kind)), ())
        for size, width in zip(sizes, weights[f"{name}.weight"].shape if sizes else (), strict=False):
            setattr(module, size, width)
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.shape != (shape := weights[f"{name}.{key}" if name else key].shape):
                setattr(module, key, nn.Parameter(parameter.new_empty(shape)))
    for module in model.modules():
        if isinstance(module, (Downsample2D, Upsample2D)) and module.use_conv:  # They check their input.
            module.channels, module.out_channels = module.conv.in_channels, module.conv.out_channels


def load_model(name: str, root: Path = CHECKPOINTS) -> nn.Module:
    """Loads a shipped model, cast from half precision to float32, in evaluation mode.

    Args:
        name: Folder of the checkpoint: `ddpm`, `dit`, `ldm`, `pixart` (the denoisers), `pruned` and `consistency` (made of
            `ddpm`), `ldm/text_encoder`, `pixart/text_encoder`, `autoencoder` or `classifier`.
        root: Folder that holds the checkpoints.

    Returns:
        The model, on the CPU.
    """
    config = json.loads((root / name / "config.json").read_text(encoding="utf-8"))
    model = build_model(config)
    weights = {key: value.float() for key, value in load_file(root / name / "model.safetensors").items()}
    fit_widths(model, weights)
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def save_model(name: str, config: dict, weights: dict[str, Tensor], root: Path = CHECKPOINTS) -> Path:
    """Writes `config.json` and half-precision `model.safetensors`; `load_model` reads them back.

    Args:
        name: Folder of the checkpoint.
        config: Constructor arguments plus `_class_name`.
        weights: The float32 state dictionary.
        root: Folder that holds the checkpoints.

    Returns:
        The folder written.
    """
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    halves = {key: value.half().contiguous() for key, value in weights.items()}
    save_file(halves, folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it private to its owner.
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def load_scheduler(
    kind: str = "DDIMScheduler", root: Path = CHECKPOINTS, folder: str = "scheduler"
) -> diffusers.SchedulerMixin:
    """Loads the shipped noise schedule into the diffusers scheduler class called `kind`.

    Args:
        kind: Name of the class.
        root: Folder that holds the checkpoints.
        folder: `scheduler` for models of pixels; `latent_scheduler`, which clips nothing, for models of latents.

    Returns:
        The scheduler.
    """
    return getattr(diffusers, kind).from_pretrained(root / folder)


def load_pipeline(name: str, root: Path = CHECKPOINTS) -> diffusers.DiffusionPipeline:
    """Builds the diffusers pipeline of a shipped text-conditional model, without a hub.

    Args:
        name: `ldm` for a `StableDiffusionPipeline`, `pixart` for a `PixArtAlphaPipeline`.
        root: Folder that holds the checkpoints.

    Returns:
        The pipeline, on the CPU.
    """
    parts = {
        "vae": load_model("autoencoder", root),
        "text_encoder": load_model(f"{name}/text_encoder", root),
        "tokenizer": caption_tokenizer(),
        "scheduler": load_scheduler(root=root, folder="latent_scheduler"),
    }
    denoiser = load_model(name, root)
    if name == "pixart":
        return diffusers.PixArtAlphaPipeline(transformer=denoiser, **parts)
    return diffusers.StableDiffusionPipeline(
        unet=denoiser, safety_checker=None, feature_extractor=None, requires_safety_checker=False, **parts
    )


def draw_captions(
    pipeline: diffusers.DiffusionPipeline,
    captions: list[str],
    steps: int = 50,
    guidance: float = 2.5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws one image for each caption with classifier-free guidance.

    Args:
        pipeline: From `load_pipeline`.
        captions: N captions.
        steps: Sampling steps.
        guidance: Scale of the guidance; 1 is none.
        generator: Draws the start noise.

    Returns:
        Images [N, 1, 16, 16] in [-1, 1].
    """
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generator, "output_type": "pt"}
    if isinstance(pipeline, diffusers.PixArtAlphaPipeline):
        # Its bins are of sizes from 256 pixels up, and its captions up to 120 tokens long.
        options |= {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": CAPTION_TOKENS}
    return pipeline(captions, **options).images * 2 - 1


def load_classifier(root: Path = CHECKPOINTS) -> DigitClassifier:
    """Loads the shipped digit classifier."""
    model = load_model("classifier", root)
    assert isinstance(model, DigitClassifier)
    return model


def frechet_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Squared Frechet distance of Gaussians fitted to features ``[N, F]`` and ``[M, F]``, in double precision.

    Dowson and Landau, "The Frechet distance between multivariate normal distributions", 1982, Eq. 4.
    """
    first, second = first.double(), second.double()
    a, b = torch.cov(first.T), torch.cov(second.T)
    half = _square_root(b)
    means = (first.mean(0) - second.mean(0)).square().sum()
    return float(means + a.trace() + b.trace() - 2 * _square_root(half @ a @ half).trace())


def _square_root(matrix: torch.Tensor) -> torch.Tensor:
    """Of a symmetric matrix without negative eigenvalues, up to rounding."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
