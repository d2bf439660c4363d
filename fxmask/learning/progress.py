"""The bar that learning shows: work done of the work that there may be, the time left, and the best plan so far."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from tqdm.auto import tqdm

FORM = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f} of at most {total:.0f} sampling runs [{elapsed}<{remaining}{postfix}]"


class Progress:
    """Follows the units of work, and shows the best plan so far.

    Args:
        shown: whether there is a bar.
    """

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._bar: Any = None
        self._spent: Callable[[], float] = float

    @contextlib.contextmanager
    def bar(self, title: str, total: float, spent: Callable[[], float]) -> Iterator[None]:
        """Show a bar inside; inside of another one, that one goes on.

        Args:
            title: what is learned.
            total: units of work at most.
            spent: units until now.
        """
        if self._bar is not None:
            yield
            return
        began = spent()
        with tqdm(total=total, desc=title, bar_format=FORM, disable=not self._shown, dynamic_ncols=True) as bar:
            self._bar, self._spent = bar, lambda: spent() - began
            try:
                yield
                self.tick()
                bar.total = max(bar.n, 1e-9)  # it ends where the work ended
                bar.refresh()
            finally:
                self._bar = None

    def tick(self) -> None:
        """Some work was done."""
        if self._bar is not None:
            done = self._spent()
            self._bar.total = max(self._bar.total, done)
            self._bar.update(done - self._bar.n)

    def show(self, **best: str) -> None:
        """What is known of the best plan."""
        if self._bar is not None:
            self._bar.set_postfix(best, refresh=False)
