"""The denoiser as capture runs it: again and again, in the form of a shadow, so that it stays as it was before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fxmask._torch import pytree, version_of
from fxmask.errors import CaptureError
from fxmask.frontend.shadow import shadow_of
from fxmask.guards.ambient import Ambient
from fxmask.guards.state import Snapshot
from fxmask.guards.undo import Undo
from fxmask.guards.values import closed, opened

ATTEMPTS = 5  # at a copy of a model that other threads change


class Subject:
    """A denoiser that can be run without a trace of it: its shadow runs, on copies of the arguments.

    Attributes:
        original: the denoiser.
        model: its shadow, with the same weights; its Python state is put back after each run.
        snapshot: the original's Python state, as the shadow has it.
        ambient: the modes around it.
        writes: arguments that it has changed in place, by name.

    Raises:
        CaptureError: another thread keeps changing the denoiser's Python state.
    """

    def __init__(self, model: torch.nn.Module, device: str) -> None:
        self.original = model
        self.snapshot, self.model = _look(model)
        self.ambient = Ambient.now(device)
        self.writes: list[str] = []
        self._undo = Undo(Snapshot.of(self.model), self.model)

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
        """What is done to the shadow's Python state inside, and to buffers, is undone."""
        with self._undo.after():
            yield

    @property
    def written_state(self) -> list[str]:
        """Attributes of its own that the model changes when it runs."""
        return self._undo.written


def _look(model: torch.nn.Module) -> tuple[Snapshot, torch.nn.Module]:
    """The state of a model, and a shadow that has just that, also while other threads run the model."""
    changes: list[str] = []
    for _ in range(ATTEMPTS):
        try:
            snapshot = Snapshot.of(model)
            shadow = shadow_of(model)
        except RuntimeError as error:  # a dictionary changed its size while it was read
            if "changed size during iteration" not in str(error) and "mutated during iteration" not in str(error):
                raise
            continue
        if snapshot.held.same():
            return snapshot, shadow
        changes = [str(change) for change in snapshot.changes(Snapshot.of(model))]
        if not changes:  # objects that are made anew at each look
            return snapshot, shadow
    raise CaptureError(
        f"the state of {type(model).__name__} changes while it is captured ({', '.join(changes[:3])}): another thread runs it "
        "or sets something on it. Capture it before it is run, or have what changes passed as an argument"
    )


def _copies(arguments: Mapping[str, Any]) -> dict[str, Any]:
    copies: dict[str, Any] = closed(pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, opened(dict(arguments))))
    return copies


def _versions(value: Any) -> list[int]:
    return [version_of(x) for x in pytree.tree_leaves(opened(value)) if isinstance(x, torch.Tensor)]
