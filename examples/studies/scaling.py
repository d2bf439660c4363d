"""What capture and block discovery cost, and the MACs of full-size models, on fake tensors: no weights are allocated.

    python examples/studies/scaling.py

writes ``examples/results/scaling.md`` and ``scaling.png``: MACs of one call of the models in the paper's tables (arXiv
2603.19939), peak memory and seconds of each, and seconds of each pass over DiTs of 7 to 56 layers. Every measurement runs in a
process of its own, so that peak memory is its own too.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import fxmask
from fxmask.passes.observer import observe
from fxmask.passes.specialize import specialize

RESULTS = Path(__file__).resolve().parents[1] / "results"
LAYERS = (7, 14, 28, 56)
REPEATS = 3  # after the first time; the least counts


def dit(size: int = 32, layers: int = 28) -> tuple[torch.nn.Module, dict[str, Any]]:
    """DiT-XL/2 with ``layers`` layers on latents of ``size``."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=layers, sample_size=size
    )
    call = {"hidden_states": torch.empty(1, 4, size, size), "timestep": torch.empty(1, dtype=torch.int64)}
    return model, {**call, "class_labels": torch.empty(1, dtype=torch.int64)}


def ddpm_cifar() -> tuple[torch.nn.Module, dict[str, Any]]:
    """The configuration of google/ddpm-cifar10-32."""
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )
    return model, {"sample": torch.empty(1, 3, 32, 32), "timestep": torch.empty(1, dtype=torch.int64)}


def ddpm_lsun() -> tuple[torch.nn.Module, dict[str, Any]]:
    """The configuration of google/ddpm-bedroom-256."""
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=256,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )
    return model, {"sample": torch.empty(1, 3, 256, 256), "timestep": torch.empty(1, dtype=torch.int64)}


def ldm4() -> tuple[torch.nn.Module, dict[str, Any]]:
    """The class-conditional LDM-4 of CompVis: 64 x 64 x 3 latents, one token of 512 numbers."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=64,
        in_channels=3,
        out_channels=3,
        block_out_channels=(192, 384, 576, 960),
        layers_per_block=2,
        cross_attention_dim=512,
        attention_head_dim=(6, 12, 18, 30),
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
    )
    call = {"sample": torch.empty(1, 3, 64, 64), "timestep": torch.empty(1, dtype=torch.int64)}
    return model, {**call, "encoder_hidden_states": torch.empty(1, 1, 512)}


def pixart_sigma() -> tuple[torch.nn.Module, dict[str, Any]]:
    """PixArt-Sigma XL/2 at 1024, 300 caption tokens."""
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=28,
        cross_attention_dim=1152,
        sample_size=128,
        interpolation_scale=2,
        caption_channels=4096,
        use_additional_conditions=False,
    )
    call = {"hidden_states": torch.empty(1, 4, 128, 128), "timestep": torch.empty(1, dtype=torch.int64)}
    call |= {"encoder_hidden_states": torch.empty(1, 300, 4096)}
    return model, {**call, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


# name: (how to build it, the paper's G per step, whether the paper counts attention)
FULL = {
    "DDPM CIFAR-10": (ddpm_cifar, 6.05, False),
    "DDPM LSUN 256": (ddpm_lsun, 248.0, False),
    "LDM-4 256": (ldm4, 99.8, False),
    "DiT-XL/2 256": (dit, 118.7, True),
    "DiT-XL/2 512": (lambda: dit(64), 524.6, True),
    "PixArt-Sigma 1024": (pixart_sigma, 2155.0, False),
}


def measure(name: str) -> dict[str, Any]:
    """Capture one model on the meta device, in this process."""
    started = time.perf_counter()
    with torch.device("meta"):
        model, call = dit(layers=int(name)) if name.isdigit() else FULL[name][0]()
    program, took = run_passes(model.eval(), call)
    seconds = time.perf_counter() - started
    for _ in range(REPEATS if name.isdigit() else 0):
        _, again = run_passes(model, call)
        took = {key: min(value, again[key]) for key, value in took.items()}
    return {
        "name": name,
        "macs": program.macs,
        "attention": program.attention_macs,
        "nodes": len(program.graph_module.graph.nodes),
        "blocks": len(program.blocks),
        "branches": program.coverage(("branch",)),
        "owned": program.coverage(),
        "seconds": seconds,
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "passes": took,
    }


def run_passes(model: torch.nn.Module, call: dict[str, Any]) -> tuple[fxmask.Program, dict[str, float]]:
    """Capture a model and specialise it to a mask; also the seconds of the whole capture and of each pass."""
    started = time.perf_counter()
    with observe() as passes:
        program = fxmask.capture(model, call)
        took = {"capture": time.perf_counter() - started}
        mask = fxmask.policies.interval(2)(program, [float(t) for t in range(1000, 0, -20)])
        specialize(program, fxmask.rectify(program, mask))
    for record in passes:
        took[record.name] = took.get(record.name, 0.0) + record.seconds
    return program, took


def in_own_process(name: str) -> dict[str, Any]:
    """Measure in a fresh interpreter; peak memory is that of one model."""
    command = [sys.executable, __file__, "--measure", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {found['macs'] / 1e9:.2f} G, {found['seconds']:.1f} s, {found['gib']:.2f} GiB")
    return found


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Slope of a straight line through the logarithms, by least squares."""
    x, y = [math.log(n) for n in sizes], [math.log(max(s, 1e-6)) for s in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def write(full: list[dict[str, Any]], series: list[dict[str, Any]], folder: Path) -> None:
    """The report and the plot."""
    lines = [
        "# Full-size models on fake tensors",
        "",
        f"Made by `python examples/studies/scaling.py` (torch {torch.__version__.split('+')[0]}, one thread). No weights are",
        "allocated; seconds and peak memory (of the whole process, torch included) are of building, capture and discovery.",
        "MACs are of one call at batch 1. The paper's figures are its tables' totals over the number of steps.",
        "",
        "| model | MACs | of them in attention | without attention | paper | difference | nodes | blocks | branches own "
        "| with stages | seconds | peak GiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in full:
        _, paper, counts = FULL[r["name"]]
        macs, attention = r["macs"] / 1e9, r["attention"] / 1e9
        same = macs if counts else macs - attention
        lines.append(
            f"| {r['name']} | {macs:.2f} G | {attention:.2f} G | {macs - attention:.2f} G | "
            f"{paper:g} G{'' if counts else ' without attention'} | {same / paper - 1:+.2%} | {r['nodes']} | {r['blocks']} | "
            f"{r['branches']:.1%} | {r['owned']:.1%} | {r['seconds']:.1f} | {r['gib']:.2f} |"
        )
    nodes = [r["nodes"] for r in series]
    names = list(series[0]["passes"])
    lines += ["", "# Seconds of each pass by number of layers (DiT-XL/2 widths)", ""]
    lines.append("| pass | " + " | ".join(f"{r['name']} layers" for r in series) + " | exponent in nodes |")
    lines.append("|---|" + "---|" * (len(series) + 1))
    lines.append("| nodes | " + " | ".join(map(str, nodes)) + " | |")
    for name in names:
        seconds = [r["passes"].get(name, 0.0) for r in series]
        cells = " | ".join(f"{s:.3f}" for s in seconds)
        lines.append(f"| {name} | {cells} | {exponent(nodes, seconds):.2f} |")
    lines += [
        "",
        f"`capture` is everything from the model to the program. The least of {REPEATS + 1} runs; two step graphs are made.",
        "",
        "![plot](scaling.png)",
        "",
    ]
    (folder / "scaling.md").write_text("\n".join(lines))
    plot(nodes, {name: [r["passes"].get(name, 0.0) for r in series] for name in names}, folder / "scaling.png")


def plot(nodes: list[int], seconds: dict[str, list[float]], path: Path) -> None:
    """Seconds over nodes, both logarithmic, with a line of slope 1 to compare with."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, values in seconds.items():
        axes.plot(nodes, values, marker="o", label=f"{name} ({exponent(nodes, values):.2f})")
    first = seconds["capture"][0]
    axes.plot(nodes, [first * n / nodes[0] for n in nodes], "k--", linewidth=1, label="linear")
    axes.set(
        xscale="log", yscale="log", xlabel="nodes of the graph", ylabel="seconds", title="Cost of each pass, 7 to 56 layers"
    )
    axes.set_xticks(nodes, [str(n) for n in nodes])
    axes.minorticks_off()
    axes.legend(title="pass (exponent)", fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", help="one model, or a number of layers; prints JSON")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure)))
        return
    full = [in_own_process(name) for name in FULL]
    series = [in_own_process(str(n)) for n in LAYERS]
    write(full, series, given.output)


if __name__ == "__main__":
    main()
