"""Seconds of a call."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def timed(run: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds of a call, work on a GPU included, and its result."""
    _synchronize()
    started = time.perf_counter()
    result = run(*arguments)
    _synchronize()
    return time.perf_counter() - started, result


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
