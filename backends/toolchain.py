"""Whether this machine can compile."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch

from fxmask import _torch

OLDEST = (7, 0)  # compute capability that Triton generates code for


@functools.cache
def cpu_compiler_problem() -> str | None:
    """Why Inductor cannot compile C++ on this machine, or ``None`` if it can."""
    return _torch.cpp_compiler_problem()


@functools.cache
def gpu_compiler_problem() -> str | None:
    """Why Inductor cannot compile for an NVIDIA GPU on this machine, and what to do about it; ``None`` if it can.

    Triton builds the part of its launchers that is C with the machine's C compiler, against Python's headers.
    """
    if importlib.util.find_spec("triton") is None:
        package = "triton-windows" if sys.platform == "win32" else "triton"
        return f"triton is not installed. Install it (pip install {package})"
    if sys.platform != "win32" and not _c_compiler():
        return "Triton finds no C compiler. Install gcc or clang, or set CC"
    headers = sysconfig.get_paths()["include"]
    if sys.platform != "win32" and not (Path(headers) / "Python.h").exists():
        return f"there is no Python.h in {headers}, which Triton needs. Install Python's headers (python3-dev or python3-devel)"
    if torch.cuda.is_available() and not torch.version.hip and torch.cuda.get_device_capability() < OLDEST:
        major, minor = torch.cuda.get_device_capability()
        return (
            f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, and Triton begins at 7.0. Take another GPU"
        )
    return None


def _c_compiler() -> bool:
    return "CC" in os.environ or any(shutil.which(name) for name in ("gcc", "clang"))
