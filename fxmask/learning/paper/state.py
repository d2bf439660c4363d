"""What the paper's learner carries from pass to pass, and its file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from fxmask.errors import InputError
from fxmask.files.bounded import TENSOR_BYTES, read_bounded
from fxmask.files.foreign import foreign_errors_as
from fxmask.files.replace import replace_file

FORMAT = "fxmask paper checkpoint 1"
UNSURE = 0.3  # how far from 0 or 1 scores may be that start near a mask
BETAS, EPSILON = (0.9, 0.999), 1e-8


@dataclass
class State:
    """Scores, the moments of Adam, and what is known of steps and cost.

    Attributes:
        scores: float ``[T, B]`` in [0, 1]; the first row is 1.
        pull: float ``[T, B]``, a running mean of the feature loss's negative gradient.
        first: float ``[T, B]``, Adam's running mean of gradients.
        second: float ``[T, B]``, that of their squares.
        change: float64 ``[T]``, see ``Pass.change``.
        passes: how many were made.
        updates: how many of them moved the scores.
        strength: lambda1; ``None`` before it is known.
        kept: fraction of MACs of the mask ``scores > 0.5``.
        flips: share of that mask's entries that each pass changed.
        best: float ``[2, T, B]``, scores and pull of the best mask so far, where masks are judged; else empty.
        lowest: its error.
    """

    scores: torch.Tensor
    pull: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    change: torch.Tensor
    passes: int = 0
    updates: int = 0
    strength: float | None = None
    kept: float = 1.0
    flips: list[float] = field(default_factory=list)
    best: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    lowest: float = math.inf
    _mask: torch.Tensor | None = None

    @classmethod
    def start(cls, steps: int, blocks: int, seed: int, strength: float | None, near: torch.Tensor | None = None) -> State:
        """Random samples in [0, 1] (the paper's Table 4), or on the sides of 0.5 that the mask ``near`` ``[T, B]`` says."""
        scores = torch.rand(steps, blocks, generator=torch.Generator().manual_seed(seed))
        if near is not None:
            scores = torch.where(near, 1 - UNSURE * scores, UNSURE * scores)
        scores[0] = 1.0
        pull, first, second = (torch.zeros(steps, blocks) for _ in range(3))
        return cls(scores, pull, first, second, torch.zeros(steps, dtype=torch.float64), strength=strength)

    def descend(self, gradient: torch.Tensor, rate: float) -> None:
        """One step of Adam (Kingma and Ba, 2015) on the scores, kept in [0, 1]."""
        self.updates += 1
        self.first = BETAS[0] * self.first + (1 - BETAS[0]) * gradient
        self.second = BETAS[1] * self.second + (1 - BETAS[1]) * gradient.square()
        mean, square = (x / (1 - b**self.updates) for x, b in zip((self.first, self.second), BETAS, strict=True))
        self.scores = (self.scores - rate * mean / (square.sqrt() + EPSILON)).clamp(0.0, 1.0)
        self.scores[0] = 1.0

    def finish(self, kept: Callable[[torch.Tensor], float]) -> None:
        """Count the pass, what its mask costs, and how much of it is new."""
        mask = self.scores > 0.5
        if self._mask is not None:
            self.flips.append(float((mask != self._mask).float().mean()))
        if self._mask is None or not torch.equal(mask, self._mask):
            self.kept = kept(mask)
        self._mask = mask
        self.passes += 1

    def judge(self, error: float) -> None:
        """Keep the scores as they are, if their mask's error is the lowest so far."""
        if error < self.lowest or not len(self.best):
            self.best, self.lowest = torch.stack([self.scores, self.pull]), error

    def write(self, path: Path, identity: str, noise: torch.Generator) -> None:
        """Replace the checkpoint by this state."""
        facts = {name: getattr(self, name) for name in ("passes", "updates", "strength", "kept", "flips", "lowest")}
        tensors = {name: getattr(self, name).contiguous() for name in ("scores", "pull", "first", "second", "change", "best")}
        tensors["noise"] = noise.get_state()
        about = {"format": FORMAT, "identity": identity, "facts": json.dumps(facts)}
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, save(tensors, about), path.with_name(f".{path.name}.partial"))

    def going_on(self, path: Path, identity: str, noise: torch.Generator) -> State:
        """The state in a file, if there is one; else this one.

        Raises:
            InputError: the file is damaged, or belongs to another run.
        """
        if not path.exists():
            return self
        with foreign_errors_as(InputError, f"checkpoint {path} is damaged", "delete it to learn from the start"):
            content = read_bounded(path, TENSOR_BYTES)
            length = int.from_bytes(content[:8], "little")
            about = json.loads(content[8 : 8 + length])["__metadata__"]
            tensors = load(content)
            if about["format"] != FORMAT or about["identity"] != identity:
                raise InputError(
                    f"checkpoint {path} belongs to another run (model, weights, recorded runs, options, seed, ranks or outcome "
                    "differ); delete it, or give another file"
                )
            noise.set_state(tensors.pop("noise"))
            known: dict[str, Any] = {**tensors, **json.loads(about["facts"])}
            state = State(**known)
            state._mask = state.scores > 0.5
            if state.scores.shape != self.scores.shape:
                raise ValueError(f"its scores are {list(state.scores.shape)}, not {list(self.scores.shape)}")
            return state
