"""Hyper-parameters of the paper's learner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PaperOptions:
    """Hyper-parameters of the paper's learner.

    Attributes:
        epochs: passes over the recorded trajectory.
        learning_rate: of Adam on the scores.
        bimodal: lambda2 as a fraction of lambda1; 0 leaves the bi-modal term out.
        weighted: whether ``w(i)`` scales the penalties (timestep-aware scaling); else 1.
        gumbel: scores are binary Gumbel-Softmax samples of logits (temperature 1, straight through is not used, as in
            the paper's comparison), instead of free numbers from random samples.
        on_scores: is called with the learned scores, float ``[T, branches]`` in [0, 1], e.g. for ``pictures.save_scores``.
    """

    epochs: int = 20
    learning_rate: float = 0.1
    bimodal: float = 0.3
    weighted: bool = True
    gumbel: bool = False
    on_scores: Callable[[torch.Tensor], None] | None = None
