"""One bar for the step graphs of a program, whenever they are compiled: all at once, or each at its first call."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

from tqdm.auto import tqdm

TITLE, UNIT = "compiling step graphs", "graph"


class CompileBar:
    """Counts first calls of step graphs, which is when they compile.

    Args:
        shown: whether first calls have a bar where nobody asked for all of them; may be set later.
    """

    def __init__(self, shown: bool = False) -> None:
        self.shown = shown
        self._called: set[Hashable] = set()
        self._bar: Any = None
        self._held = False
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def holding(self, keys: Sequence[Hashable], shown: bool) -> Iterator[None]:
        """Inside, all of these graphs are called; the bar is shown or not.

        Args:
            keys: of the graphs.
            shown: whether there is a bar.
        """
        with self._lock:
            self._close()
            self._open(keys, shown)
            self._held = True
        try:
            yield
        finally:
            with self._lock:
                self._held = False
                self._close()

    def first_call(self, key: Hashable, keys: Sequence[Hashable], run: Callable[..., Any]) -> Callable[..., Any]:
        """``run``, counted if it was not called before.

        Args:
            key: of its graph.
            keys: of all graphs of the plan.
            run: what a backend made of the graph.
        """
        if key in self._called:
            return run

        def counted(*arguments: Any) -> Any:
            with self._lock:
                if self._bar is None:
                    self._open(keys, self.shown)
            results = run(*arguments)
            with self._lock:
                self._count(key, keys)
            return results

        return counted

    def _open(self, keys: Sequence[Hashable], shown: bool) -> None:
        left = len(set(keys) - self._called)
        self._bar = tqdm(total=left, desc=TITLE, unit=UNIT, disable=not shown or not left, dynamic_ncols=True)
        self._bar.refresh()

    def _count(self, key: Hashable, keys: Sequence[Hashable]) -> None:
        if key in self._called:
            return
        self._called.add(key)
        if self._bar is not None:
            self._bar.update()
            if not self._held and self._called.issuperset(keys):
                self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
