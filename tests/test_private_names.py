"""Private and unstable names of PyTorch are used in one file, ``fxmask/_torch.py``."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [p for folder in ("fxmask", "passes", "backends") for p in (ROOT / folder).rglob("*.py") if p.name != "_torch.py"]
UNSTABLE = ("torch.fx.experimental",)
OF_MODULES_AND_TENSORS = {
    "_parameters",
    "_buffers",
    "_modules",
    "_version",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_non_persistent_buffers_set",
    "_compiled_call_impl",
}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def is_private(name: str) -> bool:
    """Whether a dotted name goes through something private of torch. Operators (``torch.ops``) are the graph's."""
    parts = name.split(".")
    if parts[0] != "torch" or parts[1:2] == ["ops"]:
        return False
    return any(part.startswith("_") and not part.startswith("__") for part in parts) or name.startswith(UNSTABLE)


def private_names(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if is_private(alias.name)}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{a.name}" for a in node.names if is_private(f"{node.module}.{a.name}")}
        elif isinstance(node, ast.Attribute):
            if is_private(dotted(node)):
                found.add(dotted(node))
            if node.attr in OF_MODULES_AND_TENSORS:
                found.add(node.attr)
        elif isinstance(node, ast.Constant) and node.value in OF_MODULES_AND_TENSORS:
            found.add(node.value)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_private_name_of_torch(path):
    assert private_names(path.read_text()) == set()


def test_the_test_finds_them():
    lines = ["import torch._dynamo", "from torch.fx.experimental import x", "from torch.utils import _pytree", "y._version"]
    found = private_names("\n".join([*lines, "torch._C.z"]))
    assert found == {"torch._dynamo", "torch.fx.experimental.x", "torch.utils._pytree", "_version", "torch._C", "torch._C.z"}
    assert not private_names("torch.ops.aten._to_copy.default\ntorch.__version__\nself._modules_of")
