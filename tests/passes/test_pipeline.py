"""The pipeline says what really runs, in order; passes can be watched, and replaced nodes keep what later passes need."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from conftest import TIMESTEPS, TinyTransformer, every_other, make_calls
from torch import fx

import fxmask
from fxmask.ir.graph import MARK, replace_node
from fxmask.passes.conditions import has_shapes
from fxmask.passes.observer import DECLARED, observe
from fxmask.passes.pipeline import PIPELINE, describe_pipeline, passes_in_order


def test_every_pass_is_in_the_pipeline():
    ours = {name for name, info in DECLARED.items() if info.module.startswith("fxmask.")}
    assert {info.name for info in passes_in_order()} == ours
    assert all(info.name in describe_pipeline() for info in passes_in_order())


def test_passes_run_in_the_order_of_the_pipeline():
    with observe() as records:
        program = fxmask.capture(TinyTransformer().eval(), make_calls()[0])
        plan = fxmask.rectify(program, every_other(program))
        fxmask.compile(program, plan, backend="eager").compile_all(progress=False)
    ran = list(dict.fromkeys(record.name for record in records if record.name not in ("remove_dead", "merge_common")))
    wanted = [info.name for info in passes_in_order()]
    assert ran == sorted(ran, key=wanted.index)
    assert {"functionalize", "find_blocks", "rectify", "fold_timestep", "specialize_step"} <= set(ran)
    nested = {name.strip("()") for phase in PIPELINE for name in phase.passes if name.startswith("(")}
    assert nested == {"remove_dead", "merge_common"}


def test_modified_says_whether_a_pass_did_anything(tiny):
    with observe() as records:
        fxmask.rectify(tiny, every_other(tiny))
    assert [record.modified for record in records] == [False], "rectify changes no graph"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_graphs_with_forecasts_have_shapes(dtype):
    """A pass that requires shapes runs on every step graph, forecasts and blends included."""
    torch.manual_seed(0)
    model = TinyTransformer().to(dtype).eval()
    program = fxmask.capture(model, {"x": torch.zeros(2, 6, 4, dtype=dtype), "t": torch.tensor(1)})
    name = program.branches[0].name
    rows = torch.tensor([[1], [1], [0], [1], [0]], dtype=torch.bool)
    forecast = {(2, name): {1: 1.5, 0: -0.5}, (3, name): {3: 0.9, 1: 0.1}}
    mask = fxmask.Mask(rows, TIMESTEPS, (name,), fxmask.Forecast(forecast))
    accelerated = fxmask.compile(program, fxmask.rectify(program, mask), backend="eager")
    for graph in accelerated.step_graphs:
        assert has_shapes(graph.graph_module.graph) is None


def test_shapes_are_those_that_are_computed(tiny):
    """What ``meta`` says of a formed value is what running the graph gives."""
    name = tiny.branches[0].name
    rows = torch.tensor([[1], [1], [0], [1], [0]], dtype=torch.bool)
    mask = fxmask.Mask(rows, TIMESTEPS, (name,), fxmask.Forecast({(2, name): {1: 1.5, 0: -0.5}, (4, name): {3: 2.0, 1: -1.0}}))
    executor = fxmask.compile(tiny, fxmask.rectify(tiny, mask), backend="eager").executor
    graph, _ = executor.graphs.get(executor.plan, 2)
    checked = []

    class Checked(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if n.op == "call_function" and isinstance(value, torch.Tensor):
                checked.append((tuple(value.shape), value.dtype) == (tuple(n.meta["val"].shape), n.meta["val"].dtype))
            return value

    tensors = [
        torch.zeros(tuple(n.meta["val"].shape), dtype=n.meta["val"].dtype)
        for n in graph.graph_module.graph.find_nodes(op="placeholder")
    ]
    Checked(graph.graph_module).run(*tensors)
    assert len(checked) > 5
    assert all(checked)


def test_replace_node_keeps_shape_and_marks():
    graph = fx.Graph()
    x = graph.placeholder("x")
    old = graph.call_function(torch.ops.aten.relu.default, (x,))
    old.meta = {"val": torch.empty(2), f"{MARK}join": True, "stack_trace": "here"}
    with graph.inserting_after(old):
        new = graph.call_function(torch.ops.aten.clamp_min.default, (x, 0))
    user = graph.call_function(torch.ops.aten.neg.default, (old,))
    graph.output((user,))
    replace_node(old, new)
    assert user.args == (new,)
    assert new.meta[f"{MARK}join"]
    assert new.meta["val"].shape == (2,)
    assert old not in graph.nodes


def test_log_and_dump(tmp_path):
    script = "from conftest import *; tiny = fxmask.capture(TinyTransformer().eval(), make_calls()[0])"
    environment = {**os.environ, "FXMASK_LOG": "passes", "FXMASK_DUMP": str(tmp_path / "dump"), "PYTHONPATH": "tests"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    lines = [line for line in done.stderr.splitlines() if "nodes" in line]
    assert any(line.startswith("find_blocks") and "ms" in line and "->" in line for line in lines)
    files = sorted((tmp_path / "dump").iterdir())
    assert [path.name[5:] for path in files][-1] == "choose_layouts.txt"
    assert files[0].read_text().startswith("# ")
