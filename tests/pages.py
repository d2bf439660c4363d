"""The code blocks of README and docs, and the names that they may use."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from conftest import TinyTransformer, ddim, tiny_unet

import fxmask
from fxmask.backends import BACKENDS
from fxmask.passes import observer

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:<!-- not run: (?P<why>[^>]+) -->\n)?^```python\n(?P<code>.*?)^```$", re.S | re.M)


class Block(NamedTuple):
    """A code block of a page; ``why_not``: why it is not run, empty if it is."""

    page: Path
    line: int
    code: str
    why_not: str = ""

    @property
    def runs(self) -> bool:
        return not self.why_not

    def compiled(self) -> Any:
        """Its code object; errors point at the page's own lines."""
        return compile("\n" * (self.line - 1) + self.code, str(self.page), "exec")


def blocks_of(page: Path) -> list[Block]:
    """The Python blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, match.start("code")) + 1, match["code"], match["why"] or "")
        for match in BLOCK.finditer(text)
    ]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


WITH_CODE = [page for page in PAGES if blocks_of(page)]


def names_of_pages(device: str = "cpu") -> dict[str, Any]:
    """The names that every page may use; the model is on ``device``, and ``example_inputs`` on the CPU."""
    torch.manual_seed(0)
    model, scheduler, example_inputs = TinyTransformer().eval().to(device), ddim(), {"x": torch.randn(2, 6, 4)}
    calls = [
        fxmask.record(model, scheduler, num_inference_steps=6, batch_size=2, example_inputs=example_inputs, seed=seed)
        for seed in range(2)
    ]
    program = fxmask.capture(model, calls[0].calls[0][0])
    mask = fxmask.policies.interval(2)(program, calls[0].timesteps)
    plan = fxmask.rectify(program, mask)
    return {
        "fxmask": fxmask,
        "torch": torch,
        "model": model,
        "unet": tiny_unet().to(device),
        "scheduler": scheduler,
        "example_inputs": example_inputs,
        "calls": calls,
        "program": program,
        "mask": mask,
        "plan": plan,
        "accelerated": fxmask.compile(program, plan, backend="eager"),
    }


@contextlib.contextmanager
def registries() -> Iterator[None]:
    """A page may register backends and passes; the next one does not find them."""
    kept = [(registry, dict(registry)) for registry in (BACKENDS, observer.DECLARED)]
    try:
        yield
    finally:
        for registry, before in kept:
            registry.clear()
            registry.update(before)
