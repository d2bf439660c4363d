"""A short training that starts from a shipped model, shared by `prune.py` and `consistency.py`."""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from train import batch_indices, learning_rate, load_digits, save_state

SAVE_EVERY = 100  # Steps.
WARM_UP = 50  # Steps.

# Maps (model, averaged model, images [B, 1, 16, 16], done part of the training in [0, 1), generator) to a scalar.
LossFunction = Callable[[nn.Module, nn.Module, Tensor, float, torch.Generator], Tensor]


def parser_of(description: str, steps: int, sample_steps: int) -> argparse.ArgumentParser:
    """Options of such a training, and of what is drawn after it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--steps", type=int, default=steps, help="optimiser steps")
    parser.add_argument("--rate", type=float, default=4e-4, help="peak learning rate")
    parser.add_argument("--work", type=Path, default=Path("build/train"), help="folder of the training state")
    parser.add_argument("--draw", type=Path, help="only draw samples of the shipped model to this file")
    parser.add_argument("--sample-steps", type=int, default=sample_steps)
    parser.add_argument("--count", type=int, default=500, help="images sampled")
    return parser


def fine_tune(
    model: nn.Module, loss: LossFunction, steps: int, rate: float, decay: float, path: Path, batch: int = 32, seed: int = 0
) -> nn.Module:
    """Trains a model on the digits; an interrupted training goes on from its last state.

    Args:
        model: Trained in place.
        loss: Of one batch.
        steps: Optimiser steps.
        rate: Peak learning rate of AdamW.
        decay: Of the moving average of the weights.
        path: File of the state.
        batch: Images in a batch.
        seed: Of batches, noise and timesteps, which depend on it and the step alone.

    Returns:
        The model of averaged weights, in evaluation mode.
    """
    images = load_digits()[0]
    model.train().requires_grad_(True)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
    parts = {"model": model, "average": average, "optimiser": optimiser}
    first = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        first = state["step"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    for step in tqdm(range(first, steps), desc=path.stem, initial=first, total=steps):
        generator = torch.Generator().manual_seed((seed << 32) + step)
        rows = batch_indices(step, batch, len(images), seed)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, rate, WARM_UP)
        optimiser.zero_grad()
        loss(model, average, images[rows], step / steps, generator).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        lag = 1 - min(decay, (1 + step) / (10 + step))  # Early weights fade soon.
        torch._foreach_lerp_(list(average.parameters()), [weight.detach() for weight in model.parameters()], lag)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save_state(path, {name: part.state_dict() for name, part in parts.items()} | {"step": step + 1})
    return average
