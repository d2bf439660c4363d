"""Golden files: what was learned, saved and exported once, bit for bit.

    python tests/golden/make.py            learn every cell again and compare it with the files
    python tests/golden/make.py --write    write the files; only where results are meant to change
    python tests/golden/make.py --write NAME   of one cell, with the environment that it is written with

Learning decides between near ties, so other versions of PyTorch and other processors may decide otherwise: bits are compared
where ``environment.json`` (or the cell's own) is this machine's, and everywhere else the old files must load and run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiTTransformer2DModel,
    UNet2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

import fxmask

HERE = Path(__file__).parent
STEPS = 8

Learned = tuple[fxmask.Program, fxmask.Mask, Any]  # the program, the mask, and the scheduler that a saved plan belongs to


def environment() -> dict[str, Any]:
    """What the bits depend on."""
    able = {name: value for name, value in sorted(torch.cpu.get_capabilities().items()) if value}
    return {"torch": torch.__version__.split("+")[0], "cpu": able}


def written_with(name: str) -> dict[str, Any]:
    """What the bits of one cell were written with."""
    own = HERE / f"{name}-environment.json"
    found: dict[str, Any] = json.loads((own if own.exists() else HERE / "environment.json").read_text(encoding="utf-8"))
    return found


def unet() -> torch.nn.Module:
    """A U-Net of random weights."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    ).eval()


def dit() -> torch.nn.Module:
    """A class-conditional DiT of random weights."""
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        out_channels=1,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
    ).eval()


def labels(batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random classes."""
    return {"class_labels": torch.randint(10, (batch_size,), generator=generator)}


def _learned(model: torch.nn.Module, eta: float, effort: str, learner: str = "default", speedup: float = 1.8) -> Learned:
    conditioning = labels if isinstance(model, DiTTransformer2DModel) else None
    scheduler = DDIMScheduler(num_train_timesteps=1000)
    count = 1 if learner == "paper" else 3
    runs = [
        fxmask.record(
            model,
            scheduler,
            num_inference_steps=STEPS,
            batch_size=2,
            example_inputs=conditioning,
            step_kwargs={"eta": eta},
            seed=seed,
        )
        for seed in range(count)
    ]
    program = fxmask.capture(model, runs[0].calls[0][0])
    return program, fxmask.learn(program, runs, speedup=speedup, effort=effort, learner=learner), scheduler


def _wan() -> Learned:
    """A pipeline whose conditional and unconditional calls are separate lanes."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=16,
        ffn_dim=64,
        num_layers=3,
        rope_max_seq_len=32,
    ).eval()
    vae = torch.nn.Module()
    vae.config = SimpleNamespace(scale_factor_temporal=4, scale_factor_spatial=8, z_dim=4)
    vae.dtype, vae.device = torch.float32, torch.device("cpu")
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(None, None, vae=vae, scheduler=scheduler, transformer=transformer)
    pipe.set_progress_bar_config(disable=True)
    text = [torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    runs = [
        fxmask.record_pipeline(
            pipe,
            prompt_embeds=text[0],
            negative_prompt_embeds=text[1],
            num_inference_steps=STEPS,
            guidance_scale=4.0,
            height=64,
            width=64,
            num_frames=5,
            output_type="latent",
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in range(2)
    ]
    program = fxmask.capture(runs[0].denoiser, runs[0].calls[0][0], roles=runs[0].roles)
    return program, fxmask.learn(program, runs, speedup=1.8, effort="quick"), None


CELLS: dict[str, Callable[[], Learned]] = {
    "unet-deterministic": lambda: _learned(unet(), 0.0, "default"),
    "unet-stochastic": lambda: _learned(unet(), 1.0, "default"),
    "dit-deterministic": lambda: _learned(dit(), 0.0, "quick"),
    "dit-stochastic": lambda: _learned(dit(), 1.0, "default", speedup=1.5),
    "unet-paper": lambda: _learned(unet(), 0.0, "default", learner="paper", speedup=1.4),
    "wan-lanes": _wan,
}
PACKAGED = "dit-deterministic"  # the cell whose plan is exported as a package


def as_data(mask: fxmask.Mask) -> dict[str, Any]:
    """A mask as JSON, with every bit of its coefficients."""
    terms = mask.forecast.terms if mask.forecast else {}
    return {
        "compute": [[int(x) for x in row] for row in mask.compute.tolist()],
        "timesteps": list(mask.timesteps),
        "blocks": list(mask.blocks),
        "fingerprint": mask.fingerprint,
        "forecast": [[step, block, [[source, c.hex()] for source, c in pairs]] for (step, block), pairs in terms.items()],
    }


def learn_cell(name: str) -> tuple[Learned, dict[str, Any]]:
    """One cell learned now, on one thread, and its mask as data."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        learned = CELLS[name]()
    finally:
        torch.set_num_threads(threads)
    return learned, json.loads(json.dumps(as_data(learned[1])))


def main() -> int:
    """Write the files, or compare with them."""
    write = "--write" in sys.argv
    wrong = []
    chosen = [name for name in CELLS if name in sys.argv]
    for name in chosen or CELLS:
        (program, mask, _), data = learn_cell(name)
        path = HERE / f"{name}.json"
        if write:
            path.write_text(json.dumps(data) + "\n", encoding="utf-8")
            if chosen:  # saved plans stay as old as they are
                (HERE / f"{name}-environment.json").write_text(json.dumps(environment()) + "\n", encoding="utf-8")
                continue
            accelerated = fxmask.compile(program, fxmask.rectify(program, mask), backend="eager")
            accelerated.save(HERE / name)
            (HERE / f"{name}-plan.json").write_text(json.dumps(data) + "\n", encoding="utf-8")
            if name == PACKAGED:
                accelerated.export(HERE / f"{name}-package")
        elif json.loads(path.read_text(encoding="utf-8")) != data:
            wrong.append(name)
        print(name, "written" if write else "differs" if name in wrong else "same")
    if write and not chosen:
        (HERE / "environment.json").write_text(json.dumps(environment()) + "\n", encoding="utf-8")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
