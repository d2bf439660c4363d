"""Damage to saved folders, by kinds."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

PLAN = "plan.json"
HEAD = re.compile(r'^\s*\{\s*"digest":\s*"[0-9a-f]{64}",')
NUMBERS = [0, 1, -1, 2, 3, 7, 40, 48, 2**31, 2**63 - 1, -(2**63), 2**64, 10**30, 0.5, -0.0, 1e308, 1e-320]
TEXTS = [
    "",
    "..",
    "../escaped",
    "/tmp/escaped",
    "plan.json",
    "nobody",
    "aten.add_.Tensor",
    "aten.relu.default",
    "load_library.__self__.default",
    "aten.from_file.default",
    "x=__import__('os').system('touch escaped')",
    "cuda:9",
    "float64",
    "\x00",
    "caf\u00e9",
]


def files_of(folder: Path) -> list[Path]:
    """All files of a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


# On bytes


def bytes_changed(change: Callable[[bytearray, random.Random], Any]) -> Callable[[Path, random.Random], None]:
    """Damage to the bytes of one file."""

    def damage(folder: Path, choose: random.Random) -> None:
        path = choose.choice(files_of(folder))
        content = bytearray(path.read_bytes())
        if content:
            change(content, choose)
        path.write_bytes(content)

    return damage


def _flip(content: bytearray, choose: random.Random) -> None:
    content[choose.randrange(len(content))] ^= 1 << choose.randrange(8)


def _digit(content: bytearray, choose: random.Random) -> None:
    places = [k for k, c in enumerate(content) if c in b"0123456789"]
    content[choose.choice(places or [0])] = choose.choice(b"0123456789")


def _fill(content: bytearray, choose: random.Random) -> None:
    start = choose.randrange(len(content))
    end = min(len(content), start + choose.randint(1, 64))
    content[start:end] = choose.choice([bytes(end - start), choose.randbytes(end - start)])


def _swap_ranges(content: bytearray, choose: random.Random) -> None:
    size = min(choose.randint(1, 32), len(content) // 2)
    a, b = choose.randrange(len(content) - size + 1), choose.randrange(len(content) - size + 1)
    content[a : a + size], content[b : b + size] = content[b : b + size], content[a : a + size]


def _cut(content: bytearray, choose: random.Random) -> None:
    del content[choose.randrange(len(content)) :]


def _insert(content: bytearray, choose: random.Random) -> None:
    at = choose.randrange(len(content) + 1)
    content[at:at] = choose.choice([b"[" * 100_000, b'{"a":' * 5_000, b"9" * 5_000, b"NaN", b"\xff", b" ", choose.randbytes(8)])


# On files


def _delete(folder: Path, choose: random.Random) -> None:
    choose.choice(files_of(folder)).unlink()


def _empty(folder: Path, choose: random.Random) -> None:
    choose.choice(files_of(folder)).write_bytes(b"")


def _swap_files(folder: Path, choose: random.Random) -> None:
    a, b = choose.choices(files_of(folder), k=2)
    x, y = a.read_bytes(), b.read_bytes()
    a.write_bytes(y)
    b.write_bytes(x)


def _rename(folder: Path, choose: random.Random) -> None:
    path = choose.choice(files_of(folder))
    path.rename(path.with_name(choose.choice(["other", "package.json", "plan-0123456789abcdef.safetensors", path.name + "x"])))


def _surplus(folder: Path, choose: random.Random) -> None:
    path = folder / choose.choice(["package.json", "package.safetensors", "plan.old.json", "notes.txt", ".fxmask.writing"])
    if not path.exists():
        path.write_bytes(choose.choice([b"{}", b"", choose.randbytes(40)]))


def _folder(folder: Path, choose: random.Random) -> None:
    path = choose.choice(files_of(folder))
    path.unlink()
    path.mkdir()


def _link(folder: Path, choose: random.Random) -> None:
    path = choose.choice(files_of(folder))
    path.unlink()
    path.symlink_to(choose.choice(["/dev/zero", "/dev/null", "/nowhere", path.name, ".."]))


def _pipe(folder: Path, choose: random.Random) -> None:
    path = choose.choice(files_of(folder))
    path.unlink()
    os.mkfifo(path)


def _grow(folder: Path, choose: random.Random) -> None:
    with choose.choice(files_of(folder)).open("r+b") as file:
        file.truncate(choose.choice([2**20, 2**26, 3 * 2**30]))


def _archive(folder: Path, choose: random.Random) -> None:
    parts = [path for path in files_of(folder) if path.suffix == ".pt2"] or files_of(folder)
    with zipfile.ZipFile(choose.choice(parts), "w") as made:
        info = zipfile.ZipInfo("x")
        info.filename = choose.choice(["../escaped", "/tmp/escaped", "a/../../escaped", "a", "..\\escaped"])
        made.writestr(info, b"x")


# On JSON


def places(value: Any, found: list[tuple[Any, Any]] | None = None) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a tree."""
    found = [] if found is None else found
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        found.append((value, key))
        places(value[key], found)
    return found


def json_changed(change: Callable[[Any, Any, Any, random.Random], Any]) -> Callable[[Path, random.Random], None]:
    """Damage to one place of a JSON file."""

    def damage(folder: Path, choose: random.Random) -> None:
        path = choose.choice([path for path in files_of(folder) if path.suffix == ".json"])
        state = json.loads(path.read_text())
        container, key = choose.choice(places(state))
        change(state, container, key, choose)
        path.write_text(json.dumps(state).replace('"<twice>', '"'))

    return damage


def _put(values: Callable[[random.Random], Any]) -> Callable[[Any, Any, Any, random.Random], None]:
    return lambda state, container, key, choose: container.__setitem__(key, values(choose))


def _remove(state: Any, container: Any, key: Any, choose: random.Random) -> None:
    del container[key]


def _rename_key(state: Any, container: Any, key: Any, choose: random.Random) -> None:
    if isinstance(container, dict):
        container[choose.choice([*TEXTS, str(key) + "x"])] = container.pop(key)


def _twice(state: Any, container: Any, key: Any, choose: random.Random) -> None:
    if isinstance(container, dict):
        container[f"<twice>{key}"] = choose.choice([container[key], 0, [], "x"])
    else:
        container.insert(key, container[key])


def _exchange(state: Any, container: Any, key: Any, choose: random.Random) -> None:
    other, at = choose.choice(places(state))
    container[key], other[at] = json.loads(json.dumps(other[at])), json.loads(json.dumps(container[key]))


def _reverse(state: Any, container: Any, key: Any, choose: random.Random) -> None:
    lists = [owner[at] for owner, at in places(state) if isinstance(owner[at], list) and len(owner[at]) > 1]
    choose.choice(lists).reverse()


def _nearby(state: Any, container: Any, key: Any, choose: random.Random) -> None:
    numbers = [(c, k) for c, k in places(state) if isinstance(c[k], (int, float)) and not isinstance(c[k], bool)]
    owner, at = choose.choice(numbers)
    owner[at] += choose.choice([-8, -1, 1, 8])


def _nest(state: Any, container: Any, key: Any, choose: random.Random) -> None:
    value = container[key]
    for _ in range(choose.choice([1, 3, 90, 400])):
        value = choose.choice([[value], {"tuple": [value]}, {"a": value}])
    container[key] = value


# On tensors


def _tensors(folder: Path, choose: random.Random) -> None:
    path = choose.choice([path for path in files_of(folder) if path.suffix == ".safetensors"])
    tensors = load(path.read_bytes())
    if not tensors:
        return
    name = choose.choice(sorted(tensors))
    x = tensors[name]
    changes: list[Callable[[], Any]] = [
        lambda: tensors.pop(name),
        lambda: tensors.update({name: x.double() if x.dtype != torch.float64 else x.float()}),
        lambda: tensors.update({name: x.reshape(-1)[:-1].clone()}),
        lambda: tensors.update({name: torch.cat([x.reshape(-1), x.reshape(-1)]).clone()}),
        lambda: tensors.update({name: torch.full_like(x, float("nan")) if x.is_floating_point() else ~x}),
        lambda: tensors.update({name: torch.full_like(x, float("inf")) if x.is_floating_point() else x.flip(0)}),
        lambda: tensors.update({name: x.flip(0).clone() if x.dim() else x + 1}),
        lambda: tensors.update({name: torch.randn(x.shape).to(x.dtype)}),
        lambda: tensors.update({name + "x": tensors.pop(name)}),
        lambda: tensors.update({choose.choice(sorted(tensors)): x.clone()}),
    ]
    choose.choice(changes)()
    path.write_bytes(save(tensors))


KINDS: dict[str, Callable[[Path, random.Random], None]] = {
    "flipped bit": bytes_changed(_flip),
    "another digit": bytes_changed(_digit),
    "overwritten": bytes_changed(_fill),
    "ranges swapped": bytes_changed(_swap_ranges),
    "cut short": bytes_changed(_cut),
    "inserted": bytes_changed(_insert),
    "file deleted": _delete,
    "file empty": _empty,
    "files swapped": _swap_files,
    "file renamed": _rename,
    "file added": _surplus,
    "file a folder": _folder,
    "file a link": _link,
    "file a pipe": _pipe,
    "file grown": _grow,
    "file an archive": _archive,
    "key removed": json_changed(_remove),
    "key renamed": json_changed(_rename_key),
    "key twice": json_changed(_twice),
    "values swapped": json_changed(_exchange),
    "list reversed": json_changed(_reverse),
    "number nearby": json_changed(_nearby),
    "another number": json_changed(_put(lambda choose: choose.choice(NUMBERS))),
    "no number": json_changed(_put(lambda choose: choose.choice([float("nan"), float("inf"), -float("inf")]))),
    "another text": json_changed(_put(lambda choose: choose.choice(TEXTS))),
    "another type": json_changed(_put(lambda choose: choose.choice([None, True, 0, "0", [], {}, [[]], {"a": {}}]))),
    "nested": json_changed(_nest),
    "tensors": _tensors,
}


def repair(folder: Path, whole: str) -> None:
    """Make every digest fit what is there, as text, so that whatever else is wrong stays wrong.

    Args:
        folder: damaged.
        whole: plan.json as it was.
    """
    if not (folder / PLAN).is_file() or (folder / PLAN).stat().st_size > 2**26:
        return
    text = (folder / PLAN).read_bytes().decode("utf-8", "surrogateescape")
    for entry in json.loads(whole)["files"].values():
        path = folder / entry["path"]
        if path.is_file() and not path.is_symlink() and path.stat().st_size < 2**28:
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            text = re.sub(rf'{entry["size"]}(,\s*"digest": "){entry["digest"]}', rf"{len(content)}\g<1>{digest}", text)
    found = HEAD.match(text)
    if found:
        rest = text[found.end() :].encode("utf-8", "surrogateescape")
        (folder / PLAN).write_bytes(b'{"digest": "' + hashlib.sha256(rest).hexdigest().encode() + b'",' + rest)
