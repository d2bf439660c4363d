"""Trains the small models behind the shipped checkpoints, on the CPU, from scikit-learn's digits.

    python examples/training/train.py train --what ddpm        # also: dit, classifier, autoencoder, then ldm, pixart
    python examples/training/train.py export --what ddpm       # ships the last state of a running or finished training
    python examples/training/train.py evaluate --out build/evaluate

An interrupted training goes on from its last state in the work folder when the same command runs again.
Batches, noise and timesteps depend on the seed and the step alone, so the resumed run sees what it would have
seen. Everything is float32: bfloat16 autocast was measured 1.3 to 1.9 times slower on models as small as these.
"""

import argparse
import json
import logging
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where digits.py is

from digits import (
    CAPTION_TOKENS,
    CHECKPOINTS,
    IMAGE_SIZE,
    NULL_CLASS,
    NUM_CLASSES,
    DigitClassifier,
    caption_tokenizer,
    captions_of,
    draw_captions,
    encode_tokens,
    frechet_distance,
    load_classifier,
    load_digits,
    load_model,
    load_pipeline,
    load_scheduler,
    save_model,
    tokenize_captions,
)
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

log = logging.getLogger("train")

EMA_DECAY = 0.999
LABEL_DROPOUT = 0.1
LATENT_CHANNELS = 4
LATENT_SIZE = 8
TEXT_WIDTH = 64
KL_WEIGHT = 1e-4  # Of the mean divergence per latent value, against the mean squared error per pixel.
SAMPLED = ("ddpm", "dit", "ldm", "pixart")
SHIFTS = 9  # Each image is moved by at most one pixel along both axes.
SNR_LIMIT = 2.0
HELD_OUT = 5  # One image in five, whatever the training's seed, tests the classifier.
# The cosine schedule: at 16 x 16 a linear one spends its last third on images that are noise already.
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "epsilon",
    "clip_sample": True,
    "clip_sample_range": 1.0,
}

# Latents have no bounds to clip to. The rest is what StableDiffusionPipeline insists on.
LATENT_SCHEDULER = SCHEDULER | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}

Batch = tuple[Tensor, Tensor]
LossFunction = Callable[[nn.Module, Batch, torch.Generator], Tensor]


@dataclass(frozen=True)
class Family:
    """What sets one trained model apart from the others.

    Attributes:
        build: Builds the initialised model.
        loss: Maps (model, (images [B, 1, 16, 16], labels [B]), generator) to a scalar loss.
        steps: Default number of optimiser steps.
        batch: Images in a batch.
        rate: Peak learning rate.
        decay: AdamW's weight decay.
        finish: Called once with the shipped model when the training ends.
        hold_out: Whether a fifth of the data is kept from the training.
        latent: Whether the model sees the latents of all shifted images, [B, 9, 4, 8, 8], in place of the images.
    """

    build: Callable[[], nn.Module]
    loss: LossFunction
    steps: int
    batch: int
    rate: float
    decay: float = 0.01
    finish: Callable[[nn.Module], None] | None = None
    hold_out: bool = False
    latent: bool = False


# Models


class TextConditional(nn.Module):
    """A denoiser and the text encoder that is trained with it.

    Args:
        denoiser: Predicts the noise in latents [B, 4, 8, 8].
        encoder: Makes the denoiser's conditioning of tokens.
    """

    def __init__(self, denoiser: nn.Module, encoder: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.text_encoder = encoder

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Returns the predicted noise [B, 4, 8, 8] for tokens and their mask, [B, 8] each."""
        condition = encode_tokens(self.text_encoder, tokens, mask)
        return self.denoiser(noisy, timestep=timesteps, **condition).sample


def build_ddpm() -> nn.Module:
    """Builds the unconditional UNet: [B, 1, 16, 16], attention at 8 x 8 and 4 x 4."""
    return diffusers.UNet2DModel(
        sample_size=IMAGE_SIZE,
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=16,
    )


def build_dit() -> nn.Module:
    """Builds the class-conditional transformer: [B, 1, 16, 16] in 64 patches of 2 x 2."""
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=6,
        sample_size=IMAGE_SIZE,
        patch_size=2,
        num_embeds_ada_norm=NULL_CLASS,
    )
    used = [*range(NUM_CLASSES), NULL_CLASS]
    for block in model.transformer_blocks:
        # The modulation starts at zero, so that every block starts as the identity ("adaLN-Zero").
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
        table = block.norm1.emb.class_embedder.embedding_table.weight
        rows = torch.randn(len(used), table.shape[1]) * 0.1
        # Rows that no label selects get no gradient and so stay zero under AdamW.
        with torch.no_grad():
            table.zero_()[used] = rows
    for layer in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def build_autoencoder() -> nn.Module:
    """Builds the autoencoder: images [B, 1, 16, 16] to latents [B, 4, 8, 8]."""
    return diffusers.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def build_ldm() -> nn.Module:
    """Builds a Stable Diffusion in small: a UNet with cross attention at 8 x 8 and 4 x 4, and a CLIP text model."""
    denoiser = diffusers.UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(48, 96),
        layers_per_block=1,
        norm_num_groups=12,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # The number of heads, as in Stable Diffusion's own configuration.
    )
    tokenizer = caption_tokenizer()
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CAPTION_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return TextConditional(denoiser, transformers.CLIPTextModel(config))


def build_pixart() -> nn.Module:
    """Builds a PixArt-alpha in small: a transformer on all 64 places of the latents, and a T5 encoder."""
    denoiser = diffusers.PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=6,
        cross_attention_dim=96,
        sample_size=LATENT_SIZE,
        patch_size=1,
        caption_channels=TEXT_WIDTH,
        use_additional_conditions=False,
    )
    nn.init.zeros_(denoiser.proj_out.weight)
    nn.init.zeros_(denoiser.proj_out.bias)
    for block in denoiser.transformer_blocks:
        # As in PixArt, every block starts without the text.
        nn.init.zeros_(block.attn2.to_out[0].weight)
        nn.init.zeros_(block.attn2.to_out[0].bias)
    tokenizer = caption_tokenizer()
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=2 * TEXT_WIDTH,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return TextConditional(denoiser, transformers.T5EncoderModel(config))


# Losses


def shift_images(images: Tensor, generator: torch.Generator) -> Tensor:
    """Moves each image of [B, 1, 16, 16] by up to one pixel along both axes, filling with the background."""
    return move_images(images, torch.randint(0, 3, (2, len(images), 1), generator=generator))


def move_images(images: Tensor, offset: Tensor) -> Tensor:
    """Moves images [B, 1, 16, 16] by one pixel less than `offset` [2, B, 1], up and left."""
    size = images.shape[-1]
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    grid = torch.arange(size)
    rows, columns = (offset + grid).unbind(0)  # [B, 16] each
    batch = torch.arange(len(images))[:, None, None]
    return padded[batch, 0, rows[:, :, None], columns[:, None, :]][:, None]


@cache
def noise_schedule() -> diffusers.DDPMScheduler:
    """Returns the one noise schedule of all the diffusion models here."""
    return diffusers.DDPMScheduler(**SCHEDULER)


def add_noise(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draws timesteps and noise for images [B, 1, 16, 16].

    Returns:
        Noisy images [B, 1, 16, 16], the noise in them, and timesteps [B], one from each of B equal strata,
        which makes the loss less noisy than independent ones would.
    """
    count, total = len(images), SCHEDULER["num_train_timesteps"]
    position = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    timesteps = (position * total).long().clamp(max=total - 1)
    timesteps = timesteps[torch.randperm(count, generator=generator)]
    noise = torch.randn(images.shape, generator=generator)
    return noise_schedule().add_noise(images, noise, timesteps), noise, timesteps


def noise_loss(predicted: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Mean squared error of the noise with "Min-SNR" weights.

    A plain mean is made up mostly of the fine grain of nearly clean images, which no one sees; the weights
    leave the capacity of a small model to the noise levels that decide on the digit's shape.

    Args:
        predicted: Predicted noise [B, 1, 16, 16].
        noise: The noise that was added [B, 1, 16, 16].
        timesteps: Timesteps [B].

    Returns:
        The scalar loss.
    """
    kept = noise_schedule().alphas_cumprod[timesteps]
    ratio = kept / (1 - kept)  # Signal to noise, [B].
    errors = (predicted - noise).square().flatten(1).mean(1)
    return (errors * (SNR_LIMIT / ratio).clamp(max=1.0)).mean()


def ddpm_loss(model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
    """Error of the predicted noise, without a condition."""
    noisy, noise, timesteps = add_noise(shift_images(batch[0], generator), generator)
    return noise_loss(model(noisy, timesteps).sample, noise, timesteps)


def dit_loss(model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
    """Error of the predicted noise, given the label, which is dropped for one image in ten."""
    noisy, noise, timesteps = add_noise(shift_images(batch[0], generator), generator)
    dropped = torch.rand(len(noisy), generator=generator) < LABEL_DROPOUT
    labels = batch[1].masked_fill(dropped, NULL_CLASS)
    # Evaluation mode turns off the module's own label dropout, which every block would draw for itself.
    return noise_loss(model.eval()(noisy, timesteps, class_labels=labels).sample, noise, timesteps)


def autoencoder_loss(model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
    """Squared error of the decoded images, and a little of the latents' divergence from a normal distribution."""
    images = shift_images(batch[0], generator)
    latents = model.encode(images).latent_dist
    decoded = model.decode(latents.sample(generator)).sample
    return F.mse_loss(decoded, images) + KL_WEIGHT * latents.kl().mean() / latents.mean[0].numel()


@cache
def caption_tokens() -> tuple[Tensor, Tensor]:
    """Returns tokens and mask [11, C, 8] of every digit's C captions; the last row is the empty caption's."""
    rows = [captions_of(digit) for digit in range(NUM_CLASSES)]
    rows.append([""] * len(rows[0]))
    tokens, mask = tokenize_captions([caption for row in rows for caption in row])
    shape = (len(rows), len(rows[0]), CAPTION_TOKENS)
    return tokens.reshape(shape), mask.reshape(shape)


def text_loss(model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
    """Error of the noise predicted for a random shift and a random caption, which is dropped one time in ten."""
    latents, labels = batch
    count = len(latents)
    shift = torch.randint(0, SHIFTS, (count,), generator=generator)
    noisy, noise, timesteps = add_noise(latents[torch.arange(count), shift], generator)
    dropped = torch.rand(count, generator=generator) < LABEL_DROPOUT
    tokens, mask = caption_tokens()
    form = torch.randint(0, tokens.shape[1], (count,), generator=generator)
    row = labels.masked_fill(dropped, NUM_CLASSES)
    return noise_loss(model(noisy, timesteps, tokens[row, form], mask[row, form]), noise, timesteps)


def classifier_loss(model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
    """Cross entropy on shifted and slightly noisy digits."""
    images = shift_images(batch[0], generator)
    images = images + 0.1 * torch.randn(images.shape, generator=generator)
    return F.cross_entropy(model(images), batch[1], label_smoothing=0.05)


# Training


def split_digits(hold_out: bool) -> tuple[Batch, Batch]:
    """Returns (training part, held-out part) of the digits; without `hold_out` both are all of them."""
    images, labels = load_digits()
    if not hold_out:
        return (images, labels), (images, labels)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test = torch.zeros(len(images), dtype=torch.bool)
    test[order[: len(images) // HELD_OUT]] = True
    return (images[~test], labels[~test]), (images[test], labels[test])


@torch.no_grad()
def latent_digits(root: Path) -> Batch:
    """Returns the latents [N, 9, 4, 8, 8] of the digits under every shift, with unit variance, and their labels."""
    images, labels = load_digits()
    autoencoder = load_model("autoencoder", root)
    moved = []
    for vertical in range(3):
        for horizontal in range(3):
            offset = torch.tensor([vertical, horizontal])[:, None, None].expand(2, len(images), 1)
            moved.append(autoencoder.encode(move_images(images, offset)).latent_dist.mean)
    return torch.stack(moved, 1) * autoencoder.config.scaling_factor, labels


@torch.no_grad()
def report_reconstruction(model: nn.Module) -> None:
    """Logs how well the autoencoder reproduces the digits."""
    log.info("autoencoder: reconstructs at %.1f dB", measure_reconstruction(model))


def measure_reconstruction(model: nn.Module) -> float:
    """Returns the PSNR in dB of all digits, decoded from their mean latents."""
    images = load_digits()[0]
    decoded = model.decode(model.encode(images).latent_dist.mean).sample
    return (10 * torch.log10(4 / F.mse_loss(decoded.clamp(-1, 1), images))).item()


@torch.no_grad()
def normalise_latents(autoencoder: nn.Module) -> None:
    """Moves the latents of all digits to mean zero, and sets the scaling factor that gives them unit variance.

    The mean goes into the convolutions on both sides of the latents, because the pipelines know a scale only.
    """
    latents = autoencoder.encode(load_digits()[0]).latent_dist.mean
    mean = latents.mean((0, 2, 3))
    autoencoder.quant_conv.bias[:LATENT_CHANNELS] -= mean
    conv = autoencoder.post_quant_conv
    conv.bias += conv.weight[:, :, 0, 0] @ mean
    scale = 1 / (latents - mean[:, None, None]).square().mean().sqrt()
    autoencoder.register_to_config(scaling_factor=round(scale.item(), 6))


def report_accuracy(model: nn.Module) -> None:
    """Logs the classifier's accuracy on the held-out fifth."""
    images, labels = split_digits(hold_out=True)[1]
    accuracy = (model(images).argmax(1) == labels).float().mean().item()
    log.info("classifier: %.2f %% of %d held-out digits right", 100 * accuracy, len(labels))


# The shipped weights do not come straight from these defaults: the UNet had 4,150 steps and the transformer
# 7,500, of which the first 2,500 and 3,500 used a plain mean as the loss, and the rate was annealed by hand. The
# latent UNet had the rate of an 8,000-step training for its first 3,250 steps.
FAMILIES = {
    "ddpm": Family(build_ddpm, ddpm_loss, steps=6000, batch=32, rate=6e-4),
    "dit": Family(build_dit, dit_loss, steps=8000, batch=32, rate=1e-3),
    "classifier": Family(
        DigitClassifier,
        classifier_loss,
        steps=1500,
        batch=64,
        rate=2e-3,
        finish=report_accuracy,
        hold_out=True,
    ),
    "autoencoder": Family(
        build_autoencoder,
        autoencoder_loss,
        steps=2000,
        batch=32,
        rate=2e-3,
        decay=0.0,
        finish=report_reconstruction,
    ),
    "ldm": Family(build_ldm, text_loss, steps=5500, batch=32, rate=1e-3, latent=True),
    "pixart": Family(build_pixart, text_loss, steps=6000, batch=32, rate=1e-3, latent=True),
}


def batch_indices(step: int, batch: int, count: int, seed: int) -> Tensor:
    """Returns the rows [batch] of one step: epochs in seeded orders, the odd rest of each left out."""
    epoch, place = divmod(step, count // batch)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order[place * batch : (place + 1) * batch]


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up to `peak`, then half a cosine down to a hundredth of it."""
    progress = max(0, step - warmup) / max(1, steps - warmup)
    return peak * min((step + 1) / warmup, 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


@torch.no_grad()
def update_average(average: list[Tensor], weights: list[Tensor], step: int) -> None:
    """Moves the averaged weights to the present ones; the decay warms up so that early steps fade soon."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    torch._foreach_lerp_(average, weights, 1 - decay)


def save_state(path: Path, state: dict) -> None:
    """Writes a training state so that an interruption leaves the previous one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def export(what: str, work: Path, out: Path) -> nn.Module:
    """Ships the averaged weights of the last state, in half precision; returns the model as shipped."""
    state = torch.load(work / f"{what}.pt", weights_only=True)
    model = FAMILIES[what].build()
    model.load_state_dict(state["average"])
    if what == "autoencoder":
        normalise_latents(model)
    parts = {what: model}
    if isinstance(model, TextConditional):
        parts = {what: model.denoiser, f"{what}/text_encoder": model.text_encoder}
    for name, part in parts.items():
        folder = save_model(name, configuration(part), part.state_dict(), out)
        log.info("%s: shipped step %d to %s", name, state["step"], folder)
    save_schedulers(out)
    return load_model(what, out)


def configuration(model: nn.Module) -> dict:
    """Returns what `build_model` needs to build the model again."""
    values = model.config.to_diff_dict() if hasattr(model.config, "to_diff_dict") else model.config
    kept = {key: value for key, value in values.items() if not key.startswith("_") and key != "transformers_version"}
    return {"_class_name": type(model).__name__} | kept


def save_schedulers(out: Path) -> None:
    """Writes the noise schedule that every diffusion model here shares, for pixels and for latents."""
    diffusers.DDIMScheduler(**SCHEDULER).save_pretrained(out / "scheduler")
    diffusers.DDIMScheduler(**LATENT_SCHEDULER).save_pretrained(out / "latent_scheduler")


def train(what: str, args: argparse.Namespace) -> None:
    """Trains one family, from its last state if the work folder has one, and ships the result."""
    family = FAMILIES[what]
    steps = args.steps or family.steps
    path = args.work / f"{what}.pt"
    images, labels = latent_digits(args.out) if family.latent else split_digits(family.hold_out)[0]

    torch.manual_seed(args.seed)
    model = family.build().train()
    weights = list(model.parameters())
    average = [weight.detach().clone() for weight in weights]
    optimiser = torch.optim.AdamW(weights, lr=family.rate, weight_decay=family.decay, fused=True)
    first = 0
    if path.exists() and not args.restart:
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        average = [state["average"][name].clone() for name, _ in model.named_parameters()]
        first = state["step"]

    def snapshot(step: int) -> None:
        # A weight that two modules share (T5's embedding) has two names there.
        by_weight = dict(zip(weights, average, strict=True))
        names = model.named_parameters(remove_duplicate=False)
        averaged = model.state_dict() | {name: by_weight[weight] for name, weight in names}
        state = {"step": step, "model": model.state_dict(), "average": averaged}
        save_state(path, state | {"optimiser": optimiser.state_dict()})

    smooth = None
    progress = tqdm(range(first, steps), desc=what, initial=first, total=steps, mininterval=args.interval)
    for step in progress:
        generator = torch.Generator().manual_seed((args.seed << 32) + step)
        rows = batch_indices(step, family.batch, len(images), args.seed)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, family.rate)
        loss = family.loss(model, (images[rows], labels[rows]), generator)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        update_average(average, weights, step)
        smooth = loss.item() if smooth is None else 0.99 * smooth + 0.01 * loss.item()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == steps:
            snapshot(step + 1)

    shipped = export(what, args.work, args.out)
    if family.finish:
        family.finish(shipped)


# Evaluation


def sample_text(pipeline: diffusers.DiffusionPipeline, labels: Tensor, args: argparse.Namespace, batch: int = 250) -> Tensor:
    """Draws an image [1, 16, 16] for each label with DDIM and guidance; the captions take turns."""
    forms = [captions_of(digit) for digit in range(NUM_CLASSES)]
    captions = [forms[label][place // NUM_CLASSES % len(forms[label])] for place, label in enumerate(labels.tolist())]
    generator = torch.Generator().manual_seed(args.seed)
    done = [
        draw_captions(pipeline, captions[start : start + batch], args.sample_steps, args.guidance, generator)
        for start in range(0, len(captions), batch)
    ]
    return torch.cat(done)


@torch.no_grad()
def sample(model: nn.Module, count: int, steps: int, seed: int, labels: Tensor | None = None, batch: int = 250) -> Tensor:
    """Draws images with DDIM, without guidance.

    Args:
        model: A noise predictor.
        count: Number of images.
        steps: DDIM steps.
        seed: Seed of the start noise.
        labels: Classes [count] of a class-conditional model.
        batch: Images at once.

    Returns:
        Images [count, 1, 16, 16] in [-1, 1].
    """
    scheduler = load_scheduler()
    scheduler.set_timesteps(steps)
    noise = torch.randn(count, 1, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))
    done = []
    for start in tqdm(range(0, count, batch), desc="sampling"):
        images = noise[start : start + batch]
        condition = {} if labels is None else {"class_labels": labels[start : start + batch]}
        for timestep in scheduler.timesteps:
            predicted = model(images, timestep.expand(len(images)), **condition).sample
            images = scheduler.step(predicted, timestep, images).prev_sample
        done.append(images)
    return torch.cat(done).clamp(-1, 1)


def save_grid(images: Tensor, path: Path, columns: int = 20, zoom: int = 3) -> None:
    """Writes images [N, 1, 16, 16] as one grey PNG, `columns` to a row."""
    rows = len(images) // columns
    # The digits reach the edge of the image: a line sets each apart from the next.
    framed = F.pad(images[: rows * columns], (0, 1, 0, 1), value=-0.5)
    tiles = framed.reshape(rows, columns, IMAGE_SIZE + 1, IMAGE_SIZE + 1).permute(0, 2, 1, 3)
    sheet = tiles.reshape(rows * (IMAGE_SIZE + 1), columns * (IMAGE_SIZE + 1))
    grey = ((sheet + 1) * 127.5).round().to(torch.uint8).numpy()
    picture = Image.fromarray(grey)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(path)


@torch.no_grad()
def evaluate(args: argparse.Namespace) -> None:
    """Samples from the shipped models, writes grids and prints what the classifier makes of them."""
    classifier = load_classifier(args.checkpoints)
    report_accuracy(classifier)
    real = classifier.features(load_digits()[0])
    labels = torch.arange(args.count) % NUM_CLASSES
    results = {}
    if args.what is None and (args.checkpoints / "autoencoder").exists():
        decibels = measure_reconstruction(load_model("autoencoder", args.checkpoints))
        results["autoencoder"] = {"reconstruction_psnr": round(decibels, 2)}
    for what in SAMPLED:
        if args.what not in (None, what) or not (args.checkpoints / what).exists():
            continue
        if FAMILIES[what].latent:
            images = sample_text(load_pipeline(what, args.checkpoints), labels, args)
        else:
            condition = labels if what == "dit" else None
            images = sample(load_model(what, args.checkpoints), args.count, args.sample_steps, args.seed, condition)
        save_grid(images[:200], args.out / f"{what}.png")
        confidence, guess = classifier(images).softmax(1).max(1)
        results[what] = {
            "mean_confidence": round(confidence.mean().item(), 4),
            "confident_over_0.8": round((confidence > 0.8).float().mean().item(), 4),
            "classes": torch.bincount(guess, minlength=NUM_CLASSES).tolist(),
            "frechet_distance": round(frechet_distance(classifier.features(images), real), 4),
        }
        if what != "ddpm":
            results[what]["agreement"] = round((guess == labels).float().mean().item(), 4)
    print(json.dumps(results, indent=2))


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("train", "export"):
        command = commands.add_parser(name)
        command.add_argument("--what", choices=FAMILIES, required=True)
        command.add_argument("--work", type=Path, default=Path("build/train"), help="folder of the training states")
        command.add_argument("--out", type=Path, default=CHECKPOINTS, help="folder of the shipped checkpoints")
        if name == "train":
            command.add_argument("--steps", type=int, help="optimiser steps; the default depends on the model")
            command.add_argument("--restart", action="store_true", help="ignore an earlier state")
            command.add_argument("--save-every", type=int, default=500, help="steps between two states")
            command.add_argument("--interval", type=float, default=1.0, help="seconds between two progress updates")
    command = commands.add_parser("evaluate")
    command.add_argument("--what", choices=SAMPLED)
    command.add_argument("--checkpoints", type=Path, default=CHECKPOINTS)
    command.add_argument("--count", type=int, default=1000)
    command.add_argument("--sample-steps", type=int, default=50)
    command.add_argument("--guidance", type=float, default=2.5, help="scale for the text-conditional models; 1: none")
    command.add_argument("--out", type=Path, default=Path("build/evaluate"))
    return parser.parse_args()


def main() -> None:
    """Runs one command."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.command == "train":
        train(args.what, args)
    elif args.command == "export":
        export(args.what, args.work, args.out)
    else:
        evaluate(args)


if __name__ == "__main__":
    main()
