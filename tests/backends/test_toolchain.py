"""Where nothing can be compiled, step graphs run eagerly, and one warning says what to install."""

from __future__ import annotations

import re
import shutil
import sys
import sysconfig
import warnings

import pytest
import torch
from conftest import every_other, make_calls
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

import fxmask
from fxmask.backends import inductor, toolchain


def graph_on(device, weights=True):
    """x * w, with values of that device that are not there."""
    torch._C._ensureCUDADeviceGuardSet()
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.ops.aten.mul.Tensor, (x, graph.get_attr("w") if weights else x))
    graph.output((y,))
    with FakeTensorMode():
        value = torch.empty(2, device=device)
    x.meta["val"] = value
    module = torch.nn.Module()
    if weights:
        module.register_buffer("w", value)
    return fx.GraphModule(module, graph)


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "xpu", "meta"])
def test_device_of_a_graph(device, weights):
    """Also of one without weights, and of one with a number of the CPU among them."""
    graph = graph_on(device, weights)
    assert inductor.device_type(graph) == device
    graph.register_buffer("number", torch.tensor(1.0))
    assert inductor.device_type(graph) == device


@pytest.mark.parametrize("mode", ["whole", "regions"])
@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cpu", r"no working C\+\+ compiler, so step graphs run eagerly: none found. Install g\+\+ or clang"),
        (
            "cuda",
            "Triton cannot compile here, so step graphs run eagerly: triton is not installed. Install it .* accelerate again",
        ),
        ("mps", "not been compiled on a device of type 'mps' yet, .* they run eagerly"),
        ("xpu", "not been compiled on a device of type 'xpu' yet, .* they run eagerly"),
    ],
)
def test_one_warning_and_the_right_result(tiny, monkeypatch, device, message, mode):
    monkeypatch.setattr(inductor, "device_type", lambda graph_module: device)
    monkeypatch.setattr(inductor, "cpu_compiler_problem", lambda: "none found")
    problem = "triton is not installed. Install it (pip install triton)"
    monkeypatch.setattr(inductor, "gpu_compiler_problem", lambda: problem)
    before = inductor.compilations
    accelerated = fxmask.compile(tiny, fxmask.rectify(tiny, every_other(tiny)), backend="inductor", mode=mode)
    calls = make_calls()
    with warnings.catch_warnings(record=True) as caught, accelerated.generation():
        warnings.simplefilter("always")
        got = [accelerated(**call) for call in calls]
    assert len(caught) == 1
    assert re.search(message, str(caught[0].message))
    assert "backend='eager'" in str(caught[0].message)
    assert inductor.compilations == before
    expected = fxmask.reference.run(tiny, every_other(tiny), calls)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_nothing_is_said_where_it_works(monkeypatch, device):
    monkeypatch.setattr(inductor, "cpu_compiler_problem", lambda: None)
    monkeypatch.setattr(inductor, "gpu_compiler_problem", lambda: None)
    assert inductor.can_compile(graph_on(device))


@pytest.fixture
def gpu_problem(monkeypatch):
    """What is asked anew, on a machine that has everything."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delenv("CC", raising=False)
    return toolchain.gpu_compiler_problem.__wrapped__


@pytest.fixture
def headers(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    (tmp_path / "Python.h").touch()
    return tmp_path


def test_what_triton_needs(gpu_problem, headers, monkeypatch):
    assert gpu_problem() is None
    (headers / "Python.h").unlink()
    assert "Install Python's headers" in gpu_problem()
    (headers / "Python.h").touch()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    assert "a GPU has compute capability 6.1" in gpu_problem()
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert gpu_problem() is None
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "Install gcc or clang, or set CC" in gpu_problem()
    monkeypatch.setenv("CC", "cc")
    assert gpu_problem() is None
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton)" in gpu_problem()
    monkeypatch.setattr(sys, "platform", "win32")
    assert "pip install triton-windows)" in gpu_problem()
