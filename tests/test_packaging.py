"""The package holds what the tree holds, and the README says what is true."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import fxmask
from fxmask import cli

ROOT = Path(__file__).parent.parent


def test_wheel_contains_every_module(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"fxmask/{p.name}" for p in (ROOT / "fxmask").glob("*.py")} | {"fxmask/py.typed"}
    for folder in ("passes", "backends"):
        expected |= {f"fxmask/{folder}/{p.name}" for p in (ROOT / folder).glob("*.py")}
    assert {name for name in names if ".dist-info/" not in name} == expected


@pytest.mark.parametrize("folder", ["passes", "backends"])
def test_the_folders_are_no_packages_of_their_own(folder):
    command = [sys.executable, "-c", f"import {folder}"]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": ""}
    )
    assert result.returncode != 0
    assert f"import fxmask.{folder}, not {folder}" in result.stderr


def test_readme_commands():
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"```bash\n(.*?)\n```", readme, re.S)
    assert len(commands) == 3
    for line in commands[2].splitlines():
        name, *arguments = shlex.split(line, comments=True)
        assert name == "fxmask"
        options = cli.make_parser().parse_args(arguments)
        assert (ROOT / options.model.split(":")[0]).exists()
    assert commands[0].endswith("python examples/ddpm.py")
    assert "pytest" in commands[1]
    assert "grep" in (ROOT / ".ci" / "run").read_text(), "CI reads the command from the README"
    example = re.search(r"```python\n(.*?)\n```", readme, re.S)
    assert example is not None
    assert len(example[1].splitlines()) <= 15


def test_readme_code_map_names_real_files():
    readme = (ROOT / "README.md").read_text()
    for path in re.findall(r"`(fxmask/\w+\.py)`", readme):
        assert (ROOT / path).exists(), path


def test_versions_agree():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == fxmask.__version__


def test_no_module_is_named_like_a_public_function():
    """`fxmask/learn.py` would overwrite `fxmask.learn` when it is imported late."""
    modules = {p.stem for folder in ("fxmask", "passes", "backends") for p in (ROOT / folder).glob("*.py")}
    functions = {name for name in fxmask.__all__ if callable(getattr(fxmask, name))}
    assert modules & functions == {"rectify"}, "passes.rectify lives in fxmask.passes, out of the way of fxmask.rectify"
    importlib.import_module("fxmask.passes.rectify")
    assert callable(fxmask.rectify)


def test_layers():
    """passes never import backends; neither imports the runtime; data types import nothing of ours."""
    for path in (ROOT / "passes").glob("*.py"):
        assert not re.search(r"fxmask\.(backends|runtime|executor|api|learning)", path.read_text()), path
    for path in (ROOT / "backends").glob("*.py"):
        assert not re.search(r"fxmask\.(runtime|executor|api|learning)", path.read_text()), path
    assert not re.search(r"^from fxmask\.(?!errors)", (ROOT / "fxmask" / "mask.py").read_text(), re.M)
