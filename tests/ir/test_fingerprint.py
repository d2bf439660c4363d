"""Fingerprints: equal for what computes the same, different for what does not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from conftest import TinyTransformer, every_other, make_calls

import fxmask
from fxmask.ir.fingerprint import fingerprint_1, fingerprint_of


class Net(torch.nn.Module):
    """A residual block whose numbers are arguments."""

    def __init__(self, width: int = 8, **numbers: Any) -> None:
        super().__init__()
        self.numbers = {"stride": 1, "groups": 1, "eps": 1e-5, "scale": 0.5, "norm": 2, "order": (0, 1), **numbers}
        self.inp = torch.nn.Conv2d(4, width, 3, padding=1)
        self.norm = torch.nn.GroupNorm(self.numbers["norm"], width, eps=self.numbers["eps"])
        stride, groups = self.numbers["stride"], self.numbers["groups"]
        self.conv = torch.nn.Conv2d(width, width, 3, padding=1, stride=stride, groups=groups)
        self.out = torch.nn.Conv2d(width, 4, 1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x = self.inp(x) + (t.reshape(-1, 1, 1, 1) / 1000).to(x.dtype)
        y = torch.nn.functional.interpolate(self.conv(torch.nn.functional.silu(self.norm(x))), x.shape[-2:])
        parts = [x, y * self.numbers["scale"]]
        first, second = (parts[k] for k in self.numbers["order"])
        return self.out(first + second.relu())


def captured(batch: int = 2, size: int = 8, dtype: torch.dtype = torch.float32, **numbers: Any) -> fxmask.Program:
    torch.manual_seed(0)
    model = Net(**numbers).eval().to(dtype)
    return fxmask.capture(model, {"x": torch.randn(batch, 4, size, size, dtype=dtype), "t": torch.tensor(500)})


@pytest.fixture(scope="module")
def usual() -> fxmask.Program:
    return captured()


@pytest.mark.parametrize(
    "other",
    [
        {"width": 12},
        {"stride": 2},
        {"groups": 2},
        {"eps": 1e-6},
        {"scale": 0.25},
        {"norm": 4},
        {"order": (1, 0)},
    ],
    ids=str,
)
def test_what_computes_something_else_has_another(usual, other):
    assert captured(**other).fingerprint != usual.fingerprint


@pytest.mark.parametrize(
    "other",
    [{"batch": 3}, {"size": 16}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}, {"dtype": torch.float64}],
    ids=str,
)
def test_batch_resolution_and_type_are_not_in_it(usual, other):
    assert captured(**other).fingerprint == usual.fingerprint


def test_layouts_of_weights_and_inputs_are_not_in_it(usual):
    torch.manual_seed(0)
    model = Net().eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    assert fxmask.capture(model, {"x": x, "t": torch.tensor(500)}).fingerprint == usual.fingerprint


def test_attention_of_other_layouts_has_the_same():
    class Attention(torch.nn.Module):
        def __init__(self, copies: bool) -> None:
            super().__init__()
            self.copies = copies
            self.qkv, self.out = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            heads = [y.reshape(*y.shape[:2], 2, 4).transpose(1, 2) for y in self.qkv(x + t / 1000).chunk(3, -1)]
            heads = [y.contiguous() for y in heads] if self.copies else heads
            return x + self.out(torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))

    programs = [
        fxmask.capture(Attention(copies).eval(), {"x": torch.randn(2, 6, 8), "t": torch.tensor(5)}) for copies in (0, 1)
    ]
    assert programs[0].fingerprint == programs[1].fingerprint


def test_masks_of_the_first_version_fit_and_are_carried_over(usual):
    program = fxmask.capture(TinyTransformer().eval(), make_calls()[0])
    old = fingerprint_1(program.graph_module, program.blocks)
    assert program.fingerprint == fingerprint_of(program.graph_module, program.blocks) != old
    mask = dataclasses.replace(every_other(program), fingerprint=old)
    plan = fxmask.rectify(program, mask)
    assert plan.mask.fingerprint == plan.source.fingerprint == plan.fingerprint == program.fingerprint
    with pytest.raises(fxmask.MaskError, match="fingerprint"):
        fxmask.rectify(program, dataclasses.replace(mask, fingerprint=usual.fingerprint))
