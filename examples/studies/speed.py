"""How fast step graphs are beside torch.compile, and what compiling them costs; writes examples/results/speed.md.

    python examples/studies/speed.py                     # everything, about an hour on two cores; an interrupted run goes on
    python examples/studies/speed.py --parts dit pixart  # some parts
    fxmask bench examples/studies/speed.py:dit_s         # any of the shapes below by hand

Weights are random: nothing here depends on them. Masks are random too, over residual branches alone, so that nearly every
step has a graph of its own; learned masks have far fewer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fxmask.tools import bench as benchmark
from fxmask.tools.bench import PLAIN, Bench, Configuration, Measurement
from fxmask.tools.bench_cold import time_cold
from fxmask.tools.bench_report import draw, to_markdown

Case = tuple[torch.nn.Module, dict[str, Any]]


def dit_s(layers: int = 12) -> Case:
    """The DiT-S shape: 384 wide, 256 tokens, batch 2."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=layers, sample_size=32
    )
    call = {
        "hidden_states": torch.randn(2, 4, 32, 32),
        "timestep": torch.tensor([500, 500]),
        "class_labels": torch.tensor([1, 2]),
    }
    return model, call


def dit_s_24() -> Case:
    """Twice the layers."""
    return dit_s(24)


def unet() -> Case:
    """The DDPM U-Net for CIFAR-10 at full size, 35.7 M parameters, batch 2."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )
    return model, {"sample": torch.randn(2, 3, 32, 32), "timestep": torch.tensor(500)}


def pixart() -> Case:
    """A PixArt shape: 12 layers, 384 wide, 256 image tokens, 300 caption tokens, batch 2."""
    return _pixart(num_attention_heads=6, attention_head_dim=64, num_layers=12, sample_size=32, caption_channels=1024)


def _pixart(**config: Any) -> Case:
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    width, side = config["num_attention_heads"] * config["attention_head_dim"], config["sample_size"]
    model = PixArtTransformer2DModel(cross_attention_dim=width, out_channels=8, use_additional_conditions=False, **config)
    call = {
        "hidden_states": torch.randn(2, 4, side, side),
        "encoder_hidden_states": torch.randn(2, 300, config["caption_channels"]),
        "timestep": torch.tensor([500, 500]),
        "encoder_attention_mask": (torch.arange(300)[None] < torch.tensor([[20], [300]])).float(),
    }
    return model, call


def dit_xl() -> Case:
    """DiT-XL/2 at 256 pixels: 28 layers, 1,152 wide, 256 tokens, batch 8, bfloat16, on a GPU."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(num_attention_heads=16, attention_head_dim=72, out_channels=8, num_layers=28, sample_size=32)
    call = {
        "hidden_states": torch.randn(8, 4, 32, 32),
        "timestep": torch.full((8,), 500),
        "class_labels": torch.arange(8),
    }
    return on_gpu(model, call)


def pixart_sigma() -> Case:
    """PixArt-Sigma at 1,024 pixels: 28 layers, 1,152 wide, 4,096 image and 300 caption tokens, batch 2, bfloat16, on a GPU."""
    large = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "sample_size": 128}
    return on_gpu(*_pixart(caption_channels=4096, interpolation_scale=2, **large))


def unet_gpu() -> Case:
    """The full-size U-Net at batch 64 on a GPU."""
    model, call = unet()
    return on_gpu(model, {**call, "sample": torch.randn(64, 3, 32, 32)}, torch.float32)


def on_gpu(model: torch.nn.Module, call: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> Case:
    """Model and floating-point arguments on the GPU, in a type; timesteps stay whole."""
    moved = {name: x.to("cuda", dtype if x.is_floating_point() else None) for name, x in call.items()}
    return model.to("cuda", dtype), moved


FILE = Path(__file__).resolve()
EXAMPLES = FILE.parents[1]
STEPS = 16


def timed(make: Callable[[], Case], ratios: list[float], repeats: int) -> list[Measurement]:
    """Speed-ups of one shape."""
    model, call = make()
    return Bench(model.eval(), call, STEPS).measure(benchmark.configurations(ratios, ["regions", "whole"]), repeats)


def on_a_gpu(make: Callable[[], Case], repeats: int) -> list[Measurement]:
    """Speed-ups of one shape with CUDA graphs off and on; kernels of its step graphs at 2x are Triton's."""
    if not torch.cuda.is_available():
        return []
    model, call = make()
    bench = Bench(model.eval(), call, STEPS)
    chosen = benchmark.configurations([2.0, 4.0], ["regions", "whole"], ["inductor", "cudagraph"])
    rows = bench.measure(chosen, repeats)
    half = next(v for v in chosen if v.name == "fxmask whole, 2x")
    benchmark.add_kernels(bench, [half], rows)
    return rows


def cold(repeats: int) -> list[Measurement]:
    """First run of all steps, compilation included, each in a process of its own."""
    half = Configuration("fxmask regions, 2x", 2.0, "regions")
    jobs = [
        ("12 layers, torch.compile", f"{FILE}:dit_s", Configuration(PLAIN), STEPS, None),
        (f"12 layers, fxmask regions, {STEPS} steps", f"{FILE}:dit_s", half, STEPS, 0),
        (f"12 layers, fxmask regions, {2 * STEPS} steps", f"{FILE}:dit_s", half, 2 * STEPS, 0),
        (f"12 layers, fxmask whole, {STEPS} steps", f"{FILE}:dit_s", Configuration("whole", 2.0, "whole"), STEPS, 0),
        ("24 layers, torch.compile", f"{FILE}:dit_s_24", Configuration(PLAIN), STEPS, None),
        (f"24 layers, fxmask regions, {STEPS} steps", f"{FILE}:dit_s_24", half, STEPS, 4),
    ]
    rows: list[Measurement] = []
    for name, case, variant, steps, base in jobs:
        result = time_cold(case, variant, steps)
        row = Measurement(name, cold_seconds=result["seconds"], peak_bytes=result["peak_bytes"])
        row.compilations = result["compilations"] if variant.ratio else None
        row.cold_ratio = result["seconds"] / (rows[base].cold_seconds or 1) if base is not None else None
        rows.append(row)
    return rows


def kernels(repeats: int) -> list[Measurement]:
    """Kernels of every distinct step graph of the DiT."""
    model, call = dit_s()
    bench = Bench(model.eval(), call, STEPS)
    rows = []
    for ratio in (1.0, 2.0, 4.0):
        row = Measurement(f"fxmask regions, {ratio:g}x")
        row.kernels = bench.count_kernels(Configuration(row.name, ratio, "regions"))
        rows.append(row)
    return rows


PARTS: dict[str, tuple[str, Callable[[int], list[Measurement]]]] = {
    "dit": (
        "DiT-S shape (12 layers, 384 wide, 256 tokens, batch 2)",
        lambda n: timed(dit_s, [2.0, 4.0], n),
    ),
    "unet": ("DDPM CIFAR-10 U-Net, full size (35.7 M), batch 2", lambda n: timed(unet, [2.0], n)),
    "pixart": (
        "PixArt shape (12 layers, 384 wide, 256 image and 300 caption tokens, batch 2): hoisting and folding alone",
        lambda n: timed(pixart, [], n),
    ),
    "dit_xl": ("DiT-XL/2 at 256, bfloat16, batch 8 (needs an NVIDIA GPU)", lambda n: on_a_gpu(dit_xl, n)),
    "pixart_sigma": ("PixArt-Sigma at 1,024, bfloat16, batch 2 (needs an NVIDIA GPU)", lambda n: on_a_gpu(pixart_sigma, n)),
    "unet_gpu": ("DDPM CIFAR-10 U-Net, batch 64 (needs an NVIDIA GPU)", lambda n: on_a_gpu(unet_gpu, n)),
    "cold": ("Compilation: the first run of all steps on the DiT-S shape, from an empty cache", cold),
    "kernels": ("Kernels per step graph of the DiT-S shape", kernels),
}


def main() -> None:
    """Measures what is missing, then writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--again", action="store_true", help="measure the parts again")
    parser.add_argument("--folder", type=Path, default=Path("build/speed"))
    parser.add_argument("--output", type=Path, default=EXAMPLES / "results" / "speed.md")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        path = options.folder / f"{part}.json"
        if options.again or not path.exists():
            rows = PARTS[part][1](options.repeats)
            if not rows:
                continue  # needs a GPU
            partial = path.with_suffix(".tmp")
            partial.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
            os.replace(partial, path)
    write(options.folder, options.output)


def write(folder: Path, output: Path) -> None:
    """All parts that were measured, as Markdown and a plot."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU thread(s)"
    lines = ["# Speed of step graphs", ""]
    lines += [
        f"`python examples/studies/speed.py`; torch {torch.__version__.split('+')[0]}, {platform.machine()}, {device}, "
        f"{STEPS} steps.",
        "",
    ]
    lines += [INTRODUCTION]
    for part, (title, _) in PARTS.items():
        path = folder / f"{part}.json"
        if not path.exists():
            lines += [f"## {title}", "", "Not measured.", ""]
            continue
        rows = [Measurement(**row) for row in json.loads(path.read_text())]
        lines += [f"## {title}", ""]
        if part == "kernels":
            lines += ["| plan | share of MACs | kernels | extern calls |", "|---|---|---|---|"]
            for row in rows:
                for _, kept, made, called in sorted(row.kernels, key=lambda k: -k[1]):
                    lines.append(f"| {row.name} | {kept:.0%} | {made} | {called} |")
            lines += ["", "![kernels and measured speed-up](speed.png)"]
        else:
            lines.append(to_markdown(rows))
        lines.append("")
    output.write_text("\n".join(lines), encoding="utf-8")
    found = [folder / f"{part}.json" for part in ("dit", "kernels")]
    rows = [Measurement(**row) for path in found if path.exists() for row in json.loads(path.read_text())]
    if rows:
        draw(rows, f"DiT-S shape, {STEPS} steps", output.with_suffix(".png"))


INTRODUCTION = """\
Measured: median over turns of the seconds of a run under `torch.compile` over those of the same run with fxmask, both with
static shapes, in turns in one process; with a 95 % bootstrap interval of the median. *MACs*: ratio by the mask alone,
*executed*: with what is hoisted and folded. *Cold*: first run of all steps from an empty compilation cache, in a process of
its own, beside the same under `torch.compile`. *Error*: largest difference from the compiled model's output over the largest
value.
"""


if __name__ == "__main__":
    main()
