"""Arguments found by trial: a copy of the model without memory is called with candidates."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fxmask._torch import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode, pytree
from fxmask.errors import InputError
from fxmask.frontend.arguments import describe_value, needed_names, refuse_unknown, required_names
from fxmask.frontend.candidates import Conditioning, may_need
from fxmask.frontend.fake import fake_call, fake_copy, is_abstract, quiet_torch
from fxmask.frontend.modules import module_device, module_dtype
from fxmask.frontend.shapes import sample_shapes, timestep_candidates
from fxmask.ir.calls import Signature
from fxmask.ir.outputs import first_tensor

logger = logging.getLogger(__name__)
MAX_TRIALS = 300
MAX_SECONDS = 30.0


def infer_call(
    model: torch.nn.Module, given: Mapping[str, Any] | None, batch_size: int, signature: Signature, seed: int = 0
) -> dict[str, Any]:
    """Arguments that the model accepts: those that are given, and random ones in the place of others that it needs.

    Args:
        model: the denoiser.
        given: arguments that the user gave.
        batch_size: B, where none was given.
        signature: of the model.
        seed: of the random values.

    Raises:
        InputError: no arguments were found with which the model runs; names those that are missing, with hints.
    """
    fixed = dict(given or {})
    refuse_unknown(model, signature, fixed)
    if isinstance(fixed.get(signature.sample), (torch.Tensor, list, tuple)):
        batch_size = len(fixed[signature.sample])
    search = ArgumentSearch(model, signature, fixed, batch_size, torch.Generator().manual_seed(seed))
    try:
        found = search.run()
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} cannot be tried without memory ({type(error).__name__}: {error}); pass example_inputs "
            f"with {sorted(needed_names(signature) - fixed.keys())}"
        ) from error
    if found is None:
        needed = [name for name in required_names(signature) if name not in fixed]
        optional = [n for n, p in signature.parameters.parameters.items() if n not in fixed and p.default is None]
        hints = [f"{n}: e.g. {describe_value(options[0])}" for n, options in search.options.items() if n in needed and options]
        raise InputError(
            f"{type(model).__name__} does not run with any arguments that could be inferred. Pass example_inputs with "
            f"{needed or 'its conditioning'}"
            + (f" ({'; '.join(hints)})" if hints else "")
            + (f"; arguments left at None: {optional}" if optional else "")
            + f". It got furthest with: {search.reason}"
        )
    device = torch.device("cpu") if is_abstract(model) else module_device(model)
    placed: dict[str, Any] = pytree.tree_map(
        lambda x: x.to(device) if isinstance(x, torch.Tensor) and not x.is_meta else x, found
    )
    return placed


class _Progress(TorchFunctionMode):
    """Counts calls: how far a trial got before it failed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class Trial:
    """Calls a copy of the model without memory."""

    def __init__(self, model: torch.nn.Module, signature: Signature) -> None:
        self.signature = signature
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.model = fake_copy(model, self.mode)
        self.device = module_device(self.model)
        self.progress = 0
        self.reason = "nothing was tried"

    def run(self, call: Mapping[str, Any]) -> bool:
        """Whether the model takes the call and returns something of the sample's shape but for one dimension."""
        counter = _Progress()
        try:
            with quiet_torch(), self.mode, torch.no_grad(), counter:
                output = first_tensor(self.model(**fake_call(call, self.mode, self.device)))
        except (DataDependentOutputException, DynamicOutputShapeException):
            return True  # it got to where sizes depend on values; fake tensors have none
        except Exception as error:
            self.progress = counter.count
            self.reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            return False
        sample = first_tensor(call[self.signature.sample])
        if output.dim() == sample.dim() and sum(a != b for a, b in zip(output.shape, sample.shape, strict=True)) <= 1:
            return True
        if not sample.is_floating_point():  # codes in, logits out
            return True
        self.progress = counter.count - 1
        self.reason = f"a sample of shape {list(sample.shape)} gives an output of shape {list(output.shape)}"
        return False


@dataclass
class ArgumentSearch:
    """Coordinate search for arguments with which a model runs: each change that gets further is kept."""

    model: torch.nn.Module
    signature: Signature
    given: dict[str, Any]
    batch: int
    generator: torch.Generator
    options: dict[str, list[Any]] = field(default_factory=dict)
    reason: str = ""

    def run(self) -> dict[str, Any] | None:
        """A call that works, or ``None``."""
        parameters = self.signature.parameters.parameters
        required = [name for name in required_names(self.signature) if name not in self.given]
        roles = [name for name in (self.signature.sample, self.signature.timestep) if name is not None]
        needed = [name for name in dict.fromkeys([*roles, *required]) if name not in self.given]
        optional = [name for name, p in parameters.items() if p.default is None and name not in self.given and may_need(name)]
        optional.sort(key=lambda name: "mask" in name)  # a model that fails for want of something else takes a mask
        self.options = {name: list(self._candidates(name)) for name in dict.fromkeys([*needed, *optional])}
        trial = Trial(self.model, self.signature)
        call = {**self.given, **{name: self.options[name][0] for name in needed if self.options[name]}}
        return self._improve(trial, call)

    def _improve(self, trial: Trial, call: dict[str, Any]) -> dict[str, Any] | None:
        ends = time.monotonic() + MAX_SECONDS
        trials = 1
        if trial.run(call):
            return call
        best, self.reason = trial.progress, trial.reason
        improved = True
        while improved:
            improved = False
            for name, options in self.options.items():
                for option in options:
                    if trials >= MAX_TRIALS or time.monotonic() > ends:
                        return None
                    candidate = {**call, name: option}
                    trials += 1
                    if trial.run(candidate):
                        return candidate
                    if trial.progress > best:
                        best, self.reason, call, improved = trial.progress, trial.reason, candidate, True
        return None

    def _candidates(self, name: str) -> Iterator[Any]:
        """Values that an argument may have, the likeliest first."""
        if name == self.signature.sample:
            yield from map(self._sample, sample_shapes(self.model, self.batch))
            yield from (torch.zeros(s[0], *s[2:], dtype=torch.int64) for s in sample_shapes(self.model, self.batch)[:1])
            return
        if name == self.signature.timestep:
            yield from timestep_candidates(self.batch)
            return
        yield from Conditioning(self.model, self.batch, self.generator).candidates(name)

    def _sample(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(module_dtype(self.model))
