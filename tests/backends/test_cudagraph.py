"""Replayed step graphs: nothing that a replay owns leaves it. The capturer is a stand-in without a GPU."""

from __future__ import annotations

import pytest
import torch
from conftest import TIMESTEPS, TinyTransformer, every_other, make_calls

import fxmask
from fxmask.backends import BACKENDS, Backend
from fxmask.backends.cudagraph import CudaGraphs
from fxmask.backends.eager import Eager


class FakeRecorder:
    """What CUDA graphs do, on a CPU: results land in the same memory each time, and all graphs share one pool."""

    def __init__(self) -> None:
        self.recorded = 0
        self.pool: list[torch.Tensor] = []

    def record(self, run, inputs):
        self.recorded += 1
        outputs = [x.clone() for x in run(*inputs)]
        self.pool += outputs

        def replay():
            for other in self.pool:  # another graph's results are overwritten too
                if other.is_floating_point():
                    other.fill_(float("nan"))
            for static, value in zip(outputs, run(*inputs), strict=True):
                static.copy_(value)

        return replay, outputs


@pytest.fixture
def capturer(monkeypatch):
    made = FakeRecorder()
    monkeypatch.setitem(BACKENDS, "cudagraph", Backend({"whole": lambda: CudaGraphs(Eager(), made)}, exact=True))
    return made


def test_replays_and_caching_go_together(tiny, capturer):
    mask = every_other(tiny)
    accelerated = fxmask.compile(tiny, fxmask.rectify(tiny, mask), backend="cudagraph")
    for seed in (0, 1):  # the second run replays what the first one captured
        calls = make_calls(seed=seed)
        expected = fxmask.reference.run(tiny, mask, calls)
        with accelerated.generation():
            got = [accelerated(**call) for call in calls]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert capturer.recorded == accelerated.plan.distinct_graphs == 2


def test_results_are_the_callers(tiny, capturer):
    mask = every_other(tiny)
    accelerated = fxmask.compile(tiny, fxmask.rectify(tiny, mask), backend="cudagraph")
    calls = make_calls()
    expected = fxmask.reference.run(tiny, mask, calls)
    with accelerated.generation():
        for call, want in zip(calls, expected, strict=True):
            got = accelerated(**call)
            assert torch.equal(got, want)
            got.fill_(float("nan"))


def test_interleaved_generations_share_captured_graphs(tiny, capturer):
    mask = every_other(tiny)
    accelerated = fxmask.compile(tiny, fxmask.rectify(tiny, mask), backend="cudagraph")
    runs = [make_calls(seed=seed) for seed in (0, 1)]
    expected = [fxmask.reference.run(tiny, mask, calls) for calls in runs]
    generations = [accelerated.generation() for _ in runs]
    for step in range(len(TIMESTEPS)):
        for generation, calls, want in zip(generations, runs, expected, strict=True):
            with generation:
                assert torch.equal(accelerated(**calls[step]), want[step])


def test_weights_changed_in_place_are_seen(capturer):
    torch.manual_seed(0)
    model = TinyTransformer().eval()
    program = fxmask.capture(model, make_calls()[0])
    mask = every_other(program)
    accelerated = fxmask.compile(program, fxmask.rectify(program, mask), backend="cudagraph")
    [accelerated(**call) for call in make_calls()]
    captured = capturer.recorded
    with torch.no_grad():
        for p in model.parameters():
            p.data.mul_(1.1)
    expected = fxmask.reference.run(program, mask, make_calls())
    with accelerated.generation():
        assert all(torch.equal(accelerated(**c), want) for c, want in zip(make_calls(), expected, strict=True))
    assert capturer.recorded == captured


def test_copies_of_weights_are_brought_up_to_date(tiny, monkeypatch):
    """A recording reads copies of weights that were laid out; no Python of the inner compiler runs in a replay."""
    events = []

    class Layouts:
        def refresh(self) -> None:
            events.append("refresh")

    class Following(Eager):
        layouts = Layouts()

        def compile(self, graph_module):
            def run(*arguments):
                return graph_module(*arguments)

            run.before = lambda: events.append("before")
            return run

    made = lambda: CudaGraphs(Following(), FakeRecorder())  # noqa: E731
    monkeypatch.setitem(BACKENDS, "cudagraph", Backend({"whole": made}, exact=True))
    accelerated = fxmask.compile(tiny, fxmask.rectify(tiny, every_other(tiny)), backend="cudagraph")
    for _ in range(2):
        with accelerated.generation():
            [accelerated(**call) for call in make_calls()]
    assert events == ["refresh", *["before"] * len(TIMESTEPS)] * 2


def test_without_a_gpu_it_says_so(tiny):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    accelerated = fxmask.compile(tiny, fxmask.rectify(tiny, every_other(tiny)), backend="cudagraph")
    with pytest.raises(fxmask.BackendError, match="NVIDIA GPU"):
        accelerated(**make_calls()[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("mode", ["regions", "whole"])
def test_on_a_gpu(mode):
    torch.manual_seed(0)
    model = TinyTransformer().eval().cuda()
    calls = [{k: v.cuda() for k, v in call.items()} for call in make_calls()]
    program = fxmask.capture(model, calls[0])
    mask = every_other(program)
    accelerated = fxmask.compile(program, fxmask.rectify(program, mask), backend="cudagraph", mode=mode)
    expected = fxmask.reference.run(program, mask, calls)
    for _ in range(2):
        with accelerated.generation():
            for call, want in zip(calls, expected, strict=True):
                got = accelerated(**call)
                assert torch.allclose(got, want, atol=1e-4)
                got.fill_(float("nan"))
