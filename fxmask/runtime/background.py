"""Step graphs that compile in a thread of their own, while the original answers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)


class Background:
    """One compilation that nobody waits for.

    Args:
        compile_all: compiles every step graph. Where it fails, that is logged, and they compile at their first calls.
    """

    def __init__(self, compile_all: Callable[[], object]) -> None:
        self._compile_all = compile_all
        self._thread = threading.Thread(target=self._work, name="fxmask compile", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether the next run may use what was compiled."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Until it is over."""
        self._thread.join()

    def _work(self) -> None:
        try:
            with torch.no_grad():
                self._compile_all()
        except Exception:  # in a thread of its own: nobody else would hear of it
            logger.warning("compiling in the background failed; step graphs compile at their first calls", exc_info=True)
