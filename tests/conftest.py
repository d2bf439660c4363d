"""Small denoisers that several test files share, captured once per session."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import fxmask
from fxmask.backends import BACKENDS, Backend
from fxmask.backends.eager import Eager

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # the models are tiny, and several workers share the machine

TIMESTEPS = (900.0, 700.0, 500.0, 300.0, 100.0)


class TinyTransformer(torch.nn.Module):
    """Two pre-norm blocks with time gates, in plain PyTorch: x + g(t) * attention(x), x + g(t) * mlp(x)."""

    def __init__(self, width: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(1, width)
        self.layers = torch.nn.ModuleList(TinyLayer(width) for _ in range(depth))
        self.head = torch.nn.Linear(width, 4)
        self.inp = torch.nn.Linear(4, width)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        time = self.embed(t.reshape(-1, 1).to(x.dtype) / 1000)
        x = self.inp(x)
        for layer in self.layers:
            x = layer(x, time)
        return self.head(x)


class TinyLayer(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.out = torch.nn.Linear(width, width)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(width, 4 * width), torch.nn.GELU(), torch.nn.Linear(4 * width, width))
        self.gate = torch.nn.Linear(width, 2 * width)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        gate_attention, gate_mlp = self.gate(time).unsqueeze(1).chunk(2, dim=-1)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        x = x + gate_attention * self.out(torch.nn.functional.scaled_dot_product_attention(q, k, v))
        return x + gate_mlp * self.mlp(x)


def tiny_unet(**config: Any) -> torch.nn.Module:
    """A small diffusers U-Net with attention."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    }
    return UNet2DModel(**{**defaults, **config}).eval()


def tiny_dit(**config: Any) -> torch.nn.Module:
    """A small diffusers DiT, class-conditional, null class 1000."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 1,
        "out_channels": 1,
        "num_layers": 2,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_zero",
    }
    return DiTTransformer2DModel(**{**defaults, **config}).eval()


def ddim(**config: Any) -> Any:
    """A DDIM scheduler with 1,000 training steps."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(num_train_timesteps=1000, **config)


def labels(batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random digit classes as conditioning."""
    return {"class_labels": torch.randint(10, (batch_size,), generator=generator)}


def make_calls(batch: int = 2, seed: int = 0, timesteps: tuple[float, ...] = TIMESTEPS) -> list[dict[str, torch.Tensor]]:
    """One call per timestep for a TinyTransformer: tokens [B, 6, 4]."""
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(batch, 6, 4, generator=generator), "t": torch.tensor(int(t))} for t in timesteps]


@pytest.fixture(scope="session")
def tiny() -> fxmask.Program:
    """A captured TinyTransformer, batch 2."""
    torch.manual_seed(0)
    return fxmask.capture(TinyTransformer().eval(), make_calls()[0])


@pytest.fixture(scope="session")
def unet_trajectory() -> tuple[torch.nn.Module, fxmask.Trajectory]:
    model = tiny_unet()
    return model, fxmask.record(model, ddim(), num_inference_steps=6, batch_size=2)


@pytest.fixture(scope="session")
def unet_program(unet_trajectory: tuple[torch.nn.Module, fxmask.Trajectory]) -> fxmask.Program:
    model, trajectory = unet_trajectory
    return fxmask.capture(model, trajectory.calls[0][0])


@pytest.fixture(scope="session")
def dit_trajectory() -> tuple[torch.nn.Module, fxmask.Trajectory]:
    model = tiny_dit()
    return model, fxmask.record(
        model, ddim(), num_inference_steps=6, batch_size=2, example_inputs=labels, step_kwargs={"eta": 1.0}
    )


@pytest.fixture(scope="session")
def dit_program(dit_trajectory: tuple[torch.nn.Module, fxmask.Trajectory]) -> fxmask.Program:
    model, trajectory = dit_trajectory
    return fxmask.capture(model, trajectory.calls[0][0])


def every_other(program: fxmask.Program, timesteps: tuple[float, ...] = TIMESTEPS) -> fxmask.Mask:
    """Compute all branches at even steps."""
    return fxmask.policies.interval(2)(program, timesteps)


@pytest.fixture
def tables(monkeypatch):
    """Graphs that run eagerly are given the timestep's table, as compiled ones are."""
    monkeypatch.setitem(BACKENDS, "eager", Backend({"whole": Eager}))
