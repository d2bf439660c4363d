"""What is saved and loaded again and again: a small denoiser, and graphs in the place of compiled code."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(TESTS), str(TESTS / "fuzz")) if path not in sys.path]

from conftest import TIMESTEPS, TinyTransformer, make_calls  # noqa: E402

import fxmask  # noqa: E402
from fxmask.backends import package  # noqa: E402
from fxmask.backends.archive import check_archive  # noqa: E402
from fxmask.runtime import export as exporting  # noqa: E402

graphs: list[torch.fx.GraphModule] = []


class Denoiser(TinyTransformer):
    """With a constant that belongs to no module, which goes into a package's own file of tensors."""

    def __init__(self) -> None:
        super().__init__(8, 2)
        self.columns = torch.linspace(-1, 1, 24).reshape(4, 6).T

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return super().forward(x + self.columns, t)


def build(graph_module: torch.fx.GraphModule, arguments: Sequence[torch.Tensor], path: Path) -> None:
    """In the place of the compiler: a number, of the graph that would have been compiled."""
    path.write_text(str(len(graphs)))
    graphs.append(graph_module)


def load(path: Path, device: Any) -> Any:
    """And back. What is an archive is looked at as an archive is."""
    with path.open("rb") as file:
        content = file.read(100)
    if content[:2] == b"PK":
        check_archive(path)
    graph = graphs[int(content)]
    return lambda arguments: list(graph(*arguments))


def use_shelf() -> None:
    """From now on nothing is compiled."""
    package.build_package = build  # type: ignore[assignment]
    package.load_package = load  # type: ignore[assignment]
    package.can_compile = lambda graph_module: True  # type: ignore[assignment]
    exporting.cpu_compiler_problem = lambda: None  # type: ignore[assignment]


def denoiser() -> torch.nn.Module:
    """Always the same weights."""
    torch.manual_seed(0)
    return Denoiser().eval()


def accelerated(model: torch.nn.Module) -> fxmask.AcceleratedModel:
    """With reuse, a forecast and a blend."""
    program = fxmask.capture(model, make_calls()[0])
    names = [block.name for block in program.branches]
    rows = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 0, 1], [1, 0, 1, 1], [0, 0, 0, 1]]).bool()
    terms = {
        (2, names[0]): {1: 1.5, 0: -0.5},
        (2, names[2]): {1: 0.75},
        (3, names[1]): {2: 2.0, 0: -1.0},
        (4, names[2]): {3: 1.0, (names[0], 3): 0.25},
    }
    mask = fxmask.Mask(rows, TIMESTEPS, names, terms, program.fingerprint)
    return fxmask.compile(program, fxmask.rectify(program, mask), backend="eager")


def run(model: Any, timesteps: Sequence[float]) -> list[torch.Tensor]:
    """One generation."""
    with warnings.catch_warnings(), model.generation():
        warnings.simplefilter("ignore")
        return [model(**call) for call in make_calls(timesteps=timesteps)]
