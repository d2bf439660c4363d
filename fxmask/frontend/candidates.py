"""Values that an argument may have, from its name and the model's config: a table of rules, the first that fits counts.

Names are all that a signature says of an argument. A rule that is wrong costs trials, not correctness: what is taken is what
the model runs with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxmask.frontend.modules import module_dtype
from fxmask.frontend.shapes import TOKENS, config_values, sample_shapes

PIXELS = 64.0  # height and width in micro-conditioning
GUIDANCE = 4.0  # strength of guidance, frames per second and the like

# Words in the names of optional arguments without which some models do not run; others only change how they run.
MAY_NEED = (
    "hidden_states",
    "pooled",
    "projection",
    "label",
    "class",
    "guidance",
    "added_cond",
    "ids",
    "embed",
    "mask",
    "size",
)


def may_need(name: str) -> bool:
    """Whether a model may not run without an optional argument of this name."""
    return any(word in name for word in MAY_NEED) and "controlnet" not in name and "block" not in name


@dataclass(frozen=True)
class Conditioning:
    """What candidates are made of.

    Attributes:
        model: the denoiser.
        batch: B.
        generator: of random values.
    """

    model: torch.nn.Module
    batch: int
    generator: torch.Generator

    def candidates(self, name: str) -> Iterator[Any]:
        """Values for a conditioning argument, the likeliest first."""
        words = name.lower()
        _, make = next(rule for rule in RULES if rule[0](words))
        yield from make(self)

    def noise(self, *shape: int) -> torch.Tensor:
        """Random values of the model's type."""
        return torch.randn(shape, generator=self.generator).to(module_dtype(self.model))

    def numbers(self, meaning: str) -> list[int]:
        """Whole numbers of the config for a meaning."""
        return [n for n in config_values(self.model, meaning) if isinstance(n, int)]

    @property
    def lengths(self) -> list[int]:
        """Of a text."""
        return [*self.numbers("length"), TOKENS]


def _masks(c: Conditioning) -> Iterator[Any]:
    yield from (torch.ones(c.batch, n, dtype=torch.int64) for n in c.lengths)
    yield from (torch.ones(c.batch, n, dtype=torch.bool) for n in c.lengths)


def _labels(c: Conditioning) -> Iterator[Any]:
    yield torch.zeros(c.batch, dtype=torch.int64)
    yield from (c.noise(c.batch, d) for d in c.numbers("pooled"))


def _strengths(c: Conditioning) -> Iterator[Any]:
    yield torch.full((c.batch,), GUIDANCE)


def _keywords(c: Conditioning) -> Iterator[Any]:
    """Nested arguments of diffusers' U-Nets and of PixArt."""
    micro = next(iter(c.numbers("micro")), 0)
    for d in c.numbers("pooled"):
        if micro and d > 6 * micro:
            yield {"text_embeds": c.noise(c.batch, d - 6 * micro), "time_ids": torch.full((c.batch, 6), PIXELS)}
    yield {"resolution": None, "aspect_ratio": None}
    yield {"resolution": torch.full((c.batch, 2), PIXELS), "aspect_ratio": torch.ones(c.batch, 1)}
    yield {}


def _text_positions(c: Conditioning) -> Iterator[Any]:
    yield from (torch.zeros(n, 3) for n in c.lengths)


def _positions(c: Conditioning) -> Iterator[Any]:
    tokens = {s[1] for s in sample_shapes(c.model, c.batch) if len(s) == 3}
    yield from (torch.zeros(n, 3) for n in sorted(tokens))
    yield torch.zeros(c.batch, 3)


def _vectors(c: Conditioning) -> Iterator[Any]:
    pooled = c.numbers("pooled")
    yield from (c.noise(c.batch, d) for d in [*pooled, *c.numbers("text")])
    yield from (c.noise(c.batch, 1, d) for d in pooled)


def _sizes(c: Conditioning) -> Iterator[Any]:
    for count in (2, 6, 5):
        yield torch.full((c.batch, count), PIXELS)


def _texts(c: Conditioning) -> Iterator[Any]:
    text = c.numbers("text")
    yield from (c.noise(c.batch, n, d) for n in c.lengths for d in text)
    yield from (c.noise(c.batch, d) for d in [*c.numbers("pooled"), *text])
    yield torch.zeros(c.batch, dtype=torch.int64)


def _any(*words: str) -> Callable[[str], bool]:
    return lambda name: any(word in name for word in words)


RULES: Sequence[tuple[Callable[[str], bool], Callable[[Conditioning], Iterator[Any]]]] = (
    (_any("mask"), _masks),
    (lambda name: name == "y" or "label" in name or "class" in name, _labels),
    (_any("guidance", "fps"), _strengths),
    (_any("kwargs"), _keywords),
    (lambda name: "ids" in name and "txt" in name, _text_positions),
    (_any("ids"), _positions),
    (_any("pooled", "global", "proj", "vector"), _vectors),
    (_any("micro", "size", "coords"), _sizes),
    (lambda name: True, _texts),
)
