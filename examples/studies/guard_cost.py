"""What it costs to look whether a model is still what was captured: per run and per step, beside the model's size.

    python examples/studies/guard_cost.py [--write]

For a transformer and a U-Net of diffusers with about 100 and 1,000 modules, tiny in width, because the guards cost what
modules cost and not what weights cost. ``run``: all that was noted down, when a run starts. ``step``: what is looked at in
each of its steps, with the modes around the call. Medians of interleaved repeats, in seconds of this thread's own time.
``--write`` puts the table into ``examples/results/guard_cost.md``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel

from fxmask.guards.ambient import Ambient
from fxmask.guards.state import Snapshot

RESULTS = Path(__file__).resolve().parent.parent / "results" / "guard_cost.md"
REPEATS = 200


def transformer(layers: int) -> torch.nn.Module:
    """A DiT, 13 modules per layer or so."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 1, "out_channels": 1, "num_layers": layers}
    return DiTTransformer2DModel(**sizes, sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_type="ada_norm_zero").eval()


def unet(depth: int, levels: int) -> torch.nn.Module:
    """A U-Net with cross-attention."""
    down = ("DownBlock2D", *("CrossAttnDownBlock2D",) * (levels - 1))
    up = (*("CrossAttnUpBlock2D",) * (levels - 1), "UpBlock2D")
    widths = {"block_out_channels": (8,) * levels, "norm_num_groups": 2, "cross_attention_dim": 8, "attention_head_dim": 2}
    return UNet2DConditionModel(
        down_block_types=down, up_block_types=up, layers_per_block=depth, sample_size=8, **widths
    ).eval()


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "DiT, 100 modules": lambda: transformer(4),
    "DiT, 1,000 modules": lambda: transformer(52),
    "U-Net, 100 modules": lambda: unet(1, 1),
    "U-Net, 1,000 modules": lambda: unet(3, 4),
}


def median_microseconds(work: Callable[[], object]) -> float:
    """Median time of one call."""
    times = []
    for _ in range(REPEATS):
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return statistics.median(times) * 1e6


def measure(name: str) -> str:
    """A row of the table."""
    model = MODELS[name]()
    snapshot = Snapshot.of(model)
    held = snapshot.held
    assert held.same()
    assert held.same_in_step()
    run = median_microseconds(held.same)
    step = median_microseconds(lambda: (held.same_in_step(), Ambient.now("cpu")))
    walk = median_microseconds(lambda: Snapshot.of(model)) / 1000 if len(snapshot.tokens) < 3000 else _once(model)
    modules = sum(1 for _ in model.modules())
    return f"| {name} | {modules} | {len(snapshot.tokens):,} | {run:.0f} | {step:.0f} | {walk:.0f} |"


def _once(model: torch.nn.Module) -> float:
    start = time.thread_time()
    Snapshot.of(model)
    return (time.thread_time() - start) * 1000


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the table in the results")
    options = parser.parse_args()
    rows = ["| model | modules | noted down | run (us) | step (us) | new snapshot (ms) |", "|---|---|---|---|---|---|"]
    rows += [measure(name) for name in MODELS]
    print("\n".join(rows))
    if options.write:
        head = f"# What the guards cost\n\n`studies/guard_cost.py`, torch {torch.__version__}, one CPU thread.\n"
        RESULTS.write_text("\n".join([head, *rows, ""]))


if __name__ == "__main__":
    main()
