"""The whole road of a model on a GPU, on fake CUDA tensors: inferring, capture, plans, step graphs, tables, forecasts, runs.

A fake CUDA tensor has no memory, but operators refuse it beside a CPU tensor as they refuse a real one.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from conftest import TIMESTEPS, tiny_dit, tiny_unet
from road import forecasting, run_plan, tensors_of
from torch import fx
from without_a_gpu import CUDA, LAYOUTS, gpu, on_gpu

import fxmask
from fxmask.backends import inductor
from fxmask.frontend.infer import infer_call
from fxmask.ir.calls import Signature
from fxmask.ir.program import Program
from fxmask.passes.choose_layouts import LAYOUT
from fxmask.runtime.prologues import PrologueRunner

MODELS = {"unet": (tiny_unet, {}), "dit": (tiny_dit, {"class_labels": torch.tensor([1, 2])})}
TYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def on_the_road(name: str, dtype: torch.dtype = torch.float32, layout: str = "flash") -> Program:
    """A program captured on a GPU; conditioning is given on the CPU."""
    make, given = MODELS[name]
    with gpu(layout):
        return fxmask.capture(on_gpu(make().to(dtype)), given)


@pytest.mark.parametrize("name", MODELS)
def test_captures_agree_whatever_the_type_and_the_kernel_of_attention(name):
    """Fingerprints and blocks are a plan's ticket from one machine to another."""
    make, given = MODELS[name]
    here = fxmask.capture(make(), given)
    there = [on_the_road(name, dtype, layout) for dtype, layout in zip(TYPES, LAYOUTS, strict=True)]
    assert {program.fingerprint for program in there} == {here.fingerprint}
    for program in there:
        assert [b.name for b in program.blocks] == [b.name for b in here.blocks]
        assert {x.device for x in tensors_of(program)} == {CUDA}
    strides = [
        [n.meta["val"].stride() for n in program.graph_module.graph.nodes if "scaled_dot_product" in str(n.target)]
        for program in (there[0], there[-1])
    ]
    assert strides[0]
    assert strides[0] != strides[1]  # or else the layouts were not tried


@pytest.mark.parametrize("name", MODELS)
def test_what_is_inferred(name):
    make, given = MODELS[name]
    model = on_gpu(make())
    with gpu():
        call = infer_call(model, given, 2, Signature.of(model))
    assert call[Signature.of(model).sample].shape[0] == 2


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_no_cpu_tensor_meets_a_gpu_one_in_a_run(name, replayed):
    program = on_the_road(name, layout="math")
    plan = fxmask.rectify(program, forecasting(program))
    assert any(not load.plain for step in plan.steps for load in step.formed)
    outputs = run_plan(program, forecasting(program), replayed)
    assert len(outputs) == len(TIMESTEPS)
    assert {x.device for x in outputs} == {CUDA}


@pytest.mark.parametrize("place", ["cache", "table", "conditioning", "coefficients"])
def test_a_cpu_tensor_on_the_road_is_seen(place, monkeypatch):
    """What makes the test above fail."""
    from fxmask.runtime import coefficients, executor, prologues

    program = on_the_road("dit", layout="math")
    if place == "cache":
        monkeypatch.setattr(executor, "_compact", lambda x: x.to("cpu"))
    elif place == "table":
        begin = prologues.PrologueRunner.begin
        monkeypatch.setattr(
            prologues.PrologueRunner,
            "begin",
            lambda self, tensors: [{k: x.to("cpu") for k, x in row.items()} for row in begin(self, tensors)],
        )
    elif place == "coefficients":
        of = coefficients.Coefficients.of
        moved = lambda *given: replace(of(*given), tables={k: x.to("cpu") for k, x in of(*given).tables.items()})  # noqa: E731
        monkeypatch.setattr(coefficients.Coefficients, "of", moved)
        with pytest.raises((RuntimeError, AssertionError), match="device"):
            run_plan(program, forecasting(program))
        return
    else:
        labels = program.inputs.index("class_labels")
        list_of = program.example.tensors
        monkeypatch.setitem(list_of, list(list_of)[labels], list(list_of.values())[labels].to("cpu"))
    with pytest.raises(RuntimeError, match="device"):
        run_plan(program, forecasting(program))


def test_what_runs_once_is_compiled_on_a_gpu(monkeypatch):
    """Hundreds of operators of a run's start become a few launches; on a CPU they run as they are."""
    monkeypatch.setattr(inductor, "gpu_compiler_problem", lambda: None)
    program = on_the_road("dit", layout="math")
    inputs = list(program.example.tensors.values())
    runner = PrologueRunner(program, TIMESTEPS, True, inductor.Regions())
    parts = [runner.prologues.once.compiled] if runner.prologues.once else []
    monkeypatch.setattr(
        inductor.Compiled, "__call__", lambda self, *given: parts.append(self) or self.graph_module(*self._weights, *given)
    )
    with gpu(), inputs[0].fake_mode, torch.no_grad():
        once, columns = runner.compute(inputs)
    assert {x.device for x in (*once.values(), *columns.values())} == {CUDA}
    assert parts
    assert all(isinstance(part, inductor.Compiled) for part in parts)
    on_cpu = inductor.Regions().compile_once(fx.symbolic_trace(torch.nn.Linear(2, 2)))
    assert isinstance(on_cpu, fx.GraphModule)


def test_layouts_of_caches_and_weights_on_a_gpu():
    """Where convolutions run channels-last, so is what they read; a transformer stays as it is."""
    unet, dit = on_the_road("unet"), on_the_road("dit")
    marked = {node.name for node in unet.graph_module.graph.nodes if LAYOUT in node.meta}
    convolutions = [n for n in unet.graph_module.graph.nodes if "conv2d" in str(n.target)]
    weights = [n.args[1] for n in convolutions if n.args[1].meta["val"].shape[2:] != (1, 1)]
    assert sum(weight.name in marked for weight in weights) >= len(weights) - 1  # one with a single channel has but one layout
    images = [b for b in unet.branches if all(unet.node(v).meta["val"].dim() == 4 for v in b.values)]
    assert images
    resnets = [b for b in images if "attention" not in b.name]
    assert all(value in marked for b in resnets for value in b.values)
    assert not any(LAYOUT in node.meta for node in dit.graph_module.graph.nodes)
