"""What learning takes in memory: measured beside the bound that was given, and computed for full-size models.

    python examples/studies/learning_memory.py [--write] [--fxmask FOLDER]

Measured: a model of few weights and large values (32 x 32 tokens of width 96, 6 residual blocks, batch 4), T = 10, 20 and 40
steps, with a stochastic sampler; errors of runs, a rollout whose coefficients are fitted, and a refinement by adjoints, in a
process of its own for each number of steps and bound. What counts is the peak of the resident memory above what there was
before. Computed: bytes of the values of single blocks, from shapes alone (no weights are allocated).

``--fxmask`` is the folder of another version, which is measured without a bound. ``--write`` puts the tables into
``examples/results/learning_memory.md``, and the numbers beside it as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

RESULTS = Path(__file__).resolve().parents[1] / "results"
STEPS = (10, 20, 40)
BOUNDS = (None, 512 << 20, 128 << 20, 64 << 20)
BATCH, RUNS, WIDTH, BLOCKS = 4, 2, 96, 6
MIB = 1 << 20


class Tokens(nn.Module):
    """A denoiser of pixels as tokens: an embedding, residual layers, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(1, WIDTH), nn.Linear(WIDTH, 1)
        self.time = nn.Linear(1, WIDTH)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(BLOCKS)
        )

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        time = self.time(timestep.reshape(-1, 1, 1).to(sample.dtype) / 1000)
        x = self.into(sample.flatten(1).unsqueeze(-1)) + time
        for layer in self.layers:
            x = x + layer(x)
        return self.out(x).reshape(sample.shape)


def resident(field: str) -> int:
    """Bytes, from the kernel: ``VmRSS`` now, ``VmHWM`` at most."""
    text = Path("/proc/self/status").read_text()
    return next(1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith(field))


def child(steps: int, bound: int | None) -> dict[str, Any]:
    """One measurement, in this process."""
    from diffusers import DDIMScheduler

    import fxmask
    from fxmask.learning.adjoint import refine_all
    from fxmask.learning.levels import levels_of
    from fxmask.learning.runs import measure_runs
    from fxmask.learning.schedule import Schedule
    from fxmask.learning.student import Student

    torch.manual_seed(0)
    model = Tokens().eval()
    inputs = {"sample": torch.zeros(BATCH, 1, 32, 32)}
    options = {"example_inputs": inputs, "step_kwargs": {"eta": 1.0}, "num_inference_steps": steps}
    runs = [fxmask.record(model, DDIMScheduler(clip_sample=False), seed=seed, **options) for seed in range(RUNS)]
    program = fxmask.capture(model, runs[0].calls[0][0])
    options = {}
    said: set[str] = set()
    if bound is not None:
        from fxmask.learning.forms import Forms
        from fxmask.learning.pieces import split
        from fxmask.learning.room import Room

        room, forms = Room(bound, True), Forms(program, runs)
        runs, places = split(runs, forms, room, gradients=True, adjoints=True)
        options = {"forms": forms, "room": room, "places": places}
        said = room.said
    student = Student(program, runs, **options)
    level = next(x for x in levels_of(student, 2) if x.name == "branches" and x.history == 3)
    loads = tuple(level.loads if i % 2 else frozenset() for i in range(steps))
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before, start = resident("VmRSS"), time.perf_counter()
    runs_table = measure_runs(student, level, 2)
    fitted = student.rollout(Schedule(loads, level.history, 0))
    freed = Schedule(loads, 1, 2, blend=1)
    rng = random.Random(0)
    coefficients = {}
    for i, names in enumerate(loads):
        for name in sorted(names | ({student.output} if student.blends(freed, i) else set())):
            sources = student.sources(freed, i, name)
            coefficients[i, name] = tuple((s, float(k == 0) + 0.1 * rng.random()) for k, s in enumerate(sources))
    _, score = refine_all(student, freed, coefficients)
    return {
        "steps": steps,
        "bound": bound,
        "peak": resident("VmHWM") - before,
        "seconds": time.perf_counter() - start,
        "scores": [float(runs_table[1, 0]), student.score(fitted), score],
        "chosen": sorted(said),
    }


def measured(steps: int, bound: int | None, folder: str | None = None) -> dict[str, Any]:
    """The same in a process of its own, which gives freed memory back at once."""
    given = [sys.executable, __file__, "--child", str(steps), str(bound or 0)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    if folder:
        environment["PYTHONPATH"] = folder
    done = subprocess.run(given, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def dit() -> tuple[nn.Module, dict[str, Any] | None]:
    """DiT-XL/2 on latents of 32 x 32."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28, sample_size=32
    )
    call = {"hidden_states": torch.empty(1, 4, 32, 32), "timestep": torch.empty(1, dtype=torch.int64)}
    return model, {**call, "class_labels": torch.empty(1, dtype=torch.int64)}


def sdxl() -> tuple[nn.Module, dict[str, Any] | None]:
    """The U-Net of SDXL on latents of 128 x 128."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
    call = {"sample": torch.empty(1, 4, 128, 128), "timestep": torch.empty(1, dtype=torch.int64)}
    return model, {**call, "encoder_hidden_states": torch.empty(1, 77, 2048), "added_cond_kwargs": added}


def flux() -> tuple[nn.Module, dict[str, Any] | None]:
    """FLUX.1 on latents of 128 x 128, 4096 image tokens and 512 of text."""
    from diffusers import FluxTransformer2DModel

    call = {"hidden_states": torch.empty(1, 4096, 64), "timestep": torch.empty(1), "guidance": torch.empty(1)}
    text = {"encoder_hidden_states": torch.empty(1, 512, 4096), "pooled_projections": torch.empty(1, 768)}
    return FluxTransformer2DModel(guidance_embeds=True), {
        **call,
        **text,
        "txt_ids": torch.empty(512, 3),
        "img_ids": torch.empty(4096, 3),
    }


FULL: dict[str, tuple[Callable[[], tuple[nn.Module, dict[str, Any] | None]], int]] = {
    "DiT-XL/2, 256": (dit, 50),
    "SDXL, 1024": (sdxl, 50),
    "FLUX.1, 1024": (flux, 28),
}


def computed(name: str) -> dict[str, Any]:
    """Bytes of one full-size model in float32, at batch 1."""
    import fxmask
    from fxmask.ir.graph import value_bytes
    from fxmask.learning.pieces import least_bytes
    from fxmask.learning.room import tensor_bytes

    make, steps = FULL[name]
    with torch.device("meta"):
        model, call = make()
        program = fxmask.capture(model.eval(), call)
    values = sum(value_bytes(program.node(v)) for b in program.branches for v in b.values)
    sample = tensor_bytes(program.example.sample)
    parts = {"forward": (False, False), "gradients": (True, False), "adjoints": (True, True)}
    least = {part: least_bytes(program, gradients=g, adjoints=a) for part, (g, a) in parts.items()}
    weights = sum(p.numel() for p in model.parameters()) * 4
    return {"model": name, "steps": steps, "values": values, "sample": sample, "weights": weights, "least": least}


def child_result(arguments: list[str]) -> dict[str, Any]:
    """What a child process was asked for."""
    return child(int(arguments[0]), int(arguments[1]) or None)


def tables(rows: list[dict[str, Any]], old: list[dict[str, Any]], full: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    names = {None: "none", **{b: f"{b >> 20}" for b in BOUNDS if b}}
    columns = "| bound (MiB) | " + " | ".join(f"T = {t}" for t in STEPS) + " | seconds | score of the refined plan (dB) |"
    lines = [
        "# What learning takes in memory",
        "",
        f"`studies/learning_memory.py`, torch {torch.__version__}, one CPU thread. MiB of resident memory above what was there",
        f"before learning, at most; {RUNS} recorded runs of a batch of {BATCH}, and memory that PyTorch gives back goes to the",
        "system at once. `before`: the version before this one, without a bound.",
        "",
        columns,
        "|" + "---|" * (len(STEPS) + 3),
    ]
    for label, of in [("before", old)] + [(names[b], [r for r in rows if r["bound"] == b]) for b in BOUNDS]:
        if of:
            cells = [f"{r['peak'] / MIB:.0f}" for r in of]
            seconds = ", ".join(f"{r['seconds']:.0f}" for r in of)
            scores = ", ".join(f"{r['scores'][2]:.2f}" for r in of)
            lines.append(f"| {label} | {' | '.join(cells)} | {seconds} | {scores} |")
    lines += ["", "What was chosen within each bound:", ""]
    for b in BOUNDS[1:]:
        for r in rows:
            if r["bound"] == b:
                lines.append(f"- {names[b]} MiB, T = {r['steps']}: {'; '.join(r['chosen']) or 'everything fits'}")
    lines += [
        "",
        "## Full-size models, computed from shapes",
        "",
        "GiB in float32, without weights. Values: of all branches in one call. Before: what a refinement of all branches",
        "kept, the values of all T steps, for three runs of a batch of 8. Now: the least that a call needs, forwards, with a",
        "backward pass through it, and with adjoints through the whole run, for a batch of 8 and for the smallest piece, one",
        "sample. Samples: what the recordings of 4 runs of a batch of 8 hold, which still grows with T.",
        "",
        "| model | T | weights | values, batch 1 | batch 8 | before | now, batch 8 | now, one sample | samples |",
        "|" + "---|" * 9,
    ]
    gib = 1 << 30
    for r in full:
        least = list(r["least"].values())
        whole, one = (" / ".join(f"{n * x / gib:.1f}" for x in least) for n in (8, 1))
        before, samples = 3 * 8 * r["steps"] * r["values"] / gib, 4 * 8 * r["steps"] * 2 * r["sample"] / gib
        lines.append(
            f"| {r['model']} | {r['steps']} | {r['weights'] / gib:.1f} | {r['values'] / gib:.2f} | {8 * r['values'] / gib:.1f} "
            f"| {before:.0f} | {whole} | {one} | {samples:.1f} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, compute, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the tables in the results")
    parser.add_argument("--fxmask", help="folder of another version to compare with")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child_result(options.child)))
        return
    full = [computed(name) for name in FULL]
    rows = [measured(steps, bound) for bound in BOUNDS for steps in STEPS]
    old = [measured(steps, None, options.fxmask) for steps in STEPS] if options.fxmask else []
    text = tables(rows, old, full)
    print(text)
    if options.write:
        (RESULTS / "learning_memory.md").write_text(text)
        data = {"torch": torch.__version__, "measured": rows, "before": old, "computed": full}
        (RESULTS / "learning_memory.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
