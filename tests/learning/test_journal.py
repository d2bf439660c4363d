"""Checkpoints: what was measured is kept through kills, full disks and other learners, and given back to the same run only."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import ddim, labels, tiny_dit
from reseal import write_sealed

import fxmask
from fxmask import InputError
from fxmask.learning import journal
from fxmask.learning.identity import identity_of
from fxmask.learning.journal import Journal

WORKER = SimpleNamespace(units=0.0)


def kept(path, identity="me", values=(1.5, [1, 2], {"a": [0.1]}, math.inf)):
    made = Journal(path, identity)
    for value in values:
        made.get(repr(value), lambda value=value: value, WORKER)
    return made


def replayed(path, identity="me", values=(1.5, [1, 2], {"a": [0.1]}, math.inf)):
    made = Journal(path, identity)
    return [made.get(repr(value), lambda: "measured again", WORKER) for value in values] == list(values)


def edited(text, change):
    state = json.loads(text)
    change(state)
    return json.dumps(state)


DAMAGE = {
    "empty": lambda text: "",
    "half": lambda text: text[: len(text) // 2],
    "not json": lambda text: "{",
    "list": lambda text: "[]",
    "null": lambda text: "null",
    "no entries": lambda text: edited(text, lambda s: s.pop("entries")),
    "no identity": lambda text: edited(text, lambda s: s.pop("identity")),
    "no version": lambda text: edited(text, lambda s: s.pop("version")),
    "no digest": lambda text: edited(text, lambda s: s.pop("digest")),
    "version text": lambda text: edited(text, lambda s: s.update(version="2")),
    "version 9": lambda text: edited(text, lambda s: s.update(version=9)),
    "version 1": lambda text: edited(text, lambda s: s.update(version=1)),
    "surplus": lambda text: edited(text, lambda s: s.update(more=1)),
    "entries list": lambda text: edited(text, lambda s: s.update(entries=[])),
    "entries null": lambda text: edited(text, lambda s: s.update(entries=None)),
    "entry null": lambda text: edited(text, lambda s: s["entries"].update(dict.fromkeys(s["entries"]))),
    "entry short": lambda text: edited(text, lambda s: s["entries"].update({k: [1] for k in s["entries"]})),
    "entry long": lambda text: edited(text, lambda s: s["entries"].update({k: [1, 2, 3] for k in s["entries"]})),
    "units text": lambda text: edited(text, lambda s: s["entries"].update({k: ["1", 2] for k in s["entries"]})),
    "units negative": lambda text: edited(text, lambda s: s["entries"].update({k: [-1, 2] for k in s["entries"]})),
    "values swapped": lambda text: edited(
        text, lambda s: s.update(entries=dict(zip(s["entries"], list(s["entries"].values())[::-1], strict=True)))
    ),
    "value changed": lambda text: text.replace("1.5", "1.6"),
    "NaN": lambda text: text.replace("1.5", "NaN"),
    "huge": lambda text: text.replace("1.5", "1e999"),
    "deep": lambda text: text.replace("1.5", "[" * 100_000 + "]" * 100_000),
    "other characters": lambda text: text.replace("entries", "entri\udcffs"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_by_name(kind, tmp_path):
    path = tmp_path / "learning.json"
    kept(path)
    assert replayed(path)
    path.write_text(DAMAGE[kind](path.read_text()), errors="surrogateescape")
    with pytest.raises(InputError, match=r"learning\.json (is damaged|has version 9|belongs to another run).*delete it"):
        Journal(path, "me")


SHAPES = sorted(set(DAMAGE) - {"no digest", "values swapped", "value changed", "version 1", "version text", "version 9"})


@pytest.mark.parametrize("kind", SHAPES)
def test_damage_whose_digest_fits_is_refused_by_name(kind, tmp_path):
    path = tmp_path / "learning.json"
    kept(path)
    rest = DAMAGE[kind]("{" + path.read_text().split(",", 1)[1]) if kind != "no digest" else ""
    write_sealed(path, rest) if "\udcff" not in rest else path.write_text(rest, errors="surrogateescape")
    with pytest.raises(InputError, match="is damaged.*delete it"):
        Journal(path, "me")


def test_any_flipped_bit_is_refused_or_changes_nothing(tmp_path):
    path = tmp_path / "learning.json"
    kept(path)
    content, choose = path.read_bytes(), random.Random(0)
    for _ in range(300):
        damaged = bytearray(content)
        damaged[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
        path.write_bytes(damaged)
        try:
            assert replayed(path)
        except InputError:
            continue


def test_what_is_too_large_is_refused_unread(tmp_path):
    path = tmp_path / "learning.json"
    with path.open("wb") as file:
        file.truncate(3 * 2**30)
    with pytest.raises(InputError, match="more than the"):
        Journal(path, "me")


def test_two_learners_lose_nothing(tmp_path):
    path = tmp_path / "learning.json"
    first, second = Journal(path, "me"), Journal(path, "me")
    for k in range(20):
        (first, second)[k % 2].get(f"key {k}", lambda k=k: k, WORKER)
    again = Journal(path, "me")
    assert [again.get(f"key {k}", lambda: None, WORKER) for k in range(20)] == list(range(20))
    with pytest.raises(InputError, match="belongs to another run"):
        Journal(path, "someone else")
    assert [x.name for x in tmp_path.iterdir()] == [path.name], "no lock and no partial file is left"


def test_a_second_run_that_began_at_the_same_moment_is_refused(tmp_path):
    path = tmp_path / "learning.json"
    mine, other = Journal(path, "me"), Journal(path, "someone else")
    mine.get("a", lambda: 1, WORKER)
    with pytest.raises(InputError, match="belongs to another run"):
        other.get("a", lambda: 2, WORKER)
    assert Journal(path, "me").get("a", lambda: None, WORKER) == 1


def test_a_full_disk_warns_once_and_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "learning.json"
    kept(path, values=(1, 2))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(journal, "replace_file", full)
        made = Journal(path, "me")
        with pytest.warns(UserWarning, match="No space left.*learning goes on"):
            made.get("3", lambda: 3, WORKER)
        assert made.get("4", lambda: 4, WORKER) == 4
    assert replayed(path, values=(1, 2))
    assert made.get("5", lambda: 5, WORKER) == 5  # there is room again
    assert replayed(path, values=(1, 2, 3, 4, 5))


def test_a_checkpoint_of_the_first_version_goes_on(tmp_path, caplog):
    path = tmp_path / "learning.json"
    key = hashlib.sha256(b"a").hexdigest()[:24]
    old = {"version": 1, "identity": hashlib.sha256(b"old me").hexdigest()[:16], "entries": {key: [1.0, [0.5, 2]]}}
    path.write_text(json.dumps(old))
    with pytest.raises(InputError, match="belongs to another run"):
        Journal(path, "me", old_identity="old other")
    made = Journal(path, "me", old_identity="old me")
    assert "older fxmask" in caplog.text
    assert made.get("a", lambda: None, WORKER) == [0.5, 2]
    made.get("b", lambda: 1, WORKER)
    assert Journal(path, "me").get("a", lambda: None, WORKER) == [0.5, 2]
    assert json.loads(path.read_text())["version"] == journal.VERSION


def test_weights_and_every_run_are_what_a_checkpoint_belongs_to():
    model = tiny_dit()
    runs = [
        fxmask.record(model, ddim(), num_inference_steps=3, batch_size=2, example_inputs=labels, seed=seed) for seed in range(3)
    ]
    program = fxmask.capture(model, runs[0].calls[0][0])
    found = {identity_of(program, runs, (0,)), identity_of(program, runs, (1,))}
    found |= {identity_of(program, runs[:2], (0,)), identity_of(program, [runs[0], runs[2], runs[1]], (0,))}
    assert len(found) == 4
    assert identity_of(program, runs, (0,)) in found
    with torch.no_grad():
        runs[2].final[0, 0, 0, 0] += 1e-3
    found.add(identity_of(program, runs, (0,)))
    with torch.no_grad():
        next(model.parameters()).data.view(-1)[0] += 1e-3
    found.add(identity_of(program, runs, (0,)))
    assert len(found) == 6
