"""Saved folders that somebody made on purpose: nothing runs, nothing is written elsewhere, and the refusal is ours."""

from __future__ import annotations

import json
import resource
import time
import zipfile
from pathlib import Path

import pytest
import torch
from reseal import edit_package, plan_state, reseal, write_sealed
from safetensors.torch import load_file, save_file
from test_packages import Conditioned, accelerated, conditioned_calls, model_of, program, run, shelf  # noqa: F401

import fxmask
from fxmask import BackendError, FxmaskError, InputError, MaskError
from fxmask.backends import archive, package
from fxmask.files.sealed import seal
from fxmask.storage.graph_data import graph_from_data
from fxmask.storage.operators import operator_named
from fxmask.storage.plans import load_plan
from fxmask.storage.schema import CONSTANTS, PACKAGE, PARTS, PLAN, TENSORS


@pytest.fixture
def plan(accelerated, tmp_path) -> Path:  # noqa: F811
    accelerated.save(tmp_path / "plan")
    return tmp_path / "plan"


@pytest.fixture
def folder(accelerated, shelf, tmp_path) -> Path:  # noqa: F811
    accelerated.export(tmp_path / "package", progress=False)
    return tmp_path / "package"


@pytest.mark.usefixtures("shelf")
def test_machine_code_runs_only_where_it_is_allowed(folder, monkeypatch):
    model, loaded = model_of(Conditioned), []
    real = package.load_package
    monkeypatch.setattr(package, "load_package", lambda *arguments: loaded.append(arguments) or real(*arguments))
    for backend in (None, "package"):
        with pytest.raises(InputError, match=r"allow_compiled=True if you trust.*backend='auto'"):
            fxmask.load(folder, model, backend=backend, progress=False)
    fxmask.load(folder, model, backend="eager", progress=False)
    assert not loaded
    fxmask.load(folder, model, allow_compiled=True, progress=False)
    assert loaded


def test_a_package_file_beside_a_plan_is_not_part_of_it(plan):
    (plan / PACKAGE).write_text("{}")
    (plan / PARTS).mkdir()
    again = fxmask.load(plan, model_of(Conditioned), progress=False)
    assert again.how_compiled[0] == "eager"


CODE = [
    "load_library.__self__.default",
    "aten.add.__self__",
    "aten.__class__.default",
    "aten.no_such.default",
    "os.system.default",
    "aten.add_.Tensor",
    "aten.add.out",
    "aten.from_file.default",
    "aten.save.default",
    "aten.set_.source_Storage",
    "aten.resize_.default",
    "c10d.allreduce_.default",
    "_c10d_functional.all_reduce.default",
    "profiler._record_function_enter.default",
    "inductor.resize_storage_bytes_.default",
    "aten.add.Tensor.extra",
    "aten",
    "",
    "..",
    None,
    ["aten.add.Tensor"],
]


@pytest.mark.parametrize("name", CODE, ids=str)
def test_only_operators_that_compute_are_called(name):
    with pytest.raises(MaskError, match=r"operator"):
        operator_named(name)


def test_operators_that_compute_are_found():
    for name in ("aten.add.Tensor", "aten.relu.default", "aten.layer_norm.default", "prims.convert_element_type.default"):
        assert str(operator_named(name)) == name


EVIL = "__import__('pathlib').Path('escaped').touch()"
NODES = {
    "placeholder": ["placeholder", "x", f"x={EVIL}", {"tuple": []}, {"mapping": []}, None],
    "name": ["placeholder", f"x={EVIL}", "x", {"tuple": []}, {"mapping": []}, None],
    "attribute": ["get_attr", "w", f'w"), {EVIL}, getattr(self, "w', {"tuple": []}, {"mapping": []}, None],
    "dunder": ["get_attr", "w", "__class__.w", {"tuple": []}, {"mapping": []}, None],
    "keyword": [
        "call_function",
        "y",
        "aten.relu.default",
        {"tuple": []},
        {"mapping": [[f"self=x, b={EVIL}", 1]]},
        None,
    ],
    "default": ["placeholder", "x", "x", {"tuple": [EVIL]}, {"mapping": []}, None],
    "method": ["call_method", "y", "numpy", {"tuple": []}, {"mapping": []}, None],
    "module": ["call_module", "y", "w", {"tuple": []}, {"mapping": []}, None],
    "not a call": ["call_function", "y", "aten.relu.default", [], {"mapping": []}, None],
    "huge": ["call_function", "y", "aten.relu.default", {"tuple": [10**40]}, {"mapping": []}, None],
    "type": ["call_function", "y", "aten.relu.default", {"tuple": [{"dtype": "load"}]}, {"mapping": []}, None],
}


@pytest.mark.parametrize("kind", NODES)
def test_names_become_no_code(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, TypeError, KeyError)):
        graph_from_data([NODES[kind]], {"w": torch.ones(1)}, torch.device("cpu"))
    assert not list(tmp_path.iterdir())


ENTRIES = ["../escaped", "a/../../escaped", "/tmp/escaped", "a\\..\\escaped", "C:escaped", "a//b", "./a", "a\0b", "a;b", ".."]


@pytest.mark.parametrize("name", ENTRIES)
def test_archives_stay_in_their_folder(name, tmp_path):
    path = tmp_path / "part.pt2"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("data/aotinductor/model/a.so", b"x")
        info = zipfile.ZipInfo("placeholder")
        info.filename = name
        made.writestr(info, b"x")
    if name == "a\0b":
        path.write_bytes(path.read_bytes().replace(b"a\0b", b"a\0b"))
    with pytest.raises(BackendError, match=r"would not be written into its folder"):
        package.load_package(path, None)


def test_archives_of_other_kinds_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "part.pt2"
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "w") as made:
        made.writestr(link, "/etc/passwd")
    with pytest.raises(BackendError, match="would not be written"):
        package.load_package(path, None)
    with zipfile.ZipFile(path, "w") as made, pytest.warns(UserWarning, match="Duplicate"):
        made.writestr("a", "1")
        made.writestr("a", "2")
    with pytest.raises(BackendError, match="one name"):
        package.load_package(path, None)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("a", bytes(2**20))
    monkeypatch.setattr(archive, "MOST_BYTES", 2**20 - 1)
    with pytest.raises(BackendError, match="unpacks to"):
        package.load_package(path, None)
    path.write_bytes(b"PK\3\4 no archive")
    with pytest.raises(BackendError, match="is no package"):
        package.load_package(path, None)


def refused(folder: Path, model: torch.nn.Module, limit: float = 5.0) -> str:
    """The message with which a folder is refused, in little time and memory."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(FxmaskError) as raised:
        fxmask.load(folder, model, progress=False, allow_compiled=True)
    assert time.perf_counter() - started < limit
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes
    return str(raised.value)


@pytest.mark.parametrize("name", [PLAN, TENSORS, PACKAGE, CONSTANTS])
def test_large_files_are_refused_unread(name, folder):
    with (folder / name).open("r+b") as file:
        file.truncate(3 * 2**30)
    if name != PLAN:
        files = plan_state(folder)["files"]
        files[name]["size"] = 3 * 2**30
        state = {**plan_state(folder), "files": files}
        write_sealed(folder / PLAN, json.dumps(state))
    assert "more than the" in refused(folder, model_of(Conditioned))


LARGE = {
    "deep": "[" * 1_000_000 + "]" * 1_000_000,
    "deep objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "many lists": "[" + "[]," * 8_000_000 + "[]]",
    "many numbers": "[" + "1," * 8_000_000 + "1]",
    "long string": '"' + "a" * 20_000_000 + '"',
    "long number": "1" * 1_000_000,
    "too long": " " * 40_000_000 + "1",
}


@pytest.mark.parametrize("kind", LARGE)
def test_json_that_would_take_much_memory_or_stack(kind, plan):
    state = json.dumps(plan_state(plan))
    write_sealed(plan / PLAN, state.replace('"facts": {', f'"facts": {{"surplus": {LARGE[kind]}, ', 1))
    if kind in ("many numbers", "long string"):  # of bounded size, among facts that nobody reads
        assert load_plan(plan)[0].num_steps == 5
    else:
        assert "is damaged" in refused(plan, model_of(Conditioned))


def tensors_changed(change):
    def damage(plan: Path) -> None:
        tensors = load_file(plan / TENSORS)
        change(tensors)
        save_file(tensors, plan / TENSORS)
        reseal(plan)

    return damage


def state_changed(change):
    def damage(plan: Path) -> None:
        state = plan_state(plan)
        change(state)
        reseal(plan, **state)

    return damage


def entry(step, block="layers.0.attn", sources=(0,)):
    return [step, block, list(sources)]


def forecast(*entries, coefficients=None):
    def damage(plan: Path) -> None:
        count = sum(len(e[2]) for e in entries)
        tensors_changed(lambda t: t.update(coefficients=torch.tensor(coefficients or [0.5] * count, dtype=torch.float64)))(plan)
        reseal(plan, forecast=list(entries))

    return damage


NAN, INF = float("nan"), float("inf")
PLANS = {
    "repeated entry": forecast(entry(1), entry(1)),
    "unsorted entries": forecast(entry(3), entry(1)),
    "negative step": forecast(entry(-1)),
    "step beyond the end": forecast(entry(99)),
    "huge step": forecast(entry(2**70)),
    "no such block": forecast(entry(1, "nobody")),
    "no such source": forecast(entry(1, sources=(7,))),
    "negative source": forecast(entry(1, sources=(-1,))),
    "later source": forecast(entry(1, sources=(2,))),
    "repeated source": forecast(entry(1, sources=(0, 0))),
    "no source": forecast(entry(1, sources=())),
    "source of nobody": forecast(entry(1, sources=(["nobody", 0],))),
    "source is text": forecast(entry(1, sources=("0",))),
    "source is a fraction": forecast(entry(1, sources=(0.5,))),
    "NaN coefficient": forecast(entry(1), coefficients=[NAN]),
    "infinite coefficient": forecast(entry(1), coefficients=[-INF]),
    "too many coefficients": forecast(entry(1), coefficients=[0.5, 0.5]),
    "coefficients of another type": tensors_changed(lambda t: t.update(coefficients=t["coefficients"].float())),
    "NaN timestep": tensors_changed(lambda t: t["timesteps"].fill_(NAN)),
    "fewer timesteps": tensors_changed(lambda t: t.update(timesteps=t["timesteps"][1:].clone())),
    "mask of numbers": tensors_changed(lambda t: t.update(compute=t["compute"].int())),
    "mask of one row": tensors_changed(lambda t: t.update(compute=t["compute"][0].clone())),
    "mask without a first row": tensors_changed(lambda t: t["compute"].zero_()),
    "no mask": tensors_changed(lambda t: t.pop("compute")),
    "no example": tensors_changed(lambda t: t.pop("example.x")),
    "blocks repeated": state_changed(lambda s: s.update(blocks=[s["blocks"][0]] * len(s["blocks"]))),
    "blocks missing": state_changed(lambda s: s.update(blocks=s["blocks"][1:])),
    "blocks of nobody": state_changed(lambda s: s.update(blocks=[f"{name} " for name in s["blocks"]])),
    "no facts": state_changed(lambda s: s.update(facts={})),
    "facts of another type": state_changed(lambda s: s.update(facts=[])),
    "start beyond the end": state_changed(lambda s: s["facts"].update(start=5)),
    "negative start": state_changed(lambda s: s["facts"].update(start=-1)),
    "start is text": state_changed(lambda s: s["facts"].update(start="0")),
    "no such role": state_changed(lambda s: s["facts"].update(roles={"words": "director"})),
    "role of nobody": state_changed(lambda s: s["facts"].update(roles={"nobody": "step"})),
    "no such backend": state_changed(lambda s: s["facts"].update(backend="no such")),
    "no such mode": state_changed(lambda s: s["facts"].update(backend="inductor", mode="no such")),
    "scheduler of no class": state_changed(lambda s: s["facts"].update(scheduler={"config": {}})),
    "example is no call": state_changed(lambda s: s.update(example={"value": 1})),
    "example is empty": state_changed(lambda s: s.update(example={"mapping": []})),
    "example is a list": state_changed(lambda s: s.update(example=[])),
    "example without an argument": state_changed(lambda s: s["example"]["mapping"].pop()),
    "example with a surplus argument": state_changed(lambda s: s["example"]["mapping"].append(["more", {"value": 1}])),
    "example with a repeated argument": state_changed(lambda s: s["example"]["mapping"].append(s["example"]["mapping"][0])),
    "example with a number for a tensor": state_changed(lambda s: s["example"]["mapping"][0].__setitem__(1, {"value": 1})),
    "example with no such tensor": state_changed(lambda s: s["example"]["mapping"][0].__setitem__(1, {"tensor": "nobody"})),
    "example of an unknown kind": state_changed(lambda s: s["example"]["mapping"][0].__setitem__(1, {"object": "os"})),
    "another format": state_changed(lambda s: s.update(format="other")),
    "version 3": state_changed(lambda s: s.update(version=3)),
    "version 1": state_changed(lambda s: s.update(version=1)),
    "surplus entry": state_changed(lambda s: s.update(more=1)),
    "no program": state_changed(lambda s: s.update(program=None)),
    "another program": state_changed(lambda s: s.update(program="0" * 16)),
    "no files": state_changed(lambda s: s.update(files={})),
}


@pytest.mark.parametrize("kind", PLANS)
def test_plans_that_cannot_be_are_refused(kind, plan):
    PLANS[kind](plan)
    refused(plan, model_of(Conditioned), limit=20)


def test_truth_values_are_zero_or_one(plan):
    content = (plan / TENSORS).read_bytes()
    header = int.from_bytes(content[:8], "little")
    start, _ = json.loads(content[8 : 8 + header])["compute"]["data_offsets"]
    at = 8 + header + start
    (plan / TENSORS).write_bytes(content[:at] + b"\x02" + content[at + 1 :])
    reseal(plan)
    with pytest.raises(MaskError, match="neither true nor false"):
        load_plan(plan)


@pytest.mark.parametrize("header", [2**63, 2**40, 10, 0])
def test_headers_of_tensors_are_bounded(header, plan):
    content = (plan / TENSORS).read_bytes()
    (plan / TENSORS).write_bytes(header.to_bytes(8, "little") + content[8:])
    reseal(plan)
    with pytest.raises(MaskError, match="is damaged"):
        load_plan(plan)


def test_every_step_graph_is_compared_once(folder, shelf):  # noqa: F811
    """A part that computes something else is found, whichever it is."""
    model = model_of(Conditioned)
    for number in range(len(shelf)):
        right = shelf[number]
        shelf[number] = lambda *arguments, _run=right: [1.01 * x if x.is_floating_point() else x for x in _run(*arguments)]
        with pytest.raises(MaskError, match="computes something else"):
            fxmask.load(folder, model, progress=False, allow_compiled=True)
        shelf[number] = right
    fxmask.load(folder, model, progress=False, allow_compiled=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda strides: [[*strides[0][::-1]], *strides[1:]],
        lambda strides: [[x + 8 for x in s] for s in strides],
        lambda strides: [[0 for _ in s] for s in strides],
        lambda strides: [[*s, 1] for s in strides],
        lambda strides: strides[1:],
        lambda strides: [],
        lambda strides: [*strides, [1]],
        lambda strides: [[2**62 for _ in s] for s in strides],
    ],
)
def test_layouts_of_parts_fit_what_they_are_called_with(change, folder):
    """Refused, or another order of the same memory, in which the stand-in for compiled code computes the same."""
    model, calls = model_of(Conditioned), conditioned_calls()
    expected = run(fxmask.load(folder, model, progress=False, allow_compiled=True), calls)
    state = json.loads((folder / PACKAGE).read_text())
    for name, part in state["parts"].items():
        edit_package(folder, parts={**state["parts"], name: {"strides": change(part["strides"])}})
        try:
            loaded = fxmask.load(folder, model, progress=False, allow_compiled=True)
        except FxmaskError:
            continue
        got = run(loaded, calls)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, expected, strict=True))


def test_constants_are_what_is_said_of_them(folder):
    model = model_of(Conditioned)
    state = json.loads((folder / PACKAGE).read_text())
    weights = state["program"]["weights"]
    constant = next(name for name, weight in weights.items() if weight["name"] is None)
    for change in (
        {"stride": [2**40, 1]},
        {"stride": [10**9, 1]},
        {"stride": [1]},
        {"shape": [300, 400]},
        {"dtype": "float64"},
        {"device": "cuda:9"},
        {"device": "nowhere"},
    ):
        other = {**weights, constant: {**weights[constant], **change}}
        edit_package(folder, program={**state["program"], "weights": other})
        refused(folder, model, limit=20)


def test_a_machine_with_another_number_of_cores_will_do(folder):
    machine = json.loads((folder / PACKAGE).read_text())["machine"]
    assert "num_logical_cores" not in machine["cpu"]
    old = {**machine["cpu"], "num_logical_cores": 99, "num_sockets": 7, "l2_cache_size": 1, "cpu_name": "another"}
    edit_package(folder, machine={**machine, "cpu": old})
    fxmask.load(folder, model_of(Conditioned), progress=False, allow_compiled=True)


def test_export_looks_at_the_folder_before_it_compiles(accelerated, shelf, tmp_path):  # noqa: F811
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("mine")
    with pytest.raises(MaskError, match="holds no plan"):
        accelerated.export(tmp_path / "other")
    assert not shelf


def test_a_plan_of_the_first_version_is_loaded_and_written_anew(plan, accelerated, tmp_path):  # noqa: F811
    import hashlib

    state = plan_state(plan)
    old = {key: state[key] for key in ("blocks", "program", "forecast", "facts", "example")}
    digest = hashlib.sha256((plan / TENSORS).read_bytes()).hexdigest()
    (plan / PLAN).write_text(json.dumps({"version": 1, **old, "digest": digest}, indent=1))
    model, calls = model_of(Conditioned), conditioned_calls()
    loaded = fxmask.load(plan, model, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(run(loaded, calls), run(accelerated, calls), strict=True))
    (plan / "notes").write_text("mine")
    loaded.save(plan)
    assert plan_state(plan)["version"] == 2
    assert sorted(path.name for path in plan.iterdir()) == ["README.md", "mask.png", "notes", PLAN, TENSORS]
    assert fxmask.load(plan, model, progress=False).plan == accelerated.plan


def test_seals_show_every_flipped_bit(plan):
    content = (plan / PLAN).read_bytes()
    state = plan_state(plan)
    tensors = {name: digest for name, digest in state["fields"].items() if ": " in name}
    assert content == seal(state, indent=1, others=tensors)
    expected = load_plan(plan)[:2]
    for at in range(0, len(content), 3):
        (plan / PLAN).write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
        try:
            assert load_plan(plan)[:2] == expected
        except MaskError:
            continue
