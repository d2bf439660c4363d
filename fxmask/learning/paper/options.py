"""Hyper-parameters of the paper's learner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fxmask.errors import InputError

PASSES = {"quick": 40, "default": 200}
LATER = ("window", "start", "judged")  # options that checkpoints of the first format do not know
CHOICES = {
    "blocks": ("stream", "branch"),
    "inputs": ("teacher", "student"),
    "sampling": ("start", "bernoulli", "gumbel"),
    "cost": ("sum", "live"),
    "start": ("random", "schedule"),
}


@dataclass(frozen=True)
class PaperOptions:
    """Hyper-parameters of the paper's learner. What the paper leaves open is an option.

    Attributes:
        epochs: passes over all steps, each an update of every score; by ``effort`` if not given: 40 or 200.
        learning_rate: of Adam on the scores, at first; it falls to a tenth in the last half of the passes.
        bimodal: lambda2 as a fraction of lambda1, below 1: from there on scores at 1 would stay; 0 leaves the term out.
        weighted: whether ``w(i)`` scales the penalties (timestep-aware scaling); else 1.
        sampling: what random sampling is. ``"start"``: scores start as random samples and are used as they are.
            ``"bernoulli"``: each pass uses 1 with probability ``s``, else 0. ``"gumbel"``: binary Gumbel-Softmax samples
            (temperature 1), which the paper compares with.
        gumbel: the same as ``sampling="gumbel"``.
        blocks: ``"stream"``, values after a residual addition, as in the paper's Eq. 3; or ``"branch"``.
        inputs: whose samples the steps of a pass are given: ``"teacher"``, the frozen model's, or ``"student"``, those of the
            soft mask.
        fresh: draw other noise for every pass; else every pass is over the recorded runs.
        cost: what lambda1 weighs. ``"sum"``: the sum of the scores, as in the paper. ``"live"``, which is ours: expected MACs,
            with what rectification will drop left out.
        measured: scale each step by what the sampler makes of an error in it, in place of the three values of ``w(i)``. Ours.
        window: steps whose losses reach a score, through the caches. 1: a score is told of its own step alone, as in the paper.
            More, which is ours: it is also told of steps that load what it stores; memory grows with the window.
        start: where scores start: ``"random"``, samples in [0, 1], as in the paper; or ``"schedule"``, which is ours, near the
            fixed schedule (all blocks, or one stream, at evenly spaced steps) that is best on a recorded run at what is asked.
        judged: passes between rollouts of the mask so far on the recorded runs, of which the best is kept; 0, as in the paper:
            the last one is taken. Ours.
        strength: a fixed lambda1. The speed-up is then what comes out, and none may be asked for.
        patience: passes without a change of the mask after which learning stops early; 0: never.
        on_scores: is called with the learned scores, float ``[T, blocks]`` in [0, 1], e.g. for ``pictures.save_scores``.

    Raises:
        InputError: an option is unknown.
    """

    epochs: int | None = None
    learning_rate: float = 0.1
    bimodal: float = 0.5
    weighted: bool = True
    sampling: str = "start"
    gumbel: bool = False
    blocks: str = "stream"
    inputs: str = "teacher"
    fresh: bool = True
    cost: str = "sum"
    measured: bool = False
    window: int = field(default=1, repr=False)
    start: str = field(default="random", repr=False)
    judged: int = field(default=0, repr=False)
    strength: float | None = None
    patience: int = 10
    on_scores: Callable[[torch.Tensor], None] | None = None

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"PaperOptions({name}={getattr(self, name)!r}) is unknown; choose one of {list(choices)}")
        if not 0 <= self.bimodal < 1:
            raise InputError(f"PaperOptions(bimodal={self.bimodal}) must be at least 0 and below 1")
        for name in ("epochs", "window"):
            if (given := getattr(self, name)) is not None and given < 1:
                raise InputError(f"PaperOptions({name}={given}) must be at least 1")
        if self.start == "schedule" and self.strength is not None:
            raise InputError(
                'PaperOptions(start="schedule", strength=...): a schedule is one of an outcome, and a fixed strength has none; '
                "leave one of them out"
            )

    @classmethod
    def ours(cls, **options: Any) -> PaperOptions:
        """The method with our changes: live cost, measured weights, a window, a start from a schedule, judging rollouts."""
        ours = {"cost": "live", "measured": True, "window": 4, "start": "schedule", "judged": 10}
        return cls(**{**ours, **options})

    @property
    def identity(self) -> str:
        """Tells these options from others; what checkpoints of before did not know counts only where it is used."""
        since = {name: value for name in LATER if (value := getattr(self, name)) != getattr(PaperOptions, name)}
        return repr(self) + (repr(since) if since else "")

    @property
    def drawn(self) -> str:
        """How the scores of a pass are sampled."""
        return "gumbel" if self.gumbel else self.sampling
