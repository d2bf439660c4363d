"""The emulated GPU refuses what a real one refuses, takes what it takes, and computes what the CPU computes."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from emulated_gpu import emulated_gpu
from without_a_gpu import CUDA

REFUSED: dict[str, Callable[[torch.Tensor], object]] = {
    "sum of two": lambda x: x + torch.zeros(4),
    "concatenation": lambda x: torch.cat([x, torch.zeros(3, 4)]),
    "single numbers, stacked": lambda x: torch.stack([x.sum(), torch.zeros(())]),
    "matrix product": lambda x: x @ torch.zeros(4, 4),
    "table of the CPU": lambda x: torch.ops.aten.index.Tensor(torch.zeros(3), [x[:, 0].long()]),
    "table of the GPU": lambda x: torch.nn.functional.embedding(torch.tensor([1]), x),
    "attention": lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, torch.zeros(3, 4)),
    "in place": lambda x: x.mul_(torch.ones(4)),
    "numpy": lambda x: x.numpy(),
}
TAKEN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a single number": lambda x: x + torch.ones(()),
    "indices of the CPU": lambda x: x[torch.tensor([1, 0])],
    "there and back": lambda x: x.cpu().to(x) * 2,
    "a copy": lambda x: torch.zeros_like(x).copy_(x.cpu()),
    "made there": lambda x: x + torch.arange(4, device=x.device) + torch.tensor([1.0], device=x.device) + x.new_ones(4),
    "a view in place": lambda x: x.clone().view(4, 3).T.mul_(2),
    "a gradient": lambda x: torch.func.grad(lambda y: (y**3).sum())(x),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    with emulated_gpu(), pytest.raises(RuntimeError, match="same device|not supported"):
        REFUSED[name](torch.ones(3, 4).to("cuda"))


@pytest.mark.parametrize("name", TAKEN)
def test_taken(name: str) -> None:
    x = torch.randn(3, 4)
    expected = TAKEN[name](x)
    with emulated_gpu():
        found = TAKEN[name](x.to("cuda"))
        assert found.device == CUDA
        assert found.is_cuda
        torch.testing.assert_close(found.cpu(), expected)


def test_a_module_and_its_gradients() -> None:
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 1)), torch.randn(3, 4)
    (expected,) = torch.autograd.grad(model(x).sum(), model[0].weight)
    with emulated_gpu():
        model.to("cuda")
        assert all(isinstance(p, torch.nn.Parameter) and p.device == CUDA for p in model.parameters())
        (found,) = torch.autograd.grad(model(x.to("cuda")).sum(), model[0].weight)
        torch.testing.assert_close(found.cpu(), expected)


def test_threads_and_the_end() -> None:
    made = []
    with emulated_gpu():
        thread = threading.Thread(target=lambda: made.append(torch.zeros(2, device="cuda")))
        thread.start()
        thread.join()
        assert made[0].device == CUDA
    assert torch.zeros(2).device.type == "cpu"
    assert not torch.cuda.is_available() or torch.zeros(1, device="cuda").sum() == 0
