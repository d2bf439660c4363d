"""How CUDA graphs are recorded and replayed, on an API of CUDA that only writes down what it is asked for."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fxmask.backends import cudagraph
from fxmask.errors import BackendError


class Cuda:
    """``torch.cuda`` as a log, with what PyTorch 2.11 keeps of a recording that could not be ended.

    Attributes:
        fails: whether recordings cannot be ended.
        inside: pools that the GPU's allocator is in; ``pinned`` those that the allocator of pinned memory is in.
        drawing: whether random numbers are those of a recording.
    """

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.device_now, self.streams, self.fails = 0, {}, False
        self.pools, self.drawing = 0, False
        self.inside: list[str] = []
        self.pinned: list[str] = []
        cuda = self

        class Stream:
            def __init__(self, device: Any = None) -> None:
                self.device = torch.device("cuda", cuda.device_now) if device is None else device
                self.name = f"stream {len(cuda.streams)} of {self.device}"
                cuda.streams[self.name] = self

            def wait_stream(self, other: Any) -> None:
                cuda.log.append(("wait", self.name, other.name))

            def wait_event(self, event: Any) -> None:
                cuda.log.append(("wait for event", self.name, event.after))

        class Event:
            after = ""

            def record(self, stream: Any) -> None:
                self.after = stream.name

        class CUDAGraph:
            def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
                cuda.drawing = True
                for places in (cuda.inside, cuda.pinned):
                    if pool in places:
                        raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
                    places.append(pool)
                self.pool = pool
                cuda.log.append(("begin", cuda.current_stream().name, pool, capture_error_mode))

            def capture_end(self) -> None:
                if cuda.fails:
                    raise RuntimeError("the recording was invalidated")
                if self.pool not in cuda.inside:
                    raise RuntimeError("it was ended before")
                cuda.inside.remove(self.pool)
                cuda.pinned.remove(self.pool)
                cuda.drawing = False
                cuda.log.append(("end", cuda.current_stream().name))

            def replay(self) -> None:
                cuda.log.append(("replay", cuda.current_stream().name))

        self.Stream, self.Event, self.CUDAGraph = Stream, Event, CUDAGraph
        self._current: dict[int, Any] = {}

    def current_stream(self, device: Any = None) -> Any:
        index = self.device_now if device is None else device.index
        if index not in self._current:
            self._current[index] = self.Stream(torch.device("cuda", index))
        return self._current[index]

    def current_device(self) -> int:
        return self.device_now

    @contextlib.contextmanager
    def device(self, device: Any) -> Any:
        before, self.device_now = self.device_now, device.index
        try:
            yield
        finally:
            self.device_now = before

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Any:
        before = self._current.get(stream.device.index)
        self._current[stream.device.index] = stream
        try:
            yield
        finally:
            self._current[stream.device.index] = before

    def graph_pool_handle(self) -> str:
        self.log.append(("pool",))
        self.pools += 1
        return f"pool {self.pools}"

    def leave_pool(self, device: Any, pool: str) -> bool:
        if pool not in self.inside:
            return False
        self.inside.remove(pool)
        self.log.append(("leave", pool))
        return True

    def is_current_stream_capturing(self) -> bool:
        return False


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    made = Cuda()
    fake = SimpleNamespace(
        cuda=made,
        device=torch.device,
        version=SimpleNamespace(hip=None),
        zeros=lambda *a, device: made.log.append(("zeros", device)),
    )
    monkeypatch.setattr(cudagraph, "torch", fake)
    monkeypatch.setattr(cudagraph, "leave_pool", made.leave_pool)
    cudagraph._place_of.cache_clear()
    yield made
    cudagraph._place_of.cache_clear()


FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


def note(cuda: Cuda, name: str) -> Any:
    return lambda: cuda.log.append((name, cuda.current_stream().name, cuda.device_now))


def test_a_recording(cuda):
    """Warm runs on the caller's stream; one run is recorded on another, into the pool, on the right device."""
    capturer = cudagraph.CudaCapturer()
    with capturer.ordered(SECOND):
        replay = capturer.record(note(cuda, "prepare"), note(cuda, "run"), SECOND)
        caller = cuda.current_stream(SECOND).name
    own = next(entry for entry in cuda.log if entry[0] == "run")
    assert [entry for entry in cuda.log if entry[0] == "prepare"] == [("prepare", caller, 1)] * 2
    assert own[1] != caller
    assert own[2] == 1
    assert [entry for entry in cuda.log if entry[0] == "begin"] == [("begin", own[1], "pool 1", "thread_local")] * 2
    at = cuda.log.index(own)
    assert cuda.log[at - 1][0] == "begin"
    assert cuda.log[at + 1] == ("end", own[1])
    assert ("wait", own[1], caller) in cuda.log[:at]
    assert cuda.log[-1] == ("wait", caller, own[1])
    with capturer.ordered(SECOND):
        replay()
    assert cuda.log[-1] == ("replay", caller)


def test_one_pool_for_all_recordings_of_a_device(cuda):
    """And one recording that stays, so that the pool does when all others have gone."""
    for _ in range(3):
        capturer = cudagraph.CudaCapturer()
        with capturer.ordered(FIRST):
            capturer.record(note(cuda, "prepare"), note(cuda, "run"), FIRST)
    assert cuda.log.count(("pool",)) == 1
    assert len([entry for entry in cuda.log if entry[0] == "zeros"]) == 1
    with cudagraph.CudaCapturer().ordered(SECOND):
        cudagraph.CudaCapturer().record(note(cuda, "prepare"), note(cuda, "run"), SECOND)
    assert cuda.log.count(("pool",)) == 2


def test_streams_wait_for_each_other(cuda):
    """What two streams replay shares memory; on one stream order is a matter of course."""
    capturer = cudagraph.CudaCapturer()
    a, b = cuda.Stream(FIRST), cuda.Stream(FIRST)
    for stream in (a, a, b, b, a):
        with cuda.stream(stream), capturer.ordered(FIRST):
            cuda.log.append(("work", stream.name))
    waits = [entry for entry in cuda.log if entry[0] == "wait for event"]
    assert waits == [("wait for event", b.name, a.name), ("wait for event", a.name, b.name)]


def test_threads_come_one_after_the_other(cuda):
    capturer = cudagraph.CudaCapturer()
    inside, most = [], []

    def work() -> None:
        for _ in range(50):
            with capturer.ordered(FIRST):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1


def test_what_cannot_be_recorded(cuda):
    """The first error is told; allocators, random numbers and later recordings are as if there had been none."""
    capturer = cudagraph.CudaCapturer()
    with capturer.ordered(FIRST):
        capturer.record(note(cuda, "prepare"), note(cuda, "run"), FIRST)

    def waits() -> None:
        cuda.fails = True
        raise RuntimeError("operation not permitted when stream is capturing")

    def no_longer(*_: Any) -> bool:
        cuda.fails = False
        return leave(*_)

    leave, cudagraph.leave_pool = cuda.leave_pool, no_longer  # type: ignore[attr-defined]
    for k in range(2):
        with (
            capturer.ordered(FIRST),
            pytest.raises(BackendError, match="could not be recorded as a CUDA graph: operation not permitted"),
        ):
            capturer.record(note(cuda, "prepare"), waits, FIRST)
        assert ("leave", f"pool {k + 1}") in cuda.log
        assert not cuda.inside
        assert not cuda.drawing, "who draws random numbers would get an error"
        with capturer.ordered(FIRST):
            capturer.record(note(cuda, "prepare"), note(cuda, f"run {k}"), FIRST)
        assert any(entry[0] == f"run {k}" for entry in cuda.log)
    assert cuda.pools == 3


def test_nothing_can_be_recorded_any_more(cuda):
    """Recovering fails too: the error is the first one, and the next recording tries again."""
    capturer = cudagraph.CudaCapturer()

    def breaks() -> None:
        cuda.fails = True
        raise RuntimeError("the first one")

    for fails in (False, True):  # with and without a recording before
        cuda.fails = fails
        with capturer.ordered(FIRST), pytest.raises(BackendError, match="invalidated" if fails else "the first one"):
            capturer.record(note(cuda, "prepare"), breaks, FIRST)
    cuda.fails = False
    with capturer.ordered(FIRST):
        capturer.record(note(cuda, "prepare"), note(cuda, "run"), FIRST)
    assert not cuda.inside
    assert not cuda.drawing


def test_a_mistake_that_ends_nothing(cuda):
    """An error of Python's leaves the recording as it was: it is ended, and the pool is kept."""
    capturer = cudagraph.CudaCapturer()

    def breaks() -> None:
        raise RuntimeError("shapes do not fit")

    with capturer.ordered(FIRST), pytest.raises(BackendError, match="shapes do not fit"):
        capturer.record(note(cuda, "prepare"), breaks, FIRST)
    assert (cuda.pools, cuda.inside, cuda.pinned, cuda.drawing) == (1, [], [], False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_what_cannot_be_recorded_on_a_gpu():
    """What waits cannot; afterwards random numbers are drawn, memory is allocated and steps are recorded as before."""
    capturer, device = cudagraph.CudaCapturer(), torch.device("cuda", torch.cuda.current_device())
    x, out = torch.randn(64, 64, device=device), torch.zeros(64, 64, device=device)
    with capturer.ordered(device):
        before = capturer.record(lambda: None, lambda: out.copy_(x + 1), device)
    for k in range(3):
        with capturer.ordered(device), pytest.raises(BackendError, match="could not be recorded as a CUDA graph"):
            capturer.record(lambda: None, lambda: out.fill_((x @ x).sum().item()), device)
        assert torch.randn(8, device=device).isfinite().all()
        pinned = torch.empty(8, pin_memory=True)
        large = torch.ones(2**22, device=device)
        assert pinned.copy_(large[:8]).eq(1).all()
        own = [s for s in torch.cuda.memory_snapshot() if s["address"] <= large.data_ptr() < s["address"] + s["total_size"]]
        assert [s["segment_pool_id"] for s in own] == [(0, 0)], "it lies in no pool of recordings"
        with capturer.ordered(device):
            replay = capturer.record(lambda: x @ x, lambda k=k: out.copy_(x @ x + k), device)
            replay()
        assert torch.allclose(out, x @ x + k, atol=1e-3)
        with capturer.ordered(device):
            before()
        assert torch.equal(out, x + 1)


def test_where_nothing_can_be_recorded(cuda):
    capturer = cudagraph.CudaCapturer()
    assert capturer.problem(FIRST) is None
    assert "NVIDIA GPU, and the model is on cpu" in str(capturer.problem(torch.device("cpu")))
    cudagraph.torch.version.hip = "6.0"
    assert "AMD" in str(capturer.problem(FIRST))
