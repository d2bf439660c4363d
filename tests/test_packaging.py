"""The package holds what the tree holds, its parts import each other as they may, and the README says what is true."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import fxmask
from fxmask.tools import cli
from fxmask.tools.bench_shapes import SETS

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PLACES: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]  # packages that are not where their names say
DATA: dict[str, list[str]] = {k: v for k, v in PROJECT["tool"]["setuptools"]["package-data"].items() if k != "fxmask"}
FOLDERS = {name: folder for name, folder in PLACES.items() if name not in DATA}
PACKAGES: list[str] = [name for name in PROJECT["tool"]["setuptools"]["packages"] if name not in DATA]
RULES: dict[str, Any] = PROJECT["tool"]["importlinter"]


def folder_of(package: str) -> Path:
    """Where a package lies in the tree."""
    known = max((name for name in FOLDERS if f"{package}.".startswith(f"{name}.")), key=len)
    return ROOT.joinpath(FOLDERS[known], *package.removeprefix(known).strip(".").split("."))


def modules() -> dict[str, Path]:
    """Every module of the tree, whether or not its package is listed: name -> file."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


# What is installed


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy of what it is made of: in the tree, what an earlier build left in ``build`` would get in."""
    copy = tmp_path_factory.mktemp("tree")
    for folder in PLACES.values():
        shutil.copytree(ROOT / folder, copy / folder)
    for name in ("pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]):
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(copy / "dist"), "."]
    result = subprocess.run(command, cwd=copy, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (path,) = (copy / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_contains_every_module_and_nothing_else(wheel):
    expected = {"fxmask/py.typed"}
    for name, path in modules().items():
        expected.add(name.replace(".", "/") + ("/__init__.py" if path.name == "__init__.py" else ".py"))
    for package, patterns in DATA.items():
        files = [path for pattern in patterns for path in (ROOT / PLACES[package]).glob(pattern)]
        expected |= {f"{package.replace('.', '/')}/{path.relative_to(ROOT / PLACES[package]).as_posix()}" for path in files}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected


def test_the_demo_runs_from_a_wheel(wheel, tmp_path):
    """With nothing of the tree beside it; the checkpoint is in the wheel."""
    wheel.extractall(tmp_path / "installed")
    assert sum(entry.file_size for entry in wheel.infolist()) < 12e6
    options = ["--steps", "4", "--effort", "instant", "--batches", "1", "--backend", "eager", "--json"]
    command = [sys.executable, "-m", "fxmask.tools.cli", "demo", *options, "--output", "demo.png"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "PYTHONSAFEPATH": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["mac_ratio"] == pytest.approx(2.0, rel=0.05)
    assert (tmp_path / "demo.png").exists()


def test_wheel_says_what_it_is(wheel):
    (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    assert f"\nVersion: {fxmask.__version__}\n" in wheel.read(metadata).decode()
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())


@pytest.mark.parametrize("package", PACKAGES)
def test_listed_packages_exist(package):
    assert (folder_of(package) / "__init__.py").exists()


def test_every_package_is_listed():
    assert sorted(PACKAGES) == sorted(name for name, path in modules().items() if path.name == "__init__.py")
    for name in modules():
        assert name in PACKAGES or name.rpartition(".")[0] in PACKAGES, f"{name} is in a folder without __init__.py"


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS.values() if folder != "fxmask"])
def test_the_folders_are_no_packages_of_their_own(folder):
    command = [sys.executable, "-c", f"import {folder}"]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": ""}
    )
    assert result.returncode != 0
    assert f"import fxmask.{folder}, not {folder}" in result.stderr


def test_versions_agree():
    assert PROJECT["project"]["version"] == fxmask.__version__


# Names


def shadowed(package: str, source: str, submodules: Iterable[str]) -> set[str]:
    """Names that an ``__init__`` defines or imports from elsewhere, and that are submodules of the package, too.

    ``fxmask/learn.py`` would take the place of the function ``fxmask.learn`` when it is imported late.
    """
    tree = ast.parse(source)
    names: dict[str, str] = {}  # name -> where it is from
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names[node.name] = ""
        elif isinstance(node, ast.Assign) and any(isinstance(x, ast.Name) and x.id == "__all__" for x in node.targets):
            names = {**dict.fromkeys(ast.literal_eval(node.value), ""), **names}
    return {name for name in submodules if name in names and names[name] != f"{package}.{name}"}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_submodule_is_named_like_a_public_function(package):
    known = modules()
    submodules = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == package]
    assert not shadowed(package, known[package].read_text(), submodules)


def test_public_names_are_what_they_seem():
    for name in fxmask.__all__:
        value = getattr(fxmask, name)
        assert callable(value) or f"fxmask.{name}" in modules(), name


def test_a_submodule_named_like_a_function_is_found():
    source = "from p import policies\nfrom p.api import learn\n__all__ = ['learn', 'load', 'policies']\ndef record(): ...\n"
    assert shadowed("p", source, ["policies", "learn", "load", "record", "other"]) == {"learn", "load", "record"}


# Who imports whom


def imports() -> dict[str, set[str]]:
    """Every module of the tree -> the modules of the tree that it imports, anywhere in its text."""
    known = modules()
    return {name: set(_imported(name, path, known)) for name, path in known.items()}


def _imported(name: str, path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            candidates = [f"{module}.{alias.name}" if f"{module}.{alias.name}" in known else module for alias in node.names]
        else:
            continue
        yield from (candidate for candidate in candidates if candidate in known)


def within(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def chain(graph: Mapping[str, set[str]], sources: Iterable[str], target: str) -> list[str]:
    """A shortest chain of imports from one of ``sources`` to ``target`` or what is in it; empty if there is none."""
    before: dict[str, str | None] = dict.fromkeys(sources)
    waiting = list(before)
    for module in waiting:  # grows
        for imported in sorted(graph.get(module, ())):
            if imported not in before:
                before[imported] = module
                waiting.append(imported)
    reached = next((module for module in waiting if within(module, target)), None)
    found = []
    while reached is not None:
        found.append(reached)
        reached = before[reached]
    return found[::-1]


def forbidden(contract: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The pairs (who, whom) that a contract of import-linter rules out, indirect imports included."""
    if contract["type"] == "forbidden":
        yield from ((who, whom) for who in contract["source_modules"] for whom in contract["forbidden_modules"])
        return
    assert contract["type"] == "layers"
    assert ":" not in "".join(contract["layers"]), "layers whose parts may import each other are not known here"
    layers = [[part.strip() for part in layer.split("|")] for layer in contract["layers"]]
    for k, layer in enumerate(layers):
        for who in layer:
            yield from ((who, whom) for higher in layers[:k] for whom in higher)
            yield from ((who, whom) for whom in layer if whom != who)


def faults(graph: Mapping[str, set[str]], contract: Mapping[str, Any]) -> list[str]:
    """Chains of imports that a contract rules out."""
    found = []
    for who, whom in forbidden(contract):
        links = chain(graph, [module for module in graph if within(module, who)], whom)
        if links:
            found.append(" -> ".join(links))
    return found


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return imports()


@pytest.mark.parametrize("contract", RULES["contracts"], ids=lambda contract: contract["name"])
def test_import_rules(graph, contract):
    assert not faults(graph, contract)


def test_import_rules_are_about_every_module(graph):
    """A new folder has a place among the layers, and no rule is about what is no longer there."""
    (layers,) = (contract["layers"] for contract in RULES["contracts"] if contract["type"] == "layers")
    parts = {part.strip() for layer in layers for part in layer.split("|")}
    assert [module for module in graph if module != "fxmask" and not any(within(module, part) for part in parts)] == []
    named = {name for contract in RULES["contracts"] for pair in forbidden(contract) for name in pair}
    assert sorted(named - set(graph)) == []


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("fxmask.ir.block", "fxmask.passes.rectify"),
        ("fxmask.ir.block", "fxmask.metrics"),
        ("fxmask.errors", "fxmask"),
        ("fxmask.passes.log", "fxmask.backends.eager"),
        ("fxmask.passes.log", "fxmask.reference"),
        ("fxmask.learning.fit", "fxmask.runtime.model"),
        ("fxmask.learning.paper.budget", "fxmask.storage.plans"),
        ("fxmask.runtime.clock", "fxmask.learning.paper"),
        ("fxmask.runtime.clock", "fxmask.sampling.noise"),
        ("fxmask.storage.plain", "fxmask.sampling.noise"),
        ("fxmask.runtime.clock", "fxmask.tools.cli"),
    ],
)
def test_a_wrong_import_is_found(graph, module, imported):
    assert {module, imported} <= set(graph)
    wrong = {**graph, module: graph[module] | {imported}}
    found = [fault for contract in RULES["contracts"] for fault in faults(wrong, contract)]
    assert any(f"{module} -> {imported}" in fault for fault in found)


def test_imports_are_found_however_they_are_written(tmp_path):
    known = dict.fromkeys(("p", "p.a", "p.a.b", "p.c", "p.d", "p.e", "p.a.f", "p.g"), tmp_path / "x.py")
    text = "import torch, p.a.b\nfrom p import c as x\nfrom p.d import y\ndef f():\n    from p.e import *\nfrom .f import z\n"
    (tmp_path / "x.py").write_text(text + "from .. import g\nfrom p import unknown\n")
    assert set(_imported("p.a.x", tmp_path / "x.py", known)) == {"p.a.b", "p.c", "p.d", "p.e", "p.a.f", "p.g", "p"}


# What the README says


def test_readme_commands():
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"```bash\n(.*?)\n```", readme, re.S)
    assert len(commands) == 3
    for line in commands[2].splitlines():
        name, *arguments = shlex.split(line, comments=True)
        assert name == "fxmask"
        command = cli.command_line.commands[arguments[0]]
        model = command.make_context(name, list(arguments[1:])).params["model"]
        assert model in SETS or (ROOT / model.split(":")[0]).exists()
    assert commands[0].endswith("python examples/ddpm.py")
    assert "pytest" in commands[1]
    assert "grep" in (ROOT / ".ci" / "run").read_text(), "CI reads the command from the README"
    example = re.search(r"```python\n(.*?)\n```", readme, re.S)
    assert example is not None
    assert len(example[1].splitlines()) <= 15
