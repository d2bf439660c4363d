"""Prunes the shipped pixel U-Net to uneven widths, then fine-tunes it (Diff-Pruning: Fang et al., arXiv 2305.10924, Alg. 1).

    pip install 'fxmask[training]'
    python examples/training/prune.py --threads 2
    python examples/training/prune.py --draw build/pruned.png      # only draws samples of the shipped one

A channel's importance is the Taylor term |sum of weight * gradient| of the loss, with gradients added over those timesteps
whose loss is not small beside the largest: the noisiest ones say little of what an image needs. The least important channels
of all layers go, those of the time embedding and of attention's heads excepted, so that layers become unevenly narrow.
"""

import logging
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from fine_tuning import fine_tune, parser_of
from torch import Tensor, nn
from train import configuration, ddpm_loss, noise_schedule, sample, save_grid

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where digits.py is

from digits import fit_widths, frechet_distance, load_classifier, load_digits, load_model, save_model

log = logging.getLogger("prune")

NAME = "pruned"
IMAGES = 64  # That importance is measured on.
STRIDE = 50  # Between timesteps that importance is measured at.
LEAST_LOSS = 0.05  # Beside the largest; the paper's threshold.
MOST_PRUNED = 0.6  # Of the channels of one layer.


def accumulate_gradients(model: nn.Module, images: Tensor, seed: int = 0) -> list[int]:
    """Adds up the loss's gradients over timesteps, from the cleanest on until the loss is small beside the largest.

    Args:
        model: Predicts noise; its gradients are written.
        images: Images [B, 1, 16, 16].
        seed: Of the noise.

    Returns:
        The timesteps that count.
    """
    generator = torch.Generator().manual_seed(seed)
    largest, used = 0.0, []
    for t in range(0, 1000, STRIDE):
        noise = torch.randn(images.shape, generator=generator)
        timesteps = torch.full((len(images),), t)
        loss = F.mse_loss(model(noise_schedule().add_noise(images, noise, timesteps), timesteps).sample, noise)
        largest = max(largest, loss.item())
        if loss.item() < LEAST_LOSS * largest:
            break
        loss.backward()
        used.append(t)
    return used


def prune(model: nn.Module, ratio: float, example: dict[str, Tensor]) -> None:
    """Removes the least important channels, in place.

    Args:
        model: A `UNet2DModel` with gradients.
        ratio: Of the channels of all layers that may be pruned.
        example: Arguments of a call.
    """
    import torch_pruning as pruning  # Needed here only.

    embedding, heads = model.time_embedding, [m for m in model.modules() if isinstance(m, Attention)]
    kept = [model.conv_out, embedding.linear_1, embedding.linear_2]
    kept += [layer for m in heads for layer in (m.to_q, m.to_k, m.to_v)]
    pruner = pruning.BasePruner(
        model,
        example,
        importance=pruning.importance.GroupTaylorImportance(),
        global_pruning=True,
        pruning_ratio=ratio,
        max_pruning_ratio=MOST_PRUNED,
        ignored_layers=kept,
    )
    pruner.step()
    fit_widths(model, model.state_dict())  # Pruning does not tell diffusers' resamplers how wide they are.


def pruned_model(ratio: float) -> nn.Module:
    """Returns the shipped U-Net, pruned and not yet fine-tuned."""
    model = load_model("ddpm").requires_grad_(True)
    used = accumulate_gradients(model, load_digits()[0][:IMAGES])
    log.info("importance of timesteps 0 to %d", used[-1])
    prune(model, ratio, {"sample": torch.zeros(1, 1, 16, 16), "timestep": torch.tensor([0])})
    model.zero_grad()
    return model


def noise_error(model: nn.Module, _: nn.Module, images: Tensor, __: float, generator: torch.Generator) -> Tensor:
    """The loss that the model was trained with."""
    return ddpm_loss(model, (images, images), generator)


def report(steps: int, count: int, path: Path) -> None:
    """Logs what the classifier makes of samples of the full and the pruned model, and draws the first 200 of the latter."""
    classifier = load_classifier()
    real = classifier.features(load_digits()[0])
    for name in ("ddpm", NAME):
        with torch.no_grad():
            images = sample(load_model(name), count, steps, seed=0)
            distance = frechet_distance(classifier.features(images), real)
        log.info("%s, %d steps: Frechet distance %.2f", name, steps, distance)
    save_grid(images[:200], path)


def main() -> None:
    """Prunes, fine-tunes, ships and draws."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = parser_of(__doc__, steps=700, sample_steps=20)
    parser.add_argument("--ratio", type=float, default=0.15, help="channels pruned")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.draw:
        model = fine_tune(pruned_model(args.ratio), noise_error, args.steps, args.rate, 0.995, args.work / f"{NAME}.pt")
        save_model(NAME, configuration(model), model.state_dict())
    report(args.sample_steps, args.count, args.draw or args.work / f"{NAME}.png")


if __name__ == "__main__":
    main()
