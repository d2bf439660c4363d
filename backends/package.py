"""Compile ahead of time: AOTInductor packages that hold no weights, and that need no compiler where they are loaded.

    part of a step graph --torch.export, Inductor--> part.pt2: kernels and the C++ that calls them, weights are arguments

A package takes about ten seconds more than compiling in memory, for C++ that every package has. So step graphs stay whole,
which is fastest, unless cutting them into regions at least halves the cost.
"""

from __future__ import annotations

import functools
import hashlib
import re
import shutil
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxmask._torch import aoti_compile, aoti_load, tracing
from fxmask.backends.archive import check_archive
from fxmask.backends.inductor import can_compile
from fxmask.backends.straight_line import chain_regions, restride
from fxmask.errors import BackendError
from fxmask.passes.merge_regions import Vocabulary
from fxmask.passes.split_regions import Region, structure

# Compiling a package costs as much as this many nodes, whatever is in it.
PACKAGE_NODES = 200

Strides = tuple[tuple[int, ...], ...]


class NotExportedError(BackendError):
    """A part was not exported, because it had no such form then."""


compilations = 0  # by this process; tests count them


@dataclass(frozen=True)
class Package:
    """A compiled part.

    Attributes:
        path: a ``.pt2`` file of AOTInductor.
        strides: of the arguments that it was compiled for.
    """

    path: Path
    strides: Strides


class Packages:
    """Parts of step graphs as AOTInductor packages; equal parts, of whatever step graph, are one package.

    Without a C++ compiler a CPU graph runs eagerly, with a warning.

    Args:
        known: packages by name, which are loaded and not compiled again.
        device: that they run on.
        closed: compile nothing; a part that is not known runs operator by operator, with a warning.

    Attributes:
        closed: whether nothing is compiled.
        missing: names of parts that are not known, if no others may be compiled.
    """

    def __init__(
        self, known: Mapping[str, Package] | None = None, device: torch.device | None = None, closed: bool = False
    ) -> None:
        self._known = dict(known or {})
        self._device = device
        self.closed = closed
        self._vocabulary = Vocabulary(PACKAGE_NODES)
        self._prepared = False
        self._parts: dict[str, _Part] = {}
        self._folder: Path | None = None  # for what is compiled; goes with this object
        self._warned = False
        self.missing: list[str] = []

    @property
    def packages(self) -> dict[str, Package]:
        """What was compiled or loaded so far, by name."""
        return {name: part.package for name, part in self._parts.items() if part.package is not None}

    def prepare(self, graph_modules: Sequence[fx.GraphModule]) -> None:
        """Choose the parts: regions if these cost at most half of what whole graphs cost, and then merged up to that half."""
        if self._prepared:
            return
        whole = self._vocabulary.uncut(graph_modules)
        if self._vocabulary.choose_merges(graph_modules, whole // 2) > whole // 2:
            self._vocabulary.choose_merges(graph_modules, whole)
        self._prepared = True

    def compile(self, graph_module: fx.GraphModule) -> Callable[..., Any]:
        """A callable whose parts are loaded now, or compiled at their first call."""
        if not self.closed and not can_compile(graph_module):
            return graph_module
        regions = self._vocabulary.split(graph_module)
        return chain_regions(graph_module, regions, [self._part(r.key, functools.partial(_graph_of, r)) for r in regions])

    def compile_once(self, graph_module: fx.GraphModule) -> Callable[..., Any]:
        """As ``compile``: what runs once per generation is in parts like those of the steps."""
        return self.compile(graph_module)

    def compile_batched(self, row: fx.GraphModule, num_steps: int, trace: Callable[[], fx.GraphModule]) -> Callable[..., Any]:
        """A callable that computes ``trace()``, which is ``row`` for all steps at once. It is traced only to be compiled.

        Raises:
            NotExportedError: it is not known, and nothing may be compiled.
        """
        if not self.closed and not can_compile(row):
            return trace()
        key = f"{num_steps} steps at once\n{structure(row)}"
        if self.closed and _name(key) not in self._known:
            raise NotExportedError("the timestep's values were not exported for all steps at once")
        return self._part(key, trace)

    def _part(self, key: str, trace: Callable[[], fx.GraphModule]) -> Callable[..., Any]:
        name = _name(key)
        if name not in self._parts and name in self._known:
            self._parts[name] = _Part(self._known[name].path, trace)
            self._parts[name].load(self._known[name], self._device)
        elif name not in self._parts and self.closed:
            self.missing.append(name)
            return functools.partial(self._run_eagerly, trace())
        elif name not in self._parts:
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="fxmask-"))
                weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            self._parts[name] = _Part(self._folder / f"{name}.pt2", trace)
        return self._parts[name]

    def _run_eagerly(self, graph_module: fx.GraphModule, *arguments: torch.Tensor) -> Any:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "a run that does not follow the exported plan (it starts in the middle, say) needs step graphs that were not "
                "exported; these run operator by operator, more slowly",
                stacklevel=2,
            )
        return graph_module(*arguments)


def _graph_of(region: Region) -> fx.GraphModule:
    return region.graph_module


def _name(key: str) -> str:
    """The name of a part. Which one of several GPUs it runs on is not in it."""
    return hashlib.sha256(re.sub(r"\b(cuda|xpu):\d+", r"\1", key).encode()).hexdigest()[:16]


class _Part:
    """A graph in a package, compiled at its first call if it is not loaded before."""

    def __init__(self, path: Path, trace: Callable[[], fx.GraphModule]) -> None:
        self._path = path
        self._trace = trace
        self._run: Callable[[list[torch.Tensor]], list[torch.Tensor]] | None = None
        self._strides: list[tuple[int, ...]] = []
        self._lock = threading.Lock()
        self._checked = False
        self.package: Package | None = None

    def load(self, package: Package, device: torch.device | None) -> None:
        """Use a package.

        Raises:
            BackendError: it is no package, or not for this machine.
        """
        self._strides = list(package.strides)
        self._run = load_package(package.path, device)
        self.package = package

    def __call__(self, *arguments: torch.Tensor) -> list[torch.Tensor]:
        """The graph's results."""
        if self._run is None:
            with self._lock:
                if self._run is None:
                    build_package(self._trace(), arguments, self._path)
                    place = next((x.device for x in arguments), None)
                    self.load(Package(self._path, tuple(x.stride() for x in arguments)), place)
        elif [x.stride() for x in arguments] != self._strides:
            self._check_layouts(arguments)
            arguments = tuple(map(restride, arguments, self._strides))
        assert self._run is not None
        self._checked = True
        return self._run(list(arguments))

    def _check_layouts(self, arguments: Sequence[torch.Tensor]) -> None:
        """Before the first call: compiled code that is given too little memory reads beyond it.

        Raises:
            BackendError: the part was compiled for arguments of other sizes.
        """
        if self._checked:
            return
        fits = len(arguments) == len(self._strides) and all(
            x.stride() == strides or _is_dense(x.shape, strides) for x, strides in zip(arguments, self._strides, strict=True)
        )
        if not fits:
            raise BackendError(f"{self._path} was compiled for arguments of other layouts; export the package again")


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements lie side by side, in whatever order of dimensions."""
    if len(shape) != len(strides):
        return False
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(shape, strides, strict=True) if size != 1):
        if stride != expected and 0 not in shape:
            return False
        expected *= size
    return True


def build_package(graph_module: fx.GraphModule, arguments: Sequence[torch.Tensor], path: Path) -> None:
    """Compile a graph for the shapes, types and layouts of these arguments.

    Raises:
        BackendError: Inductor cannot; says why.
    """
    global compilations
    compilations += 1
    try:
        with torch.no_grad():
            with tracing():
                exported = torch.export.export(graph_module, tuple(x.detach() for x in arguments), strict=False)
                aoti_compile(exported, path)
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise BackendError(f"a part of the step graphs cannot be compiled ahead of time: {reason}") from error


def load_package(path: Path, device: torch.device | None) -> Callable[[list[torch.Tensor]], list[torch.Tensor]]:
    """What a package computes, as a function of a list of arguments, which it empties.

    Raises:
        BackendError: it is no package, or not for this machine.
    """
    check_archive(path)
    index = -1 if device is None or device.index is None or device.type == "cpu" else device.index
    try:
        return aoti_load(path, index)
    except RuntimeError as error:
        raise BackendError(f"{path} cannot be loaded: {next(iter(str(error).splitlines()), '')}") from error
