"""Record work on an NVIDIA GPU as CUDA graphs.

All graphs of a device share one memory pool, whichever model they belong to. Nothing that a graph leaves in the pool is read
after its replay, so the pool is as large as the largest graph needs, and replays must come one after the other: one thread at
a time launches them, and a stream waits for the one that the last was launched on.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fxmask._torch import leave_pool
from fxmask.errors import BackendError

WARM_UPS = 2  # runs before a recording: what is compiled, tuned or allocated at a first call must not be recorded


class CudaCapturer:
    """Records CUDA graphs, each on the device that its memory is on."""

    def problem(self, device: torch.device) -> str | None:
        """Why nothing can be recorded on a device, or ``None``."""
        if device.type != "cuda":
            return f"CUDA graphs need every tensor on one NVIDIA GPU, and the model is on {device}"
        if torch.version.hip is not None:
            return "CUDA graphs are recorded on NVIDIA GPUs only, and this PyTorch is built for AMD's"
        return None

    def is_idle(self, device: torch.device) -> bool:
        """Whether nobody else is recording the current stream."""
        return not torch.cuda.is_current_stream_capturing()

    def ordered(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """What is done inside comes after all that was done inside before, on whatever stream and in whatever thread."""
        return _place(device).ordered()

    def record(self, prepare: Callable[[], None], run: Callable[[], None], device: torch.device) -> Callable[[], None]:
        """Record ``run`` without doing it.

        Raises:
            BackendError: it cannot be recorded; says why.
        """
        try:
            return _place(device).record(prepare, run)
        except RuntimeError as error:  # out of memory among them
            raise BackendError(f"a step graph could not be recorded as a CUDA graph: {error}") from error


class _Place:
    """What the recordings of one device share."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.RLock()
        self._pool: Any = None
        self._held: Any = None  # keeps the pool alive while no other graph does
        self._failed: list[Any] = []  # recordings that could not be ended
        self._stream: Any = None  # where recordings are made
        self._latest: Any = None  # the stream that the last replay was launched on
        self._done: Any = None  # when that will be over

    @contextlib.contextmanager
    def ordered(self) -> Iterator[None]:
        with self._lock, torch.cuda.device(self._device):
            stream = torch.cuda.current_stream(self._device)
            if self._latest is not None and self._latest != stream:
                stream.wait_event(self._done)
            try:
                yield
            finally:
                if self._done is None:
                    self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._done.record(stream)
                self._latest = stream

    def record(self, prepare: Callable[[], None], run: Callable[[], None]) -> Callable[[], None]:
        if self._held is None:
            self._open_pool()
        graph = self._recorded(prepare, run)
        return graph.replay  # type: ignore[no-any-return]

    def _open_pool(self) -> None:
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._held = self._recorded(lambda: None, lambda: torch.zeros(1, device=self._device))

    def _recover(self, graph: Any) -> None:
        """Put right what PyTorch leaves behind when a recording could not be ended.

        Its allocators stay in the pool: that of the GPU can be told to leave it, that of pinned memory cannot, refuses to
        record into this pool ever again, and goes on asking the graph. The GPU's random numbers stay those of a recording, and
        to draw any is an error, until another recording has ended well. So there is another pool, with a recording in it.
        """
        if not leave_pool(self._device, self._pool):
            return
        self._failed.append(graph)
        again, self._held = self._held is not None, None
        if again:
            with contextlib.suppress(RuntimeError):  # then the next recording tries it again
                self._open_pool()

    def _recorded(self, prepare: Callable[[], Any], run: Callable[[], Any]) -> Any:
        # Not on the stream that records: a library's workspace for that one must come from the pool of the recordings, or it
        # could be given to somebody else while they still use it.
        for _ in range(WARM_UPS):
            prepare()
        current = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                # Only this thread's work is recorded, and only its mistakes end the recording: others go on allocating.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    run()
                    graph.capture_end()
                except BaseException:
                    with contextlib.suppress(RuntimeError):  # the first error is the one to tell
                        graph.capture_end()
                    raise
        except BaseException:
            self._recover(graph)
            raise
        current.wait_stream(self._stream)
        return graph


@functools.cache
def _place_of(kind: str, index: int) -> _Place:
    return _Place(torch.device(kind, index))


def _place(device: torch.device) -> _Place:
    return _place_of(device.type, torch.cuda.current_device() if device.index is None else device.index)
