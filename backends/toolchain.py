"""Whether this machine can compile."""

from __future__ import annotations

import functools

from fxmask import _torch


@functools.cache
def cpu_compiler_problem() -> str | None:
    """Why Inductor cannot compile C++ on this machine, or ``None`` if it can."""
    return _torch.cpp_compiler_problem()
