"""Recording a call of a pipeline in passing: the user's own call, which makes just what it always made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxmask._torch import pytree
from fxmask.errors import FxmaskError
from fxmask.sampling.pipeline_trajectory import PipelineTrajectory, call_and_record


def record_in_passing(
    pipe: Any,
    call: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    components: Sequence[str | None],
    max_bytes: int,
) -> tuple[Any, list[PipelineTrajectory | str | None]]:
    """Call a pipeline, and keep what its denoisers were given and returned.

    What runs is a shallow copy of the pipeline, with the original denoisers and with copies of its schedulers.

    Args:
        pipe: the pipeline.
        call: the call itself, made instead where nothing can be recorded.
        args: of the call.
        kwargs: of the call.
        components: names of the denoisers.
        max_bytes: what the recording of each may hold.

    Returns:
        What the pipeline returns, and of each denoiser the recorded run, or why there is none; ``None`` if it had no step.
    """
    draws = _RandomState.of(args, kwargs)
    try:
        return call_and_record(pipe, args, kwargs, components=components, max_bytes=max_bytes)
    except FxmaskError as error:  # this way of running it was refused in the middle, by us: it runs again, as it is
        draws.restore()
        return call(*args, **kwargs), [str(error)] * len(components)


class _RandomState:
    """The state of the generators that a call may draw from."""

    def __init__(self, generators: list[torch.Generator]) -> None:
        self._own = [(g, g.get_state()) for g in generators]
        self._host = torch.get_rng_state()
        used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._devices = torch.cuda.get_rng_state_all() if used else None

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _RandomState:
        return cls([x for x in pytree.tree_leaves((list(args), dict(kwargs))) if isinstance(x, torch.Generator)])

    def restore(self) -> None:
        """Put it back."""
        for generator, state in self._own:
            generator.set_state(state)
        torch.set_rng_state(self._host)
        if self._devices is not None:
            torch.cuda.set_rng_state_all(self._devices)
