"""Every rule that ``mutations.py`` removes is still in the library, and the tests that must notice exist."""

from __future__ import annotations

import ast

import mutations
import pytest
from mutations import MUTATIONS, ROOT, Mutation

TESTS = ROOT / "tests"


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_rule_is_where_the_list_says(mutation: Mutation) -> None:
    source = mutation.source.read_text()
    assert source.count(mutation.old) == 1, f"update MUTATIONS: {mutation.old!r} is in {mutation.file}"
    changed = source.replace(mutation.old, mutation.new)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))


@pytest.mark.parametrize("name", sorted({name for mutation in MUTATIONS for name in mutation.tests}))
def test_the_tests_exist(name: str) -> None:
    file, _, function = name.partition("::")
    functions = {node.name for node in ast.parse((TESTS / file).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert not function or function in functions


def test_names_tell_mutations_apart() -> None:
    names = [mutation.name for mutation in MUTATIONS]
    assert len(set(names)) == len(names)


def test_the_copy_has_the_files_that_are_changed(tmp_path) -> None:
    mutations.install(tmp_path)
    for mutation in MUTATIONS:
        assert (tmp_path / mutation.installed).read_text() == mutation.source.read_text()
