"""The bar that learning shows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from tqdm.auto import tqdm


class Progress:
    """Counts rollouts, and shows the best plan so far.

    Args:
        shown: whether there is a bar.
    """

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._bar: Any = None

    @contextlib.contextmanager
    def bar(self, title: str) -> Iterator[None]:
        """Show a bar inside."""
        with tqdm(total=None, desc=title, unit="rollout", disable=not self._shown) as bar:
            self._bar = bar
            yield

    def tick(self) -> None:
        """One rollout more."""
        if self._bar is not None:
            self._bar.update()

    def show(self, **best: str) -> None:
        """What is known of the best plan."""
        if self._bar is not None:
            self._bar.set_postfix(best, refresh=False)
