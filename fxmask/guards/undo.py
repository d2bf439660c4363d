"""Putting a model's Python state back after it ran: whoever looks at a model must not change it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fxmask._torch import version_of
from fxmask.guards.state import Snapshot


class Undo:
    """Remembers attributes, containers and buffers of a model, and puts them back.

    Args:
        snapshot: of the model, as it is now.
        model: whose buffers are kept too; parameters are not written by a forward.

    Attributes:
        written: paths of the attributes and buffers that were different when they were put back.
    """

    def __init__(self, snapshot: Snapshot, model: torch.nn.Module) -> None:
        self._snapshot = snapshot
        self._copies = [(live, _copy(live)) for live in snapshot.held.live_containers()]
        self._kept_buffers = [(n, x, version_of(x), x.detach().clone()) for n, x in model.named_buffers() if not x.is_meta]
        self._model = model
        self.written: list[str] = []

    def restore(self) -> None:
        """Put everything back as it was."""
        changed = [(live, before) for live, before in self._copies if not _same(live, before)]
        if changed and not self.written:
            self.written = [str(change.path) for change in self._snapshot.changes(Snapshot.of(self._model))]
        for live, before in changed:
            _put_back(live, before)
        for name, buffer, version, value in self._kept_buffers:
            if version_of(buffer) != version != -1:
                buffer.copy_(value)
                self.written += [name] if name not in self.written else []
        self._kept_buffers = [(n, x, version_of(x), value) for n, x, _, value in self._kept_buffers]

    @contextmanager
    def after(self) -> Iterator[None]:
        """Whatever is done inside to the model's state is undone."""
        try:
            yield
        finally:
            self.restore()


def _copy(live: Any) -> Any:
    return dict(live) if isinstance(live, dict) else type(live)(live) if type(live) in (list, set, deque) else list(live)


def _same(live: Any, before: Any) -> bool:
    if len(live) != len(before):
        return False
    if isinstance(live, dict):
        return all(live.get(key, live) is value for key, value in before.items())
    if isinstance(live, set):
        return bool(live == before)
    return all(a is b for a, b in zip(live, before, strict=True))


def _put_back(live: Any, before: Any) -> None:
    if not isinstance(live, dict):
        live.clear()
        fill: Callable[[Any], None] = live.update if isinstance(live, set) else live.extend
        fill(before)
        return
    for key in [key for key in live if key not in before]:
        del live[key]
    live.update({key: value for key, value in before.items() if live.get(key, live) is not value})
