"""Backends: graph -> callable. Installed as ``fxmask.backends``."""

from __future__ import annotations

if __name__ != "fxmask.backends":  # see passes/__init__.py
    raise ImportError(f"import fxmask.backends, not {__name__}")

from collections.abc import Callable
from dataclasses import dataclass

from fxmask.backends.cudagraph import CudaGraphs
from fxmask.backends.eager import Eager
from fxmask.backends.inductor import Regions, WholeGraphs
from fxmask.backends.package import Packages
from fxmask.backends.protocol import Compiler
from fxmask.errors import BackendError


@dataclass(frozen=True)
class Backend:
    """A way to run step graphs.

    Attributes:
        compilers: mode -> maker of a compiler for the step graphs of one program; the first mode is the default.
        exact: whether results have the bits of the program's own operators.
    """

    compilers: dict[str, Callable[[], Compiler]]
    exact: bool = False

    def compiler(self, mode: str | None) -> Compiler:
        """A compiler of a mode, or of the default one.

        Raises:
            BackendError: there is no such mode.
        """
        if mode is not None and mode not in self.compilers:
            raise BackendError(f"unknown mode {mode!r}; choose one of {sorted(self.compilers)}")
        return self.compilers[mode or next(iter(self.compilers))]()


BACKENDS: dict[str, Backend] = {
    "eager": Backend({"whole": Eager}, exact=True),
    "inductor": Backend({"regions": Regions, "whole": WholeGraphs}),
    "cudagraph": Backend({"regions": lambda: CudaGraphs(Regions()), "whole": lambda: CudaGraphs(WholeGraphs())}),
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
