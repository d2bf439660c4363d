"""What the examples share: accelerate, sample with and without on fresh noise, measure, print a table, draw a picture."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch

import fxmask
from fxmask.metrics import psnr
from fxmask.pictures import draw_mask
from fxmask.timing import timed
from fxmask.tools.place import DTYPES, require_device

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BATCH = 8  # accelerate() records and compiles at this batch size


def parse_arguments(description: str, output: str) -> argparse.Namespace:
    """The options that every example takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", help="name of a pipeline on the hub, or a local folder; default: the shipped digits model")
    parser.add_argument("--device", type=device, default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="type of the model and its samples")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps")
    parser.add_argument("--speedup", type=float, default=2.0, help="asked-for ratio of MACs, or of seconds with --cost latency")
    parser.add_argument("--max-graphs", type=int, default=5, help="at most this many step graphs; 0: no limit")
    parser.add_argument("--guidance", type=float, default=0.0, help="scale of classifier-free guidance; 0: none")
    parser.add_argument("--eta", type=float, default=0.0, help="0: deterministic DDIM, 1: stochastic")
    parser.add_argument("--batches", type=int, default=4, help=f"batches of {BATCH} fresh samples to compare")
    parser.add_argument("--repeats", type=int, default=5, help="timed sampling runs of each kind")
    parser.add_argument("--backend", default="auto", choices=("auto", "inductor", "cudagraph", "eager"))
    parser.add_argument("--effort", default="quick", choices=("instant", "quick", "default"), help="how long to learn")
    parser.add_argument("--cost", default="macs", choices=("macs", "latency"), help="what the speed-up is asked for in")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(output), help="where to write the picture")
    options = parser.parse_args()
    options.dtype = DTYPES[options.dtype]
    if options.device.type == "cuda":
        torch.cuda.set_device(options.device)
    return options


def device(name: str) -> torch.device:
    """The device of that name, or an error of the command line that says what there is."""
    try:
        return require_device(name)
    except fxmask.InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def compare(
    model: torch.nn.Module,
    scheduler: Any,
    options: argparse.Namespace,
    example_inputs: Any = None,
    decode: Callable[[torch.Tensor], torch.Tensor] = lambda samples: samples,
    unconditional: Any = None,
) -> None:
    """Accelerate ``model`` and compare it with itself under torch.compile.

    Args:
        model: the denoiser, on the device and in the type of the options; noise and conditioning follow it.
        scheduler: its sampler.
        options: from ``parse_arguments``.
        example_inputs: conditioning, as for ``fxmask.accelerate``.
        decode: makes images [N, C, H, W] in [-1, 1] of samples; for latent models.
        unconditional: arguments without conditioning, for guidance; None for models that have none.
    """
    guidance = {"guidance_scale": options.guidance, "unconditional": unconditional} if options.guidance else {}
    if options.guidance and unconditional is None:
        raise SystemExit("--guidance: this model takes no conditioning")
    step_kwargs = {"eta": options.eta} if options.eta else None
    started = time.perf_counter()
    accelerated = fxmask.accelerate(
        model,
        scheduler,
        num_inference_steps=options.steps,
        speedup=options.speedup,
        example_inputs=example_inputs,
        step_kwargs=step_kwargs,
        **guidance,
        max_graphs=options.max_graphs or None,
        effort=options.effort,
        cost=options.cost,
        backend=options.backend,
        seed=options.seed,
    )
    learning = time.perf_counter() - started
    print(accelerated.report())

    def record(steps: int, seed: int) -> fxmask.Trajectory:
        return fxmask.record(
            model,
            scheduler,
            num_inference_steps=steps,
            batch_size=BATCH,
            example_inputs=example_inputs,
            step_kwargs=step_kwargs,
            **guidance,
            seed=seed,
        )

    seeds = range(options.seed + 1000, options.seed + 1000 + options.batches)  # noise that learning has not seen
    fresh = [record(options.steps, seed) for seed in seeds]
    samples = [trajectory.rollout(accelerated) for trajectory in fresh]
    quality = torch.cat([psnr(x, trajectory.final) for x, trajectory in zip(samples, fresh, strict=True)])
    fewer_steps = max(1, round(options.steps / accelerated.plan.mac_ratio))
    fewer = torch.cat(
        [psnr(record(fewer_steps, seed).final, trajectory.final) for seed, trajectory in zip(seeds, fresh, strict=True)]
    )
    baseline = torch.compile(model, fullgraph=True, dynamic=False) if options.backend != "eager" else model
    seconds = time_interleaved(
        {"model": lambda: fresh[0].rollout(baseline), "fxmask": lambda: fresh[0].rollout(accelerated)}, options.repeats
    )
    rows = {
        "device and type": f"{options.device}, {str(options.dtype).removeprefix('torch.')}",
        "steps": f"{options.steps}",
        "guidance": f"{options.guidance:g}" if options.guidance else "none",
        "MAC ratio (ideal speed-up)": f"{accelerated.plan.mac_ratio:.2f}x",
        f"measured speed-up, {options.backend}": f"{seconds['model'] / seconds['fxmask']:.2f}x",
        "PSNR against the full sampler": describe(quality),
        f"  only {fewer_steps} steps instead": describe(fewer) if not options.eta else "other noise, not comparable",
        "distinct step graphs": f"{accelerated.plan.distinct_graphs}",
        "learning and compilation": f"{learning:.0f} s",
    }
    print()
    for name, value in rows.items():
        print(f"{name:<32} {value}")
    images = [decode(torch.cat(x)).float().cpu() for x in ([trajectory.final for trajectory in fresh], samples)]
    draw(*images, accelerated, options.output)
    print(f"{'picture':<32} {options.output}")


def describe(values: torch.Tensor) -> str:
    """Mean and 10th percentile over images."""
    return f"{values.mean():.1f} dB (10th percentile {values.quantile(0.1):.1f} dB, {len(values)} images)"


def time_interleaved(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each run; the runs take turns, so that a noisy machine slows all of them alike."""
    for run in runs.values():
        run()  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(timed(run)[0])  # a GPU's work included
    return {name: statistics.median(values) for name, values in seconds.items()}


def draw(reference: torch.Tensor, samples: torch.Tensor, accelerated: fxmask.AcceleratedModel, path: Path) -> None:
    """Both sample grids side by side and the mask as a heat map, as a PNG."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 5), width_ratios=(1, 1, 1.4), layout="constrained")
    titles = ("full sampler", f"fxmask, {accelerated.plan.mac_ratio:.2f}x fewer MACs, same noise")
    for ax, images, title in zip(axes, (reference, samples), titles, strict=False):
        ax.imshow(tile(images[:32]).numpy(), cmap="gray" if images.shape[1] == 1 else None, vmin=0, vmax=1)
        ax.set_title(title)
        ax.axis("off")
    draw_mask(accelerated.mask, axes[2])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def tile(images: torch.Tensor, columns: int = 8) -> torch.Tensor:
    """Images [N, C, H, W] in [-1, 1] as one picture [rows * H, columns * W] or [..., 3] in [0, 1]."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    padded = torch.cat([images, -torch.ones(rows * columns - count, channels, height, width)])
    grid = padded.reshape(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    grid = grid.reshape(rows * height, columns * width, channels).clamp(-1, 1) / 2 + 0.5
    return grid[..., 0] if channels == 1 else grid
