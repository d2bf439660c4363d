"""Random draws: recorded, played back, or replaced by others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fxmask._torch import without_function_mode
from fxmask.errors import SchedulerError

DRAWS = (
    torch.randn,
    torch.randn_like,
    torch.rand,
    torch.rand_like,
    torch.normal,
    torch.randint,
    torch.Tensor.normal_,
    torch.Tensor.uniform_,
)


class NoiseTape(TorchFunctionMode):
    """Records every random tensor that is drawn inside it; those of a recording that it plays back, too."""

    def __init__(self, recorded: Sequence[torch.Tensor] | None = None) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []
        self._playback = None if recorded is None else iter(recorded)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in DRAWS:
            return func(*args, **(kwargs or {}))
        drawn = func(*args, **(kwargs or {})) if self._playback is None else None
        if drawn is not None:
            self.tensors.append(drawn.detach().clone())
            return drawn
        assert self._playback is not None
        noise = next(self._playback, None)
        if noise is None:
            raise SchedulerError("the sampler drew more noise than was recorded; it must be called as it was recorded")
        self.tensors.append(noise)
        if func in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return args[0].copy_(noise)
        return noise.clone()

    @contextlib.contextmanager
    def aside(self) -> Iterator[Callable[[], bool]]:
        """Put the tape aside where nothing should be drawn: it takes time for every operator.

        Yields:
            A function that says whether something was drawn, by torch's own generators or onto the tape.
        """
        count, before = len(self.tensors), _states()
        with without_function_mode(self):
            yield lambda: len(self.tensors) > count or _states() != before


def _states() -> list[Any]:
    """What torch's own generators draw next, as far as that can be asked without a wait."""
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    offsets = [g.get_offset() for g in torch.cuda.default_generators] if used else []
    return [torch.get_rng_state().numpy().tobytes(), *offsets]


class FreshNoise(NoiseTape):
    """Gives every random draw other values, whatever generator it would have come from, and records them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seeds = torch.Generator().manual_seed(seed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in DRAWS:
            return func(*args, **(kwargs or {}))
        own = {name: value for name, value in (kwargs or {}).items() if name != "generator"}
        seed = int(torch.randint(2**62, (), generator=self._seeds))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return super().__torch_function__(func, types, args, own)

    def start(self, given: torch.Tensor) -> torch.Tensor:
        """Noise in place of a start noise that was passed in."""
        return torch.randn(given.shape, generator=self._seeds).to(given)
