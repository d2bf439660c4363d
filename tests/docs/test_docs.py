"""The code of README and docs runs, its links lead somewhere, and its words are explained.

Blocks of one page share names, in order, and find those of ``prelude``. A block under ``<!-- not run: reason -->`` is
compiled, and what it says of ``fxmask`` is compared with the real names and signatures.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from pathlib import Path
from typing import Any

import matplotlib
import pipelines
import pytest
from pages import PAGES, README, ROOT, WITH_CODE, Block, blocks_of, name_of, names_of_pages, registries

import fxmask

FOLDERS = ("fxmask/*", "fxmask/learning/paper", "passes", "backends", "tests", "examples")
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)|<img[^>]* src=\"(?P<source>[^\"]+)\"")
# What a name in the blocks that are not run is, besides ``fxmask`` itself.
KNOWN: dict[str, Any] = {"fxmask": fxmask, "accelerated": fxmask.AcceleratedModel, "program": fxmask.Program}


@pytest.fixture(scope="module")
def prelude() -> dict[str, Any]:
    """The names that every page may use."""
    return names_of_pages()


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_code(page: Path, prelude: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    scope = {**prelude, "folder": tmp_path, "__name__": "page"}
    with registries():
        for block in blocks_of(page):
            if block.runs:
                exec(block.compiled(), scope)
            else:
                check_names(block)


def check_names(block: Block) -> None:
    """What a block says of fxmask exists, and is called with arguments that it takes."""
    block.compiled()
    where = f"{name_of(block.page)}:{block.line}"
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.Attribute):
            resolve(node, where)
        if isinstance(node, ast.Call):
            function = resolve(node.func, where)
            if function is not None and not any(keyword.arg is None for keyword in node.keywords):
                bind(function, node, where)


def resolve(node: ast.AST, where: str) -> Any:
    """The object behind ``fxmask.a.b`` or ``accelerated.a``; ``None`` if it is not ours."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in KNOWN:
        return None
    found = KNOWN[node.id]
    for part in reversed(parts):
        if not inspect.ismodule(found) and not inspect.isclass(found):
            return None
        if inspect.isclass(found) and part in getattr(found, "__dataclass_fields__", {}):
            return None
        assert hasattr(found, part), f"{where}: {node.id} has no {'.'.join(reversed(parts))}"
        found = getattr(found, part)
    return found if parts else None


def bind(function: Any, call: ast.Call, where: str) -> None:
    if not callable(function) or any(isinstance(x, ast.Starred) for x in call.args):
        return
    method = inspect.isfunction(function) and "." in function.__qualname__
    positional = [object()] * (len(call.args) + method)
    try:
        inspect.signature(function).bind(*positional, **{str(k.arg): None for k in call.keywords})
    except TypeError as error:
        raise AssertionError(f"{where}: {ast.unparse(call)}: {error}") from error


def test_the_pipeline_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same lines, with a tiny pipeline in place of the one on the hub, few steps, and no compiler."""
    diffusers = pytest.importorskip("diffusers")
    pipe, _ = pipelines.small_stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(pipe, "to", lambda device: pipe)
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", lambda name, torch_dtype: pipe)
    monkeypatch.setattr(fxmask, "accelerate", functools.partial(fxmask.accelerate, backend="eager", progress=False))
    monkeypatch.chdir(tmp_path)
    first = blocks_of(README)[0]
    original = pipe.unet
    scope: dict[str, Any] = {"__name__": "page"}
    exec(first._replace(code=first.code.replace("steps=30", "steps=4")).compiled(), scope)
    assert scope["pipe"] is pipe
    assert pipe.unet.original is original
    assert pipe.unet.report().account.images == 1
    assert (tmp_path / "plans" / "settings.json").exists()


def test_every_mark_belongs_to_a_block() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("<!-- not run") == sum(not block.runs for block in blocks_of(page)), page
        assert text.count("```python") == len(blocks_of(page)), page


def test_names_are_checked_where_code_is_not_run(tmp_path: Path) -> None:
    """The check itself: a name, an option and a method that do not exist."""
    for code in ("fxmask.lern(program)", "fxmask.learn(program, calls, spedup=2)", "accelerated.generations()"):
        with pytest.raises(AssertionError, match="page:1"):
            check_names(Block(ROOT / "page", 1, code, "for a reason"))
    check_names(Block(ROOT / "page", 1, "fxmask.learn(program, calls, speedup=2); accelerated.save('x')", "for a reason"))


@pytest.mark.parametrize("page", [*PAGES, *(ROOT.glob("*/README.md")), *ROOT.glob("fxmask/**/README.md")], ids=name_of)
def test_links(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    for match in LINK.finditer(text):
        target = (match["target"] or match["source"]).split("#")[0]
        if target and "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{name_of(page)} links to {target}, which does not exist"


def test_snippets() -> None:
    """Pages that include another file."""
    for page in PAGES:
        for target in re.findall(r'^--8<-- "(.+)"$', page.read_text(encoding="utf-8"), re.M):
            assert (ROOT / target).exists(), page


def test_every_page_is_in_the_navigation() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r": (\S+\.md)$", config, re.M))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in PAGES if page != README}


def test_readme_is_short_and_has_its_commands() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert '```bash\npip install -e ".[examples]" && python examples/ddpm.py\n```' in text
    assert '```bash\npip install -e ".[test]" && pytest -m "not slow"\n```' in text


WORDS = (
    *("denoiser", "step", "timestep", "block", "branch", "stage", "cut value", "mask", "score", "plan", "program", "lane"),
    *("role", "generation", "forecast", "blend", "level", "probe", "slot", "live-out", "recording", "step graph", "MACs"),
)


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "words.md"], ids=name_of)
def test_glossary(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = {word for word in WORDS if not re.search(rf"^\| {re.escape(word)}\b[^|]*\|", text, re.M | re.I)}
    assert not missing


def test_every_folder_of_code_says_what_it_is_for() -> None:
    folders = [p for pattern in FOLDERS for p in ROOT.glob(pattern) if p.is_dir() and p.name != "__pycache__"]
    assert len(folders) >= 12
    for folder in folders:
        assert (folder / "README.md").exists(), folder


def test_messages_are_real() -> None:
    """Every message that the troubleshooting page quotes is in the code, its parts in braces aside."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    code = "\n".join(
        re.sub(r'["\']\s*\n\s*(?:\+ )?f?["\']', "", path.read_text(encoding="utf-8"))
        for folder in ("fxmask", "passes", "backends")
        for path in (ROOT / folder).rglob("*.py")
    )
    headings = re.findall(r"^### (.+)$", page, re.M)
    assert headings
    for heading in headings:
        for part in heading.strip("`").split("…"):
            assert part.strip() in code, f"no message holds {part.strip()!r}"
