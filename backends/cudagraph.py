"""Replay step graphs as CUDA graphs: one captured graph per step graph, without Python or launches inside.

    arguments --copy--> static inputs --replay--> static outputs --copy--> results

A replay overwrites its outputs, and all captured graphs share one memory pool, so nothing that a replay owns is handed out:
results are copied to memory of their own, caches among them, and caches are copied in like any other argument. Weights are
read where they are: a change in place needs no new capture.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import fx

from fxmask.backends.inductor import Regions
from fxmask.backends.protocol import Compiler
from fxmask.errors import BackendError

WARM_UPS = 2  # runs before a capture: what is compiled or allocated at a first call must not be captured

Tensors = Sequence[torch.Tensor]


class Capturer(Protocol):
    """Records a function's work on static memory."""

    def record(self, run: Callable[..., Tensors], inputs: Tensors) -> tuple[Callable[[], None], Tensors]:
        """A function that does the recorded work again, and the tensors that it writes its results to."""


class CudaCapturer:
    """Records CUDA graphs into one memory pool."""

    def __init__(self) -> None:
        self._pool: Any = None

    def record(self, run: Callable[..., Tensors], inputs: Tensors) -> tuple[Callable[[], None], Tensors]:
        """Capture ``run(*inputs)``.

        Raises:
            BackendError: the inputs are not on an NVIDIA GPU, or the capture failed; says why.
        """
        devices = {x.device for x in inputs}
        if len(devices) != 1 or next(iter(devices)).type != "cuda":
            raise BackendError(
                f"backend='cudagraph' needs every tensor on one NVIDIA GPU, these are on {sorted(map(str, devices))}; "
                "move the model and its inputs there, or use backend='inductor'"
            )
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    run(*inputs)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, pool=self._pool):
                outputs = run(*inputs)
        except RuntimeError as error:
            raise BackendError(f"a step graph could not be captured as a CUDA graph: {error}") from error
        return graph.replay, outputs


class CudaGraphs:
    """Compiles with Inductor, then captures.

    Args:
        inner: compiles the graphs that are captured.
        capturer: captures them.
    """

    def __init__(self, inner: Compiler | None = None, capturer: Capturer | None = None) -> None:
        self._inner = inner or Regions()
        self._capturer = capturer or CudaCapturer()
        self._lock = threading.Lock()  # captured graphs share their memory: one runs at a time

    @property
    def layouts(self) -> Any:
        """The weights that the inner compiler laid out, if it did."""
        return getattr(self._inner, "layouts", None)

    def prepare(self, graph_modules: Sequence[fx.GraphModule]) -> None:
        """See all step graphs of a plan before the first of them is compiled."""
        self._inner.prepare(graph_modules)

    def compile(self, graph_module: fx.GraphModule) -> Callable[..., Any]:
        """A callable that captures at its first call."""
        return _Captured(self._inner.compile(graph_module), self._capturer, self._lock)


class _Captured:
    """A step graph behind static inputs and outputs."""

    def __init__(self, run: Callable[..., Tensors], capturer: Capturer, lock: threading.Lock) -> None:
        self._run = run
        self._capturer = capturer
        self._lock = lock
        self._inputs: list[torch.Tensor] = []
        self._outputs: Tensors = ()
        self._replay: Callable[[], None] | None = None

    def __call__(self, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The results, in memory that no replay owns."""
        with self._lock:
            if self._replay is None:
                self._inputs = [x.clone() for x in arguments]
                self._replay, self._outputs = self._capturer.record(self._run, self._inputs)
            before = getattr(self._run, "before", None)
            if before is not None:  # Python that is in no recording: weights that changed are laid out again
                before()
            for static, x in zip(self._inputs, arguments, strict=True):
                static.copy_(x, non_blocking=True)
            self._replay()
            return tuple(x.clone() for x in self._outputs)
