"""Weights that are laid out once: tried on a CPU, where convolutions take either layout, as if it were a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import fx

import fxmask
from fxmask.backends import inductor
from fxmask.backends.inductor import Regions, WholeGraphs
from fxmask.backends.layouts import Layouts
from fxmask.passes import choose_layouts
from fxmask.passes.choose_layouts import LAYOUT
from fxmask.runtime.executor import Executor
from fxmask.runtime.graph_store import GraphStore

compiled = pytest.mark.skipif(inductor.cpu_compiler_problem() is not None, reason="no C++ compiler")
TIMESTEPS = (900.0, 600.0, 300.0, 100.0)


class Images(torch.nn.Module):
    """Two residual branches of convolutions, and a view that channels-last images do not have."""

    def __init__(self, viewed: bool = True) -> None:
        super().__init__()
        self.viewed = viewed
        self.inp = torch.nn.Conv2d(2, 8, 3, padding=1)
        self.branches = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.GroupNorm(2, 8), torch.nn.SiLU(), torch.nn.Conv2d(8, 8, 3, padding=1))
            for _ in range(2)
        )
        self.mix = torch.nn.Linear(8 * 6 * 4, 8)
        self.out = torch.nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x = self.inp(x) + t.reshape(-1, 1, 1, 1).to(x.dtype) / 1000
        for branch in self.branches:
            x = x + branch(x)
        flat = x.view(len(x), -1) if self.viewed else x.mean((2, 3)).repeat(1, 24)
        return self.out(x + self.mix(flat)[:, :, None, None])


@pytest.fixture
def as_on_gpu(monkeypatch):
    monkeypatch.setattr(choose_layouts, "prefers_channels_last", lambda graph_module: True)


def captured() -> tuple[Images, fxmask.Program]:
    torch.manual_seed(0)
    model = Images().eval()
    return model, fxmask.capture(model, {"x": torch.randn(2, 2, 6, 4), "t": torch.tensor([500, 500])})


def calls() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(2, 2, 6, 4, generator=generator), "t": torch.full((2,), int(t))} for t in TIMESTEPS]


def mask_of(program: fxmask.Program) -> fxmask.Mask:
    names = tuple(block.name for block in program.branches)
    rows = torch.tensor([[True, True], [False, True], [True, False], [False, False]])
    return fxmask.Mask(rows, TIMESTEPS, names)


def run(executor: Executor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs of all steps, and every value that was cached."""
    cache: dict = {}
    outputs, cached = [], []
    for step, call in enumerate(calls()):
        tensors = list(executor.program.signature.bind((), call).tensors.values())
        outputs += executor.run_step(step, tensors, cache)
        cached += cache.values()
    return outputs, cached


def test_nothing_is_marked_on_a_cpu():
    _, program = captured()
    assert not any(LAYOUT in node.meta for node in program.graph_module.graph.nodes)
    layouts = Layouts()
    assert layouts.apply(program.graph_module) is program.graph_module
    assert not len(layouts)


def test_what_is_marked(as_on_gpu):
    model, program = captured()
    marked = {node.name: node.meta[LAYOUT] for node in program.graph_module.graph.nodes if LAYOUT in node.meta}
    weights = [n for n in program.graph_module.graph.find_nodes(op="get_attr") if n.name in marked]
    assert len(weights) == 4  # of all convolutions
    for block in program.branches:
        assert all(marked[value] == (192, 1, 32, 8) for value in block.values)
    assert not any(node.name in marked for node in fxmask.ir.graph.returned(program.graph_module.graph))
    assert all(p.is_contiguous() for p in model.parameters())


def test_views_that_do_not_exist_any_more_are_copies(as_on_gpu):
    _, program = captured()
    laid_out = Layouts().apply(program.graph_module)
    targets = [{n.target for n in graph.graph.nodes} for graph in (program.graph_module, laid_out)]
    view, reshape = torch.ops.aten.view.default, torch.ops.aten.reshape.default
    assert view in targets[0]
    assert reshape not in targets[0]
    assert reshape in targets[1]
    tensors = list(program.example.tensors.values())
    (got,), (expected,) = laid_out(*tensors), program.graph_module(*tensors)
    assert torch.allclose(got, expected, atol=1e-5)
    assert got.is_contiguous()


def test_grouped_convolutions_and_few_convolutions_stay_as_they_are(monkeypatch):
    """The rule itself, on a graph that says that it is on a GPU."""

    def graph_of(model: torch.nn.Module) -> fx.GraphModule:
        module = fxmask.capture(model.eval(), {"x": torch.randn(2, 8, 4, 4), "t": torch.tensor([5, 5])}).graph_module
        for node in module.graph.nodes:
            if choose_layouts.is_convolution(node):
                node.meta["val"] = torch.empty_like(node.meta["val"], device="meta")
        return module

    class Net(torch.nn.Module):
        def __init__(self, groups: int, rest: int) -> None:
            super().__init__()
            self.conv, self.rest = torch.nn.Conv2d(8, 8, 3, padding=1, groups=groups), rest

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            x = self.conv(x) + t.reshape(-1, 1, 1, 1)
            for k in range(self.rest):
                x = x * k + 1.0
            return x

    monkeypatch.setattr(choose_layouts, "GPU", "meta")
    prefers = choose_layouts.prefers_channels_last
    assert prefers(graph_of(Net(1, 2)))
    assert prefers(graph_of(Net(8, 2)))  # depthwise
    assert not prefers(graph_of(Net(2, 2)))
    assert not prefers(graph_of(Net(1, 80)))
    monkeypatch.setattr(choose_layouts, "GPU", "cuda")
    assert not prefers(graph_of(Net(1, 2)))


@compiled
@pytest.mark.parametrize("make", [Regions, WholeGraphs])
def test_step_graphs_on_laid_out_weights(make, as_on_gpu):
    """Results are the reference's; caches are channels-last; weights that change are followed, in whatever way they do."""
    model, program = captured()
    mask = mask_of(program)
    compiler = make()
    executor = Executor(fxmask.rectify(program, mask), GraphStore(program, "inductor", compiler=compiler))
    executor.compile_all(progress=False)

    def check() -> None:
        outputs, cached = run(executor)
        for got, expected in zip(outputs, fxmask.reference.run(program, mask, calls()), strict=True):
            assert torch.allclose(got, expected, atol=1e-5)
            assert got.is_contiguous()
        assert cached
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x in cached if x.shape[1] == 8)

    before = [(id(p), p.stride(), p.clone()) for p in model.parameters()]
    check()
    assert all(
        id(p) == i and p.stride() == s and torch.equal(p, v) for p, (i, s, v) in zip(model.parameters(), before, strict=True)
    )
    assert len(compiler.layouts) == 4  # one for each weight, whatever the number of step graphs
    weight = model.branches[0][2].weight
    copy = compiler.layouts._copies[id(weight)][1]
    address, made = copy.data_ptr(), inductor.compilations
    with torch.no_grad():
        weight.mul_(-2)
    check()
    weight.data = weight.data * -0.5
    check()
    weight.data.add_(0.25)  # leaves no trace
    compiler.layouts.refresh()
    check()
    assert copy.data_ptr() == address
    assert inductor.compilations == made


@compiled
def test_a_model_that_is_channels_last_needs_no_copies(as_on_gpu):
    model = Images(viewed=False).eval().to(memory_format=torch.channels_last)
    program = fxmask.capture(model, {"x": torch.randn(2, 2, 6, 4), "t": torch.tensor([500, 500])})
    layouts = Layouts()
    layouts.apply(program.graph_module)
    assert not len(layouts)
