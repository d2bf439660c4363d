"""Ahead of time: packages without weights, loaded without capture and without a compiler, refused where they do not fit.

One export is compiled for real (half a minute). In the other tests a package is a file with a number, and the graph of that
number runs operator by operator.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TIMESTEPS, TinyTransformer, ddim, every_other, make_calls
from reseal import edit_package, place_of, plan_state, reseal

import fxmask
from fxmask import BackendError, MaskError
from fxmask.backends import inductor, package
from fxmask.passes.split_regions import structure
from fxmask.runtime import export as exporting
from fxmask.storage import folders
from fxmask.storage.graph_data import graph_from_data, graph_to_data
from fxmask.storage.schema import CONSTANTS, PACKAGE, PARTS, PLAN, TENSORS

compiles = pytest.mark.skipif(inductor.cpu_compiler_problem() is not None, reason="no C++ compiler")

LOAD = """
import subprocess, sys, torch
sys.path[:0] = [{tests!r}, {tests!r} + "/storage"]
from conftest import make_calls
from test_packages import Conditioned, model_of, run
import fxmask, fxmask.frontend.capture, fxmask.frontend.trace_values
import fxmask.passes.batch_steps, torch._inductor.compile_fx
from fxmask.backends import inductor, package

def forbidden(*args, **kwargs):
    raise AssertionError("capture or compilation")

model = model_of()
torch.export.export = torch.compile = torch._inductor.standalone_compile = torch._inductor.aoti_compile_and_package = forbidden
fxmask.frontend.capture._capture = fxmask.passes.batch_steps.make_fx = fxmask.frontend.trace_values.make_fx = forbidden
torch._inductor.compile_fx.compile_fx = torch._inductor.compile_fx.compile_fx_aot = forbidden
inductor.compile_graph = package.build_package = subprocess.Popen.__init__ = forbidden
accelerated = fxmask.load({folder!r}, model, progress=False, allow_compiled=True)
calls = make_calls()
torch.save([run(accelerated, calls), [accelerated(**call) for call in calls[2:]]], {out!r})
"""


class Conditioned(TinyTransformer):
    """With conditioning that is embedded, and with constants that belong to no module."""

    def __init__(self, width: int = 8, depth: int = 2) -> None:
        super().__init__(width, depth)
        self.words = torch.nn.Linear(3, width)
        self.register_buffer("shift", torch.randn(width), persistent=False)
        self.rows = torch.randn(3, 1).expand(3, 4)
        self.columns = torch.randn(4, 6).T

    def forward(self, x: torch.Tensor, t: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        x = x + self.columns + self.rows[0] + self.shift[:4]
        x = torch.where(x > 5, float("inf"), x).clamp(-5, 5)
        bias = torch.nn.functional.gelu(self.words(words)).to(torch.float64).float().unsqueeze(1)
        time = self.embed(t.reshape(-1, 1).to(x.dtype) / 1000)
        x = self.inp(x) + bias
        for layer in self.layers:
            x = layer(x, time)
        return self.head(x)


class Other(Conditioned):
    """The same weights, used in another way."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        return 1.1 * super().forward(x, t, words)


def model_of(cls: Any = TinyTransformer, **config: Any) -> Any:
    torch.manual_seed(0)
    return cls(**config).eval()


def conditioned_calls(batch: int = 2) -> list[dict[str, torch.Tensor]]:
    words = torch.randn(batch, 3, generator=torch.Generator().manual_seed(1))
    return [{**call, "words": words} for call in make_calls(batch)]


def run(accelerated: Any, calls: list) -> list[torch.Tensor]:
    with accelerated.generation():
        return [accelerated(**call) for call in calls]


def close(a: list, b: list, tolerance: float = 1e-5) -> bool:
    return len(a) == len(b) and all(torch.allclose(x, y, 0, tolerance) for x, y in zip(a, b, strict=True))


@pytest.fixture
def shelf(monkeypatch):
    """Instead of the compiler: the graphs that would have been compiled."""
    graphs: list[torch.fx.GraphModule] = []

    def build(graph_module, arguments, path):
        path.write_text(str(len(graphs)))
        graphs.append(graph_module)

    def load(path, device):
        graph = graphs[int(path.read_text())]
        return lambda arguments: list(graph(*arguments))

    monkeypatch.setattr(package, "build_package", build)
    monkeypatch.setattr(package, "load_package", load)
    monkeypatch.setattr(package, "can_compile", lambda graph_module: True)
    monkeypatch.setattr(exporting, "cpu_compiler_problem", lambda: None)
    return graphs


@pytest.fixture(scope="session")
def program() -> fxmask.Program:
    return fxmask.capture(model_of(Conditioned), conditioned_calls()[0])


@pytest.fixture
def accelerated(program) -> fxmask.AcceleratedModel:
    return fxmask.compile(program, fxmask.rectify(program, every_other(program)), backend="eager")


@pytest.fixture
def folder(accelerated, shelf, tmp_path) -> Path:
    accelerated.export(tmp_path / "package")
    return tmp_path / "package"


@compiles
def test_a_second_process_without_compiler_gives_the_same_samples(tmp_path):
    model, calls = model_of(), make_calls()
    program = fxmask.capture(model, calls[0])
    mask = every_other(program)
    before = package.compilations
    here = fxmask.compile(program, fxmask.rectify(program, mask), backend="package")
    samples = [run(here, calls), [here(**call) for call in calls[2:]]]
    assert package.compilations - before == 3, "two step graphs and the timestep's table"
    assert close(samples[0], fxmask.reference.run(program, mask, calls))
    here.export(tmp_path / "package")
    assert package.compilations - before == 3, "what was compiled already is not compiled again"
    script = LOAD.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path / "package"), out=str(tmp_path / "out.pt"))
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "CXX": "/nonexistent/compiler"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    there = torch.load(tmp_path / "out.pt", weights_only=True)
    assert all(torch.equal(a, b) for x, y in zip(samples, there, strict=True) for a, b in zip(x, y, strict=True))
    weights = sum(p.numel() for p in model.parameters())
    assert weights > 1000
    libraries = [path.read_bytes() for path in (tmp_path / "package" / PARTS).iterdir()]
    values = model.layers[0].mlp[0].weight.detach().numpy().tobytes()
    assert not any(values[:64] in library for library in libraries), "no package holds weights"


@compiles
def test_what_cannot_be_compiled_or_loaded_says_so(tmp_path):
    class Weird(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (x[: int(x.sum())],)

    with pytest.raises(BackendError, match="cannot be compiled ahead of time"):
        package.build_package(Weird(), [torch.ones(2)], tmp_path / "a.pt2")  # type: ignore[arg-type]
    (tmp_path / "b.pt2").write_bytes(b"no package")
    with pytest.raises(BackendError, match="cannot be loaded"):
        package.load_package(tmp_path / "b.pt2", None)


def test_a_loaded_package_does_what_the_exported_model_does(program, accelerated, folder, shelf):
    assert len(shelf) == 4, "two step graphs, the timestep's table, the conditioning"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [PACKAGE, CONSTANTS, PARTS, "plan.json", "plan.safetensors"]
    )
    model, calls = model_of(Conditioned), conditioned_calls()
    loaded = fxmask.load(folder, model, progress=False, allow_compiled=True)
    assert close(run(loaded, calls), fxmask.reference.run(program, every_other(program), calls))
    assert close(run(loaded, calls), run(accelerated, calls))
    assert [tuple(x.shape) for x in run(loaded, calls)] == [(2, 6, 4)] * 5
    assert len(shelf) == 4
    assert loaded.plan == accelerated.plan
    there, here = loaded.report(), accelerated.report()
    assert replace(there, runs=()) == replace(here, runs=()), "savings"
    assert there.runs[-1] == here.runs[-1], "what the latest run did"
    assert loaded.program.summary() == program.summary()
    assert structure(loaded.program.graph_module) == structure(program.graph_module)
    assert "backend='package'" in repr(loaded)
    stranger = {**calls[0], "t": torch.tensor(123)}
    assert torch.allclose(loaded(**stranger), model(**stranger), atol=1e-6), "a call that the plan does not cover"


@pytest.mark.parametrize("broken", range(4))
@pytest.mark.parametrize("when", ["loaded", "run"])
def test_no_broken_part_is_passed_over(folder, monkeypatch, broken, when):
    """The table of timesteps neither, without which steps could go on."""
    load = package.load_package

    def fail(*_: Any) -> Any:
        raise BackendError("it cannot be loaded") if when == "loaded" else RuntimeError("it cannot run")

    def load_all_but_one(path: Path, device: torch.device | None) -> Any:
        if path.read_text() != str(broken):
            return load(path, device)
        return fail() if when == "loaded" else fail

    monkeypatch.setattr(package, "load_package", load_all_but_one)
    with pytest.raises((MaskError, BackendError), match="it cannot"):
        fxmask.load(folder, model_of(Conditioned), allow_compiled=True, progress=False)


def test_the_weights_are_the_models_own(folder):
    model, calls = model_of(Conditioned), conditioned_calls()
    loaded = fxmask.load(folder, model, progress=False, allow_compiled=True)
    own = {id(x) for x in [*model.parameters(), *model.buffers()]}
    held = {name for name, tensor in loaded.program.weights.items() if id(tensor) not in own}
    assert held == {name for name in held if name.startswith("constant_")}
    assert len(held) == 2
    with torch.no_grad():
        for p in model.parameters():
            p.data.mul_(1.5)
    program = fxmask.capture(model, calls[0])
    assert close(run(loaded, calls), fxmask.reference.run(program, every_other(program), calls), 1e-4)


def test_lanes_and_inferred_runs(folder, accelerated):
    loaded = fxmask.load(folder, model_of(Conditioned), progress=False, allow_compiled=True)
    first, second = conditioned_calls(), [{**call, "words": -call["words"]} for call in conditioned_calls()]
    expected = [run(accelerated, first), run(accelerated, second)]
    with loaded.generation():
        lanes = [[loaded(**a), loaded(**b)] for a, b in zip(first, second, strict=True)]
    assert all(close(list(lane), want) for lane, want in zip(zip(*lanes, strict=True), expected, strict=True))
    assert close([loaded(**call) for call in first], expected[0])


def test_regions_where_there_are_many_graphs(shelf, tmp_path):
    timesteps = tuple(float(t) for t in range(990, 10, -40))
    calls = make_calls(timesteps=timesteps)
    program = fxmask.capture(model_of(depth=4), calls[0])
    rows = torch.rand(len(timesteps), 8, generator=torch.Generator().manual_seed(0)) < 0.5
    rows[0] = True
    mask = fxmask.Mask(rows, timesteps, [b.name for b in program.branches])
    plan = fxmask.rectify(program, mask)
    fxmask.compile(program, plan, backend="eager").export(tmp_path / "package")
    assert len(shelf) < 0.7 * plan.distinct_graphs
    loaded = fxmask.load(tmp_path / "package", program.model, progress=False, allow_compiled=True)
    assert close(run(loaded, calls), fxmask.reference.run(program, mask, calls))


def test_graphs_that_were_not_exported_run_operator_by_operator(program, shelf, tmp_path):
    names = [b.name for b in program.branches]
    rows = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]]).bool()
    mask = fxmask.Mask(rows, TIMESTEPS, names)
    fxmask.compile(program, fxmask.rectify(program, mask), backend="eager").export(tmp_path / "package")
    model, calls = model_of(Conditioned), conditioned_calls()
    loaded = fxmask.load(tmp_path / "package", model, progress=False, allow_compiled=True)
    expected = fxmask.compile(program, fxmask.rectify(program, mask), backend="eager")
    made = len(shelf)
    with pytest.warns(UserWarning, match="not exported; these run operator by operator"):
        got = [loaded(**call) for call in calls[2:]]
    assert close(got, [expected(**call) for call in calls[2:]])
    assert len(shelf) == made, "nothing is compiled"


def test_another_form_of_call_is_captured_with_a_warning(folder, monkeypatch):
    monkeypatch.setattr(inductor, "cpu_compiler_problem", lambda: "No working C++ compiler found")
    model, calls = model_of(Conditioned), conditioned_calls(batch=3)
    loaded = fxmask.load(folder, model, progress=False, allow_compiled=True)
    with (
        pytest.warns(UserWarning, match=r"x was float32\[2, 6, 4\] on cpu, is float32\[3, 6, 4\] on cpu.*; export a package"),
        pytest.warns(UserWarning, match="run eagerly"),
    ):
        got = run(loaded, calls)
    program = fxmask.capture(model, calls[0])
    assert close(got, fxmask.reference.run(program, every_other(program), calls))
    assert close(
        run(loaded, conditioned_calls()),
        run(fxmask.load(folder, model, progress=False, allow_compiled=True), conditioned_calls()),
    )


def test_replaced_weights_are_captured_with_a_warning(folder, monkeypatch):
    monkeypatch.setattr(inductor, "cpu_compiler_problem", lambda: "No working C++ compiler found")
    model, calls = model_of(Conditioned), conditioned_calls()
    loaded = fxmask.load(folder, model, progress=False, allow_compiled=True)
    model.head = torch.nn.Linear(8, 4)
    with pytest.warns(UserWarning, match="weights were replaced"), pytest.warns(UserWarning, match="run eagerly"):
        got = run(loaded, calls)
    program = fxmask.capture(model, calls[0])
    assert close(got, fxmask.reference.run(program, every_other(program), calls))


def test_copies_compile_in_memory(folder, monkeypatch):
    monkeypatch.setattr(inductor, "cpu_compiler_problem", lambda: "No working C++ compiler found")
    loaded = fxmask.load(folder, model_of(Conditioned), progress=False, allow_compiled=True)
    twin = copy.deepcopy(loaded)
    with pytest.warns(UserWarning, match="run eagerly"):
        assert close(run(twin, conditioned_calls()), run(loaded, conditioned_calls()))


def test_a_package_is_a_saved_plan_too(folder, accelerated):
    model, calls = model_of(Conditioned), conditioned_calls()
    loaded = fxmask.load(folder, model, backend="eager", progress=False)
    assert loaded.plan == accelerated.plan
    assert close(run(loaded, calls), run(accelerated, calls))


def test_export_of_what_was_loaded(folder, shelf, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "cpu_compiler_problem", lambda: "No working C++ compiler found")
    made = len(shelf)
    fxmask.load(folder, model_of(Conditioned), progress=False, allow_compiled=True).export(tmp_path / "second")
    fxmask.load(tmp_path / "second", model_of(Conditioned), progress=False, allow_compiled=True).export(tmp_path / "second")
    assert len(shelf) == made
    assert place_of(tmp_path / "second", PACKAGE).read_bytes() == (folder / PACKAGE).read_bytes()


def test_no_compiler(accelerated, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "cpu_compiler_problem", lambda: "No working C++ compiler found")
    with pytest.raises(BackendError, match=r"exporting needs a C\+\+ compiler: No working.*Install g"):
        accelerated.export(tmp_path / "package")
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_the_old_package(accelerated, folder, monkeypatch):
    before = (folder / PACKAGE).read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(folders, "write_new", full)
    with pytest.raises(MaskError, match="no space"):
        accelerated.export(folder)
    assert (folder / PACKAGE).read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == ["package"]
    (folder.parent / "other").mkdir()
    (folder.parent / "other" / "precious.txt").write_text("mine")
    with pytest.raises(MaskError, match="holds no plan"):
        accelerated.export(folder.parent / "other")


def test_replaced_weights_cannot_be_exported(shelf, tmp_path):
    model = model_of(Conditioned)
    program = fxmask.capture(model, conditioned_calls()[0])
    accelerated = fxmask.compile(program, fxmask.rectify(program, every_other(program)), backend="eager")
    model.head = torch.nn.Linear(8, 4)
    with pytest.raises(MaskError, match=r"head.* was replaced, moved or converted.*accelerate the model as it is now"):
        accelerated.export(tmp_path / "package")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: delattr(model, "words"), r"words\.weight: exported float32\[8, 3\], now missing"),
        (lambda model: setattr(model, "head", torch.nn.Linear(8, 5)), r"head\.weight\.shape: exported \[4, 8\], now \[5, 8\]"),
        (lambda model: model.half(), r"dtype: exported 'float32', now 'float16'(.|\n)*and \d+ more"),
        (
            lambda model: setattr(model.inp, "weight", torch.nn.Parameter(torch.randn(4, 8).T)),
            r"inp\.weight\.stride: exported \[4, 1\], now \[1, 8\]",
        ),
    ],
    ids=["missing", "shape", "type", "layout"],
)
def test_other_weights_are_refused_with_what_differs(folder, change, message):
    model = model_of(Conditioned)
    change(model)
    with pytest.raises(MaskError, match=r"exported for another model:(.|\n)*" + message):
        fxmask.load(folder, model, progress=False, allow_compiled=True)


def test_other_code_with_the_same_weights_is_refused(folder):
    with pytest.raises(MaskError, match="computes something else than this Other"):
        fxmask.load(folder, model_of(Other), progress=False, allow_compiled=True)


def test_other_arguments_are_refused(folder):
    class Renamed(Conditioned):
        def forward(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return super().forward(x, t, text)

    with pytest.raises(MaskError, match="exported for another model: the denoiser cannot be called"):
        fxmask.load(folder, model_of(Renamed), progress=False, allow_compiled=True)


def test_another_scheduler_and_training_mode_are_refused(folder):
    """A plan that was compiled by hand knows its timesteps only, one that was learned knows its scheduler."""
    fxmask.load(folder, model_of(Conditioned), ddim(steps_offset=100), progress=False, allow_compiled=True)
    with pytest.raises(MaskError, match="timesteps: saved 900, 700.*now 800, 600"):
        fxmask.load(folder, model_of(Conditioned), ddim(), progress=False, allow_compiled=True)
    facts = plan_state(folder)["facts"]
    reseal(folder, facts={**facts, "scheduler": {"class": "EulerDiscreteScheduler", "config": {}}})
    with pytest.raises(MaskError, match="another scheduler"):
        fxmask.load(folder, model_of(Conditioned), ddim(), progress=False, allow_compiled=True)
    with pytest.raises(fxmask.InputError, match="eval mode"):
        fxmask.load(folder, model_of(Conditioned).train(), progress=False, allow_compiled=True)


def test_another_machine_is_refused(folder):
    model = model_of(Conditioned)
    machine = json.loads((folder / PACKAGE).read_text())["machine"]
    assert machine["torch"] == torch.__version__
    edit_package(folder, machine={**machine, "torch": "2.0.0"})
    with pytest.raises(BackendError, match=r"torch: exported for '2\.0\.0', now(.|\n)*backend='auto'"):
        fxmask.load(folder, model, progress=False, allow_compiled=True)
    edit_package(folder, machine={**machine, "cpu": {**machine["cpu"], "avx4096": True}})
    with pytest.raises(BackendError, match=r"cpu\.avx4096: exported for True, now None"):
        fxmask.load(folder, model, progress=False, allow_compiled=True)
    edit_package(folder, machine={**machine, "device": "cuda", "gpu": "sm_90"})
    with pytest.raises(BackendError, match=r"device: exported for 'cuda', now 'cpu'"):
        fxmask.load(folder, model, progress=False, allow_compiled=True)
    edit_package(folder, machine={**machine, "cpu": {}})
    fxmask.load(folder, model, progress=False, allow_compiled=True)  # a processor that can do more


def test_damage_is_noticed(folder):
    model = model_of(Conditioned)
    for name in (PACKAGE, CONSTANTS, PLAN, TENSORS, f"{PARTS}/{next((folder / PARTS).iterdir()).name}"):
        content = (folder / name).read_bytes()
        for damaged in (content + b"0", content[:-1], b"", bytes([content[0] ^ 1]) + content[1:], None):
            (folder / name).unlink(missing_ok=True)
            if damaged is not None:
                (folder / name).write_bytes(damaged)
            with pytest.raises(MaskError, match=r"is damaged|is not the file that plan.json was written with|holds no plan"):
                fxmask.load(folder, model, progress=False, allow_compiled=True)
        (folder / name).write_bytes(content)
    fxmask.load(folder, model, progress=False, allow_compiled=True)


def test_damage_with_digests_that_fit_is_noticed(folder):
    model = model_of(Conditioned)
    state = json.loads((folder / PACKAGE).read_text())
    program = state["program"]

    def refused(message, **changes):
        edit_package(folder, **{**state, **changes})
        with pytest.raises(fxmask.FxmaskError, match=message):
            fxmask.load(folder, model, progress=False, allow_compiled=True)

    refused("package.json is damaged", program={**program, "graph": program["graph"][:5] + program["graph"][6:]})
    refused("fingerprint", program={**program, "blocks": program["blocks"][1:]})
    refused("`weights`", program={key: value for key, value in program.items() if key != "weights"})
    refused("roles", program={**program, "roles": {**program["roles"], "words": "step"}})
    refused("version 99", version=99)
    for k, node in enumerate(program["graph"]):
        if isinstance(node[5], dict) and len(node[5].get("stride", ())) > 1:
            for change in ({"stride": node[5]["stride"][::-1]}, {"shape": [n + 8 for n in node[5]["shape"]]}):
                other = [*node[:5], {**node[5], **change}]
                if other != node:
                    graph = [*program["graph"][:k], other, *program["graph"][k + 1 :]]
                    refused(r"is \(|cannot|another version", program={**program, "graph": graph})
    edit_package(folder, **state)
    fxmask.load(folder, model, progress=False, allow_compiled=True)
    refused("`surplus`", surplus=1)


def test_graphs_that_another_fxmask_cuts_differently_are_refused(folder, monkeypatch):
    monkeypatch.setattr(package, "PACKAGE_NODES", 0)
    monkeypatch.setattr(package.Packages, "prepare", lambda self, graphs: None)
    with pytest.raises(MaskError, match="another version of fxmask"):
        fxmask.load(folder, model_of(Conditioned), progress=False, allow_compiled=True)


@pytest.mark.parametrize("name", ["unet_program", "dit_program", "program", "tiny"])
def test_a_graph_as_data_is_the_same_graph(name, request):
    program = request.getfixturevalue(name)
    data = json.loads(json.dumps(graph_to_data(program.graph_module.graph), allow_nan=False))
    module = graph_from_data(data, program.weights, torch.device("cpu"))
    assert [str(node) for node in module.graph.nodes] == [str(node) for node in program.graph_module.graph.nodes]
    assert structure(module) == structure(program.graph_module)
    assert module.code == program.graph_module.code
    tensors = list(program.example.tensors.values())
    with torch.no_grad():
        pairs = zip(module(*tensors), program.graph_module(*tensors), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_graphs_that_are_no_data_are_refused():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(os.path.join, (x,)),))
    with pytest.raises(MaskError, match="not registered with PyTorch"):
        graph_to_data(graph)
    with pytest.raises(MaskError, match="aten.no_such.default is not registered in this process"):
        graph_from_data([["call_function", "a", "aten.no_such.default", {"tuple": []}, {"mapping": []}, None]], {}, x)
