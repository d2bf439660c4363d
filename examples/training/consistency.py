"""Distils the shipped pixel U-Net into a consistency model of few steps (Song et al., arXiv 2303.01469, Alg. 2).

    python examples/training/consistency.py --threads 2
    python examples/training/consistency.py --draw build/consistency.png      # only draws samples of the shipped one

    x_s  = DDIM(teacher, x_t, t -> s),  s = t - T/N
    loss = d(f(x_t, t), f_average(x_s, s)),  f(x, 0) = x

The student starts from the teacher's weights and predicts v = alpha noise - sigma x0, because at the noisiest timesteps
noise says nothing of x0. N doubles from 1, where the target is the teacher's own x0, to 32. Timesteps are any, so that
diffusers' `LCMScheduler` samples it with any number of steps.
"""

import functools
import logging
import sys
from pathlib import Path

import diffusers
import torch
from fine_tuning import fine_tune, parser_of
from torch import Tensor, nn
from tqdm import tqdm
from train import SCHEDULER, configuration, noise_schedule, save_grid, shift_images

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where digits.py is

from digits import (
    CHECKPOINTS,
    IMAGE_SIZE,
    frechet_distance,
    load_classifier,
    load_digits,
    load_model,
    load_scheduler,
    save_model,
)

log = logging.getLogger("consistency")

NAME = "consistency"
TOTAL = SCHEDULER["num_train_timesteps"]
DOUBLINGS = 5  # Of the intervals, from 1 to 32, at equal parts of the training.
HUBER = 0.03 * IMAGE_SIZE  # Of an image's error; wider than Song and Dhariwal's (arXiv 2310.14189), for small batches.


def coefficients(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Returns alpha and sigma [B, 1, 1, 1]; timestep -1 is the clean image."""
    kept = torch.cat([torch.ones(1), noise_schedule().alphas_cumprod])[timesteps + 1][:, None, None, None]
    return kept.sqrt(), (1 - kept).sqrt()


def clean_image(model: nn.Module, noisy: Tensor, timesteps: Tensor) -> Tensor:
    """Returns f(x, t): x0 [B, 1, 16, 16] of a student's v at timesteps [B], and the image itself at -1."""
    alpha, sigma = coefficients(timesteps)
    found = alpha * noisy - sigma * model(noisy, timesteps.clamp(min=0)).sample
    return torch.where(timesteps[:, None, None, None] < 0, noisy, found)


@torch.no_grad()
def ddim_step(teacher: nn.Module, noisy: Tensor, timesteps: Tensor, targets: Tensor) -> Tensor:
    """One DDIM step from timesteps [B] to earlier ones, x0 clipped to what images can be, and the noise with it."""
    (alpha, sigma), (alpha_after, sigma_after) = coefficients(timesteps), coefficients(targets)
    clean = ((noisy - sigma * teacher(noisy, timesteps).sample) / alpha).clamp(-1, 1)
    return alpha_after * clean + sigma_after * (noisy - alpha * clean) / sigma


def consistency_loss(
    teacher: nn.Module, model: nn.Module, average: nn.Module, images: Tensor, done: float, generator: torch.Generator
) -> Tensor:
    """Pseudo-Huber distance of the student's x0 at neighbouring points of the teacher's trajectories."""
    clean = shift_images(images, generator)
    intervals = 2 ** int(done * (DOUBLINGS + 1))
    timesteps = torch.randint(0, TOTAL, (len(clean),), generator=generator)
    targets = (timesteps - TOTAL // intervals).clamp(min=-1)
    alpha, sigma = coefficients(timesteps)
    noisy = alpha * clean + sigma * torch.randn(clean.shape, generator=generator)
    with torch.no_grad():
        target = clean_image(average, ddim_step(teacher, noisy, timesteps, targets), targets).clamp(-1, 1)
    squares = (clean_image(model, noisy, timesteps) - target).square().flatten(1).sum(1)
    return ((squares + HUBER**2).sqrt() - HUBER).mean()


@torch.no_grad()
def sample(model: nn.Module, count: int, steps: int, seed: int = 0, batch: int = 100) -> Tensor:
    """Draws images [count, 1, 16, 16] in [-1, 1], with fresh noise between steps."""
    scheduler = load_scheduler("LCMScheduler", folder=f"{NAME}_scheduler")
    generator = torch.Generator().manual_seed(seed)
    done = []
    for start in tqdm(range(0, count, batch), desc="sampling"):
        scheduler.set_timesteps(steps)
        images = torch.randn(min(batch, count - start), 1, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        for timestep in scheduler.timesteps:
            images = scheduler.step(model(images, timestep).sample, timestep, images, generator=generator).prev_sample
        done.append(images)
    return torch.cat(done).clamp(-1, 1)


def report(steps: int, count: int, path: Path) -> None:
    """Logs what the classifier makes of the shipped model's samples, and draws the first 200."""
    images, classifier = sample(load_model(NAME), count, steps), load_classifier()
    save_grid(images[:200], path)
    with torch.no_grad():
        distance = frechet_distance(classifier.features(images), classifier.features(load_digits()[0]))
        sure = (classifier(images).softmax(1).amax(1) > 0.8).float().mean()
    log.info("%d steps: Frechet distance %.2f, %.1f %% classified with confidence above 0.8", steps, distance, 100 * sure)


def main() -> None:
    """Distils, ships and draws."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = parser_of(__doc__, steps=900, sample_steps=5)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.draw:
        loss = functools.partial(consistency_loss, load_model("ddpm"))
        model = fine_tune(load_model("ddpm"), loss, args.steps, args.rate, 0.99, args.work / f"{NAME}.pt")
        save_model(NAME, configuration(model), model.state_dict())
        scheduler = diffusers.LCMScheduler(**SCHEDULER | {"prediction_type": "v_prediction"})
        scheduler.save_pretrained(CHECKPOINTS / f"{NAME}_scheduler")
    report(args.sample_steps, args.count, args.draw or args.work / f"{NAME}.png")


if __name__ == "__main__":
    main()
