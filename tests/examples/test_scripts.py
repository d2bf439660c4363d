"""Every script under ``examples/`` starts where it is: its imports, its options, the folders it names, and what names it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.rglob("*.py"))
PROGRAMS = [path for path in SCRIPTS if '__name__ == "__main__"' in path.read_text(encoding="utf-8")]
MENTION = re.compile(r"\bexamples/[\w/-]+\.(?:py|md|png)")

# One process for all, because importing torch takes most of the time; what a script imports of its neighbours is forgotten
# before the next one, which must find its own.
START = """
import contextlib, io, json, runpy, sys
from pathlib import Path

import diffusers, torch, transformers

examples = Path(sys.argv.pop(1))


def refuse(*_, **__):
    raise AssertionError("a model runs while the script is imported")


torch.nn.Module.__call__ = refuse
before = list(sys.path[1:])  # without what stands for this script's own folder


def start(path, name, *arguments):
    sys.path[:], sys.argv[:] = [str(path.parent), *before], [str(path), *arguments]
    for module in [m for m, x in sys.modules.items() if str(getattr(x, "__file__", None)).startswith(str(examples))]:
        del sys.modules[module]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            names = runpy.run_path(str(path), run_name=name)
        except SystemExit as end:
            assert not end.code, f"ends with {end.code}"
            return printed.getvalue()
    missing = [f"{k}={x} does not exist" for k, x in names.items() if isinstance(x, Path) and not x.exists()]
    assert not missing, missing
    return printed.getvalue()


found = {}
for line in sys.stdin.read().splitlines():
    name, path = line.split(" ", 1)
    try:
        found[line] = [True, start(Path(path), name, *(["--help"] if name == "__main__" else []))]
    except BaseException as error:
        found[line] = [False, f"{type(error).__name__}: {error}"]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def started() -> dict[str, list]:
    """How each script was imported, and each program with ``--help``: whether it worked, and what it said."""
    lines = [f"imported {path}" for path in SCRIPTS] + [f"__main__ {path}" for path in PROGRAMS]
    result = subprocess.run(
        [sys.executable, "-c", START, str(EXAMPLES)],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def name_of(path: Path) -> str:
    return str(path.relative_to(EXAMPLES))


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_imports(path, started):
    """Without work: nothing is printed, and no model is called. Folders that it names are there."""
    worked, said = started[f"imported {path}"]
    assert worked, said
    assert not said


@pytest.mark.parametrize("path", PROGRAMS, ids=name_of)
def test_shows_its_options(path, started):
    worked, said = started[f"__main__ {path}"]
    assert worked, said
    assert said.startswith(f"usage: {path.name}")


def test_the_families_are_at_the_top_and_the_rest_in_folders():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        *("common.py", "digits.py"),
        *("ddpm.py", "dit.py", "ldm.py", "pixart.py"),
    }
    assert len(PROGRAMS) >= 8


def test_mentioned_files_exist():
    """Commands in texts, docstrings and help name files where they are."""
    texts = [ROOT / "README.md"]
    for folder in ("docs", "examples", "fxmask", "passes", "backends", "tests"):
        texts += [path for kind in ("*.md", "*.py") for path in (ROOT / folder).rglob(kind)]
    mentions = {(match[0], path) for path in texts for match in MENTION.finditer(path.read_text(encoding="utf-8"))}
    assert len(mentions) > 10
    wrong = [f"{path.relative_to(ROOT)} names {target}" for target, path in sorted(mentions) if not (ROOT / target).exists()]
    assert not wrong
