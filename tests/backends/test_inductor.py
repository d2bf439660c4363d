"""Inductor: what is skipped is not in the generated code, and nothing silently runs eagerly. Each case costs seconds."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import TIMESTEPS, TinyTransformer, every_other, make_calls
from torch._inductor.utils import run_and_get_code
from torch.testing import FileCheck

import fxmask
from fxmask.backends import inductor
from fxmask.runtime.executor import Executor
from fxmask.runtime.graph_store import GraphStore

pytestmark = pytest.mark.skipif(inductor.cpu_compiler_problem() is not None, reason="no C++ compiler")


def test_generated_code_of_a_skipped_block(tiny):
    mask = every_other(tiny)
    executor = Executor(fxmask.rectify(tiny, mask), GraphStore(tiny, "inductor", "whole"))
    calls = make_calls()
    cache: dict = {}
    codes = []
    for step in (0, 1):
        tensors = list(tiny.signature.bind((), calls[step]).tensors.values())
        results, code = run_and_get_code(executor.run_step, step, tensors, cache)
        codes.append("\n".join(code))
        assert torch.allclose(results[0], fxmask.reference.run(tiny, mask, calls)[step], atol=1e-5)
    full, skipped = codes
    FileCheck().check("attention").run(full)
    FileCheck().check_not("attention").run(skipped)
    products = [code.count("extern_kernels.addmm(") + code.count("extern_kernels.mm(") + code.count("mkldnn") for code in codes]
    assert products[1] < products[0] - 4
    graph, _ = executor.graphs.get(executor.plan, 1)
    used = {str(n.target) for n in graph.graph_module.graph.nodes if n.op == "get_attr"}
    assert not any("mlp" in name or "qkv" in name or ".out." in name for name in used)
    assert {name for name, _ in graph.graph_module.named_parameters()} == used


@pytest.mark.parametrize("mode", ["whole", "regions"])
def test_more_graphs_than_the_recompile_limit(mode):
    """Every distinct step graph is compiled: none falls back to eager, however many there are."""
    torch.manual_seed(0)
    model = TinyTransformer(depth=2).eval()
    timesteps = tuple(float(t) for t in range(900, 100, -50))
    calls = make_calls(timesteps=timesteps)
    program = fxmask.capture(model, calls[0])
    names = [b.name for b in program.branches]
    rows = torch.tensor([[True] * 4] + [[bool(k >> b & 1) for b in range(4)] for k in range(1, 11)] + [[True] * 4] * 5)
    mask = fxmask.Mask(rows, timesteps, names)
    plan = fxmask.rectify(program, mask)
    assert plan.distinct_graphs > 8
    before = inductor.compilations
    accelerated = fxmask.compile(program, plan, backend="inductor", mode=mode)
    with warnings.catch_warnings(), accelerated.generation():
        warnings.simplefilter("error")
        got = [accelerated(**call) for call in calls]
    made = inductor.compilations - before
    assert made == plan.distinct_graphs if mode == "whole" else made < plan.distinct_graphs
    for value, expected in zip(got, fxmask.reference.run(program, mask, calls), strict=True):
        assert torch.allclose(value, expected, atol=1e-5)


def test_outputs_and_caches_do_not_alias_when_compiled(tiny):
    names = [b.name for b in tiny.blocks]
    rows = torch.ones(5, len(names), dtype=torch.bool)
    rows[1::2, names.index("output")] = False
    mask = fxmask.Mask(rows, TIMESTEPS, names)
    accelerated = fxmask.compile(tiny, fxmask.rectify(tiny, mask), backend="inductor")
    calls = make_calls()
    expected = fxmask.reference.run(tiny, mask, calls)
    with accelerated.generation():
        for call, value in zip(calls, expected, strict=True):
            result = accelerated(**call)
            assert torch.allclose(result, value, atol=1e-5)
            result.fill_(float("nan"))


def test_no_compiler_is_a_warning_and_eager(tiny, monkeypatch):
    monkeypatch.setattr(inductor, "cpu_compiler_problem", lambda: "No working C++ compiler found")
    accelerated = fxmask.compile(tiny, fxmask.rectify(tiny, every_other(tiny)), backend="inductor")
    calls = make_calls()
    with pytest.warns(UserWarning, match="step graphs run eagerly.*Install g"):
        got = [accelerated(**call) for call in calls]
    expected = fxmask.reference.run(tiny, every_other(tiny), calls)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, expected, strict=True))


def test_weights_are_inputs_not_constants():
    """A weight update needs no recompilation and is seen by compiled graphs."""
    torch.manual_seed(0)
    model = TinyTransformer(depth=1).eval()
    calls = make_calls()
    program = fxmask.capture(model, calls[0])
    accelerated = fxmask.compile(program, fxmask.rectify(program, every_other(program)), backend="inductor")
    [accelerated(**call) for call in calls]
    before = inductor.compilations
    with torch.no_grad():
        for p in model.parameters():
            p.data.add_(0.1)
    got = [accelerated(**call) for call in calls]
    assert inductor.compilations == before
    for value, expected in zip(got, fxmask.reference.run(program, every_other(program), calls), strict=True):
        assert torch.allclose(value, expected, atol=1e-4)
