"""Kernels are timed, not launches: on a GPU that is not there, with a queue and clocks of its own."""

from __future__ import annotations

import pytest
import torch

import fxmask
from fxmask.backends.inductor import Compiled
from fxmask.backends.toolchain import cpu_compiler_problem
from fxmask.learning import prices, stopwatch
from fxmask.learning.stopwatch import AHEAD, LONGEST, SHORTEST, CudaEvents, EventStopwatch, HostStopwatch, stopwatch_for
from fxmask.passes import choose_layouts

LAUNCH, EVENT = 20e-6, 2e-6  # seconds of the host


class Gpu:
    """Kernels run in order, each when it was launched and the one before it is done."""

    def __init__(self):
        self.host = self.free = 0.0
        self.waits = 0
        self.occupied = []

    def kernel(self, seconds, launch=LAUNCH):
        self.host += launch
        self.free = max(self.free, self.host) + seconds

    def record(self):
        self.host += EVENT
        self.free = max(self.free, self.host)
        return self.free

    def occupy(self, seconds):
        self.occupied.append(seconds)
        self.kernel(seconds)

    def wait(self):
        self.waits += 1
        self.host = max(self.host, self.free)

    def between(self, first, second):
        return second - first


def sweep(gpu, watch, kernels, launch=LAUNCH):
    for seconds in kernels:
        watch.time(gpu.kernel, seconds, launch)
    return watch.seconds()


def test_kernels_without_their_launches():
    gpu = Gpu()
    watch = EventStopwatch(gpu, lambda: gpu.host)
    kernels = [1e-6, 5e-6, 1e-3] * 40
    for _ in range(3):
        assert sweep(gpu, watch, kernels) == pytest.approx(kernels, rel=1e-6)
    assert gpu.waits == 3, "once for each sweep"
    assert len(gpu.occupied) == 3 * -(-len(kernels) // AHEAD)


def test_the_simulated_gpu_is_bound_by_launches():
    """What the test above would find if nothing kept the device busy: about the host's time."""
    gpu = Gpu()
    gpu.occupy = lambda seconds: None
    watch = EventStopwatch(gpu, lambda: gpu.host)
    assert min(sweep(gpu, watch, [1e-6] * 10)) > LAUNCH


def test_the_device_is_kept_busy_for_as_long_as_launching_takes():
    gpu = Gpu()
    watch = EventStopwatch(gpu, lambda: gpu.host)
    sweep(gpu, watch, [1e-6] * 3, launch=10.0)  # compiles
    assert gpu.occupied[-1] == LONGEST
    sweep(gpu, watch, [1e-6] * AHEAD, launch=1e-4)
    assert gpu.occupied[-1] == LONGEST, "no longer, whatever compiling took"
    assert sweep(gpu, watch, [1e-6] * AHEAD, launch=1e-4) == pytest.approx([1e-6] * AHEAD)
    assert gpu.occupied[-1] == pytest.approx(2 * AHEAD * (1e-4 + 2 * EVENT))
    sweep(gpu, watch, [1e-6])
    sweep(gpu, watch, [1e-6])
    assert gpu.occupied[-1] == SHORTEST
    assert watch.seconds() == []


def test_by_the_host():
    watch = HostStopwatch()
    assert watch.time(lambda a, b: a + b, 1, 2) == 3
    watch.time(lambda: None)
    assert len(watch.seconds()) == 2
    assert watch.seconds() == []


def test_which_one():
    assert isinstance(stopwatch_for(torch.device("cpu")), HostStopwatch)
    assert isinstance(stopwatch_for(torch.device("cuda")), EventStopwatch)


def test_cuda_events(monkeypatch):
    """What is asked of CUDA, in order."""
    asked = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            asked.append(("record", stream))

        def elapsed_time(self, other):
            return 2.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: asked.append(("wait", device)))
    monkeypatch.setattr(stopwatch, "occupy_gpu", lambda device, seconds: asked.append(("occupy", device)))
    device = torch.device("cuda", 1)
    watch = EventStopwatch(CudaEvents(device))
    watch.time(lambda: asked.append(("run", None)))
    assert watch.seconds() == [0.002]
    stream = "stream of cuda:1"
    assert asked == [("occupy", device), ("record", stream), ("run", None), ("record", stream), ("wait", device)]


def test_prices_wait_once_for_each_sweep(tiny, monkeypatch):
    """Each operator takes a second here, and a part as long as it has places in the queue: two."""
    gpu = Gpu()
    monkeypatch.setattr(gpu, "between", lambda first, second: 1.0)
    monkeypatch.setattr(prices, "stopwatch_for", lambda device: EventStopwatch(gpu))
    found = prices.measure_latency(tiny, "eager", repeats=2)
    assert gpu.waits == 3 + 3, "operators alone, then parts"
    regions, segments = prices._parts(tiny.graph_module, prices.joins(tiny))
    assert sum(found.values()) == pytest.approx(len(regions))
    for segment in segments:
        assert sum(found[node.name] for node in segment) == pytest.approx(1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_prices_on_a_gpu():
    """The sum over a part's kernels is near what many of them take, one after the other."""
    device = torch.device("cuda")
    x = torch.randn(2048, 2048, device=device)
    watch = stopwatch_for(device)
    for _ in range(2):
        for _ in range(50):
            watch.time(torch.mm, x, x)
            watch.time(torch.add, x[:8, :8], 1)
        seconds = watch.seconds()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(50):
        torch.mm(x, x)
    end.record()
    torch.cuda.synchronize()
    assert sum(seconds[::2]) == pytest.approx(start.elapsed_time(end) / 1000, rel=0.25)
    assert max(sorted(seconds[1::2])[:40]) < 15e-6, "no launches"


class Images(torch.nn.Module):
    """A residual branch of a convolution, and a view that channels-last images do not have."""

    def __init__(self):
        super().__init__()
        self.inp, self.out = torch.nn.Conv2d(2, 8, 3, padding=1), torch.nn.Conv2d(8, 2, 3, padding=1)
        self.branch = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Conv2d(8, 8, 3, padding=1))
        self.mix = torch.nn.Linear(8 * 6 * 4, 8)

    def forward(self, x, t):
        x = self.inp(x) + t.reshape(-1, 1, 1, 1).to(x.dtype) / 1000
        x = x + self.branch(x)
        return self.out(x + self.mix(x.view(len(x), -1))[:, :, None, None])


@pytest.mark.skipif(cpu_compiler_problem() is not None, reason="no C++ compiler")
def test_parts_are_priced_with_the_weights_that_the_backend_lays_out(monkeypatch):
    """As on a GPU: convolutions are given weights that are channels-last, and names of nodes are the program's."""
    monkeypatch.setattr(choose_layouts, "prefers_channels_last", lambda graph_module: True)
    torch.manual_seed(0)
    program = fxmask.capture(Images().eval(), {"x": torch.randn(2, 2, 6, 4), "t": torch.tensor([500, 500])})
    compiled = []

    class Noting(Compiled):
        def __init__(self, graph_module, weights, strides=None):
            super().__init__(graph_module, weights, strides)
            compiled.append(self)

    monkeypatch.setattr(prices, "Compiled", Noting)
    found = prices.measure_latency(program, "inductor", repeats=1)
    assert set(found) == {node.name for node in program.graph_module.graph.nodes}
    weights = [n.args[1] for part in compiled for n in part.graph_module.graph.nodes if "conv2d" in str(n.target)]
    strides = [n.meta["val"].stride() for n in weights if n.meta["val"].shape[1] > 1 and n.meta["val"].shape[2] > 1]
    assert strides
    assert all(s[1] == 1 for s in strides)
    convolutions = [n.name for n in program.graph_module.graph.nodes if "conv2d" in str(n.target)]
    assert all(found[name] > 0 for name in convolutions)
