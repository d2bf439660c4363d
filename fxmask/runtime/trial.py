"""A run that compares: at full steps, what reused blocks and what a forecast would have made of the prediction.

    cache of the full step before, as the plan left it --> reused blocks --> a prediction for a small share of a call
    predictions and samples of full steps before       --> forecast
                                                           both beside the prediction itself: mean squares, on the device

No call of the denoiser is spent: the full steps are those of the run, and nobody waits for what is found before it is over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fxmask._torch import version_of
from fxmask.ir.combine import root_mean_square
from fxmask.ir.forecast import Cache, Term
from fxmask.ir.outputs import sampled_part
from fxmask.ir.program import Program
from fxmask.ir.trial import Trial
from fxmask.passes.cut_graph import CutGraph, cut_graph

OUTPUT = "output"  # name of the forecasts among the levels


@dataclass
class Findings:
    """What a run in use found.

    Attributes:
        trial: what is compared.
        squares: by level and full step, mean squares of the difference over images, one scalar for each lane, on the device.
    """

    trial: Trial
    squares: dict[str, dict[int, list[torch.Tensor]]] = field(default_factory=dict)
    _graphs: dict[tuple[Program, str], CutGraph] = field(default_factory=dict)

    def graph(self, program: Program, name: str) -> CutGraph:
        """What forms the prediction when a level's blocks are given. Kept here: it holds the model, and a trial ends."""
        key = program, name
        if key not in self._graphs:
            self._graphs[key] = cut_graph(program, self.trial.levels[name], ())
        return self._graphs[key]

    def add(self, name: str, step: int, square: torch.Tensor) -> None:
        """Note what a level, or the forecast, made of a step."""
        self.squares.setdefault(name, {}).setdefault(step, []).append(square)

    def read(self) -> dict[str, dict[int, float]]:
        """By level and full step, the mean square over lanes. Waits for the device."""
        return {
            name: {step: float(torch.stack(found).mean()) for step, found in steps.items()}
            for name, steps in self.squares.items()
        }


@dataclass
class RunTrial:
    """The comparisons of one lane of a run.

    Attributes:
        findings: where they are added up.
    """

    findings: Findings
    _predictions: dict[int, tuple[torch.Tensor, int]] = field(default_factory=dict)
    _samples: dict[int, tuple[torch.Tensor, int]] = field(default_factory=dict)
    _stored: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)

    def before(self, step: int, cache: Cache) -> None:
        """Take what the full step before has left, while it is there."""
        earlier = self.findings.trial.previous.get(step)
        self._stored = {(slot.block, slot.value): x for slot, x in cache.items() if slot.step == earlier}

    def after(self, step: int, program: Program, tensors: Sequence[torch.Tensor], prediction: torch.Tensor) -> None:
        """Compare at a full step.

        Args:
            step: its number.
            program: of this form of call.
            tensors: the program's inputs.
            prediction: what was computed, ``[rows, ...]``.
        """
        trial = self.findings.trial
        sample = tensors[program.inputs.index(program.example.samples[0])]
        self._samples[step] = sample, version_of(sample)
        if step in trial.previous:
            self._compare(step, program, tensors, prediction, sample)
        self._predictions[step] = prediction, version_of(prediction)
        self._stored = {}

    def _compare(
        self, step: int, program: Program, tensors: Sequence[torch.Tensor], prediction: torch.Tensor, sample: torch.Tensor
    ) -> None:
        trial = self.findings.trial
        formed = self._formed(trial.forecasts[step], step, sample)
        graphs = {name: self.findings.graph(program, name) for name in trial.levels}
        if formed is None or any(key not in self._stored for graph in graphs.values() for key in graph.load):
            return
        made = {name: graph(tensors, [self._stored[key] for key in graph.load])[0] for name, graph in graphs.items()}
        for name, value in {OUTPUT: formed, **made}.items():
            difference = sampled_part(value, sample) - sampled_part(prediction, sample)
            self.findings.add(name, step, root_mean_square(difference, trial.lanes).square().mean())

    def _formed(self, terms: Sequence[Term], step: int, sample: torch.Tensor) -> torch.Tensor | None:
        """The forecast of a full step's prediction; ``None`` if the caller has changed what it reads."""
        total: torch.Tensor | None = None
        for source, c in terms:
            kept: Mapping[int, tuple[torch.Tensor, int]] = self._samples if isinstance(source, tuple) else self._predictions
            value, version = kept.get(source[1] if isinstance(source, tuple) else source, (sample, -2))
            if version_of(value) != version:
                return None
            value = sampled_part(value, sample)
            total = value * c if total is None else torch.add(total, value, alpha=c)
        return total
