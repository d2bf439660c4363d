"""The denoiser as capture runs it: again and again, and afterwards it is as it was before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fxmask._torch import pytree, version_of, without_compiled_calls
from fxmask.guards.ambient import Ambient
from fxmask.guards.state import Snapshot
from fxmask.guards.undo import Undo
from fxmask.guards.values import closed, opened


class Subject:
    """A denoiser that can be run without a trace of it: on copies of its arguments, its own state put back afterwards.

    Attributes:
        model: the denoiser.
        snapshot: its Python state, as it was at first.
        ambient: the modes around it.
        writes: arguments that it has changed in place, by name.
    """

    def __init__(self, model: torch.nn.Module, device: str) -> None:
        self.model = model
        self.snapshot = Snapshot.of(model)
        self.ambient = Ambient.now(device)
        self.writes: list[str] = []
        self._undo = Undo(self.snapshot, model)

    def __call__(self, arguments: Mapping[str, Any]) -> Any:
        """What the model returns for arguments by name."""
        copies = _copies(arguments)
        versions = {name: _versions(value) for name, value in copies.items()}
        with self.untouched():
            result = self.model(**copies)
        self.writes += [n for n, value in copies.items() if _versions(value) != versions[n] and n not in self.writes]
        return result

    def twice(self, first: Mapping[str, Any], second: Mapping[str, Any]) -> Any:
        """What the model returns for ``second`` right after it was called with ``first``."""
        with self.untouched():
            self.model(**_copies(first))
            return self.model(**_copies(second))

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """What is done to the model's Python state inside is undone; what ``module.compile()`` compiled runs as written."""
        with self._undo.after(), without_compiled_calls(self.model):
            yield

    @property
    def written_state(self) -> list[str]:
        """Attributes of its own that the model changes when it runs."""
        return self._undo.written


def _copies(arguments: Mapping[str, Any]) -> dict[str, Any]:
    copies: dict[str, Any] = closed(pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, opened(dict(arguments))))
    return copies


def _versions(value: Any) -> list[int]:
    return [version_of(x) for x in pytree.tree_leaves(opened(value)) if isinstance(x, torch.Tensor)]
