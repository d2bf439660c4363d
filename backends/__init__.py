"""Backends: graph -> callable. Installed as ``fxmask.backends``."""

from __future__ import annotations

if __name__ != "fxmask.backends":  # see passes/__init__.py
    raise ImportError(f"import fxmask.backends, not {__name__}")

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fxmask.backends.cudagraph import CudaCapturer
from fxmask.backends.eager import Eager
from fxmask.backends.inductor import Regions, WholeGraphs
from fxmask.backends.package import Packages
from fxmask.backends.protocol import Capturer, Compiler
from fxmask.errors import BackendError


@dataclass(frozen=True)
class Backend:
    """A way to run step graphs.

    Attributes:
        compilers: mode -> maker of a compiler for the step graphs of one program; the first mode is the default.
        exact: whether results have the bits of the program's own operators.
        capturer: maker of what records compiled steps, to be replayed; ``None`` if each step is called.
        insists: whether it is an error that nothing can be recorded where the model is.
    """

    compilers: dict[str, Callable[[], Compiler]]
    exact: bool = False
    capturer: Callable[[], Capturer] | None = None
    insists: bool = False

    def capturer_for(self, device: torch.device) -> Capturer | None:
        """What records steps on a device, if anything does.

        Raises:
            BackendError: nothing can be recorded there, which is all that this backend is for.
        """
        made = self.capturer() if self.capturer else None
        problem = made.problem(device) if made else None
        if problem is not None and self.insists:
            raise BackendError(f"{problem}; move the model and its inputs there, or use backend='auto'")
        return None if problem is not None else made

    def compiler(self, mode: str | None) -> Compiler:
        """A compiler of a mode, or of the default one.

        Raises:
            BackendError: there is no such mode.
        """
        if mode is not None and mode not in self.compilers:
            raise BackendError(f"unknown mode {mode!r}; choose one of {sorted(self.compilers)}")
        return self.compilers[mode or next(iter(self.compilers))]()


COMPILED: dict[str, Callable[[], Compiler]] = {"regions": Regions, "whole": WholeGraphs}
BACKENDS: dict[str, Backend] = {
    "auto": Backend(COMPILED, capturer=CudaCapturer),
    "inductor": Backend(COMPILED),
    "cudagraph": Backend(COMPILED, capturer=CudaCapturer, insists=True),
    "eager": Backend({"whole": Eager}, exact=True),
    "package": Backend({"auto": Packages}),
}


def get_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        BackendError: there is no backend of that name.
    """
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; choose one of {sorted(BACKENDS)}")
    return BACKENDS[name]
