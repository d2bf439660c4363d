"""What a plan costs until the second image is there, and after how many images it is paid back.

    python examples/studies/instant_cost.py [--backend eager] [--backend inductor] [--write]

The shipped latent U-Net as a user calls it: guidance 4, 20 DDIM steps, one image at a time, 2x. Seconds and calls of the
denoiser from ``accelerate`` to the end of the second image, beside two plain images; then images until what was spent is
saved. For more effort: the same, with ``improve(effort=...)`` after the first image. The plain pipeline runs in eager mode,
as diffusers' do; with Inductor part of what is saved is compilation's. ``--write`` puts the table into
``examples/results/instant_cost.md``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from digits import load_pipeline

import fxmask
from fxmask.sampling.pipeline_trajectory import call_and_record

RESULTS = Path(__file__).resolve().parent.parent / "results"
STEPS = 20
TIMED = 5


def pipeline() -> Any:
    """The shipped latent U-Net."""
    pipe = load_pipeline("ldm")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe: Any, seed: int) -> float:
    """Seconds of one image."""
    began = time.perf_counter()
    pipe(prompt="a three", num_inference_steps=STEPS, guidance_scale=4.0, generator=torch.Generator().manual_seed(seed))
    return time.perf_counter() - began


def measure(effort: str, backend: str) -> dict[str, Any]:
    """One effort with one backend."""
    plain = pipeline()
    image(plain, 0)
    seconds = statistics.median(image(plain, k) for k in range(TIMED))
    pipe = pipeline()
    image(pipe, 0)
    began = time.perf_counter()
    fxmask.accelerate(pipe, speedup=2.0, backend=backend, progress=False)
    image(pipe, 0)
    if effort != "instant":
        pipe.unet.improve(effort)
    image(pipe, 1)
    until_second = time.perf_counter() - began
    fast = statistics.median(image(pipe, 2 + k) for k in range(TIMED))
    account = pipe.unet.report().account
    saved = seconds - fast
    return {
        "effort": effort,
        "backend": backend,
        "plain": 2 * seconds,
        "until second": until_second,
        "calls": 2 * STEPS - STEPS // 2 + account.calls,
        "further calls": account.calls,
        "spent": account.spent,
        "capturing": account.capturing,
        "compiling": account.compiling,
        "image": fast,
        "break-even": account.spent / saved if saved > 0 else None,
        "ratio": seconds / fast,
    }


def recording_share(repeats: int = 9) -> float:
    """What recording in passing adds to a call, as a share of it: processor seconds, plain and recorded calls by turns."""
    pipe = pipeline()
    call = {"prompt": "a three", "num_inference_steps": STEPS, "guidance_scale": 4.0}
    taken: dict[bool, list[float]] = {False: [], True: []}
    for k in range(2 * repeats + 2):
        arguments = {**call, "generator": torch.Generator().manual_seed(k // 2)}
        began = time.process_time()
        if k % 2:
            call_and_record(pipe, (), arguments, component="unet", max_bytes=1 << 30)
        else:
            pipe(**arguments)
        if k > 1:
            taken[bool(k % 2)].append(time.process_time() - began)
    return statistics.median(taken[True]) / statistics.median(taken[False]) - 1


HEAD = f"""# What a plan costs

`python examples/studies/instant_cost.py`: the shipped latent U-Net through its pipeline, guidance 4, {STEPS} DDIM steps,
one image at a time, 2x, on one thread of a shared machine. Calls are of the denoiser, each for one image with both lanes:
two plain images are {2 * STEPS}; of an accelerated image those that are computed count. "Break-even" is after how many
accelerated images what was spent on capture, fitting, learning and compilation is saved, against the plain pipeline in
eager mode.

| effort | backend | two plain images | until the second | further calls | capture | compilation | one image | break-even |
|---|---|---|---|---|---|---|---|---|
"""


NOTES = """
Capture is most of what an instant plan costs here: `torch.export` of the model takes as long as seven images of this tiny
one, and does not grow with a model's width. Compilation is Inductor's, of the one full step graph; the second row with
Inductor finds it in Inductor's cache. Rows are noisy: the machine had other work, which the different times of two plain
images show; that of default effort was taken on a busier one than its plain images, and its ratio says nothing.

On an H200 the same pipeline (decoding left out, batch 1, bfloat16, `backend="auto"`): 0.33 s for a plain image in eager
mode, 0.05 s with a plan, whose steps are replayed as CUDA graphs; capture and compilation took 26 s, which is 48 images'
worth of what is saved. The first image was the same bit for bit. A check of one prediction takes 90 to 120 us of the host
and 14 to 42 us of the device (latents of 2 x 8 x 32 x 32 up to 2 x 16 x 21 x 60 x 104, bfloat16), once per full step;
nothing waits for it.

In pipeline calls of 20 steps, quick effort took 26 and default effort 155 beyond the recorded ones. What is promised are 18
and 120 units: runs of all that is learned from, here one recorded image and a second one with other noise.

Recording in passing (`--recording`) costs about 0.9 ms of processor time per step: copies of what the denoiser is given and
returns. That is 5 % of this call, whose steps take 16 ms, and less than 2 % where a step takes 45 ms or more.
"""


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = []
    for row in rows:
        even = "never" if row["break-even"] is None else f"{row['break-even']:.0f} images"
        lines.append(
            f"| {row['effort']} | {row['backend']} | {row['plain']:.2f} s | {row['until second']:.1f} s | "
            f"{row['further calls']} | "
            f"{row['capturing']:.1f} s | {row['compiling']:.1f} s | {row['image']:.2f} s ({row['ratio']:.2f}x) | {even} |"
        )
    return HEAD + "\n".join(lines) + "\n" + NOTES


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", action="append", choices=("eager", "inductor", "auto"), help="default: eager, inductor")
    parser.add_argument("--effort", action="append", choices=("instant", "quick", "default"), help="default: all")
    parser.add_argument("--recording", action="store_true", help="print only what recording in passing adds to a call")
    parser.add_argument("--write", action="store_true", help="write the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.recording:
        print(f"recording in passing adds {recording_share():+.1%} to a call")
        return
    rows = []
    for backend in options.backend or ("eager", "inductor"):
        for effort in options.effort or ("instant", "quick", "default"):
            rows.append(measure(effort, backend))
            print({k: round(v, 2) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
            if options.write:
                (RESULTS / "instant_cost.md").write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
