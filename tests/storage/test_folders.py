"""A folder holds a whole plan at every look, and nothing in it that is not ours is ever removed."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import pytest
import torch
from reseal import plan_state, reseal

import fxmask
from fxmask import MaskError
from fxmask.storage import folders
from fxmask.storage.folders import LOCK, NOTES, PARTIAL, check_destination
from fxmask.storage.plans import load_plan, save_mask
from fxmask.storage.schema import PLAN, TENSORS

STEPS = (900.0, 600.0, 300.0)


def mask_of(number: int) -> fxmask.Mask:
    return fxmask.Mask(torch.tensor([[1], [number >> 1 & 1], [number & 1]]).bool(), STEPS, [f"block {number}"])


def save(folder: Path, number: int) -> None:
    save_mask(folder, mask_of(number), {"number": number}, {"x": torch.full((4,), float(number))})


def number_in(folder: Path) -> int:
    """Which plan is there, all of it."""
    mask, facts, example = load_plan(folder)
    number = facts["number"]
    assert mask == mask_of(number)
    assert example["x"].tolist() == [float(number)] * 4
    return number


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_lies_beside_a_plan_stays(tmp_path):
    save(tmp_path, 1)
    mine = {
        "README.md": "notes",
        "notes.txt": "notes",
        "package.json": "{}",
        "sub/plan.json": "{}",
        "plan-old.safetensors": "x",
    }
    for name, text in mine.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for number in range(5):
        save(tmp_path, number)
        assert number_in(tmp_path) == number
        assert {name: (tmp_path / name).read_text() for name in mine} == mine
        assert len(names(tmp_path)) == len(mine) + 2


def test_what_did_not_change_keeps_its_name(tmp_path):
    for number in (1, 2, 2, 2, 1):
        save(tmp_path, number)
        assert number_in(tmp_path) == number
        found = names(tmp_path)
        save(tmp_path, number)
        assert names(tmp_path) == found


FOREIGN = {
    "terraform": json.dumps({"format_version": "1.2", "terraform_version": "1.5", "planned_values": {}}),
    "a number": "1",
    "a list": "[]",
    "empty": "",
    "text": "buy milk",
    "another version 1": json.dumps({"version": 1, "tasks": []}),
    "another version 2": json.dumps({"version": 2, "blocks": [], "files": {}}),
    "another format": json.dumps({"format": "other", "version": 2, "files": {}}),
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_plan_json_of_someone_else_is_not_replaced(kind, tmp_path):
    (tmp_path / PLAN).write_text(FOREIGN[kind])
    (tmp_path / "state").write_text("mine")
    for write in (lambda: save(tmp_path, 1), lambda: check_destination(tmp_path)):
        with pytest.raises(MaskError, match=r"is no plan of fxmask.*give another folder"):
            write()
    assert names(tmp_path) == [PLAN, "state"]
    assert (tmp_path / PLAN).read_text() == FOREIGN[kind]


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("before", [True, False], ids=["a plan is there", "nothing is there"])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (folders, "write_new"),
        (folders, "replace_file"),
        (folders, "sync_folder"),
        (folders, "seal"),
        (folders, "_note"),
        (os, "replace"),
        (os, "fsync"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.parametrize("fail", [interrupted, full])
def test_an_error_at_any_moment_leaves_the_old_plan_and_nothing_else(fail, owner, name, before, tmp_path, monkeypatch):
    folder = tmp_path / "plan"
    if before:
        save(folder, 1)
        old = names(folder)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, fail)
        with pytest.raises(KeyboardInterrupt if fail is interrupted else MaskError):
            save(folder, 2)
    assert names(tmp_path) == (["plan"] if before else [])
    if before:
        assert number_in(folder) == 1
        assert names(folder) == old


def test_an_error_after_the_exchange_leaves_the_new_plan(tmp_path, monkeypatch):
    save(tmp_path, 1)
    replace = folders.replace_file

    def late(*arguments):
        replace(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(folders, "replace_file", late)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2)
    assert number_in(tmp_path) == 2
    assert len(names(tmp_path)) == 2


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path):
    """Whatever a kill leaves: lock, notes, files under their own or their second names."""
    for first in (True, False):
        folder = tmp_path / str(first)
        if not first:
            save(folder, 1)
        folder.mkdir(exist_ok=True)
        left = ["plan-0123456789abcdef.safetensors", *([TENSORS] if first else [])]
        for name in left:
            (folder / name).write_bytes(b"part of a file")
        (folder / PARTIAL).write_bytes(b"{")
        (folder / LOCK).write_bytes(b"")
        (folder / NOTES).write_text("\n".join([*left, "../outside.txt", "README.md"]) + "\n")
        (tmp_path / "outside.txt").write_text("mine")
        save(folder, 2)
        assert number_in(folder) == 2
        assert len(names(folder)) == 2
        assert (tmp_path / "outside.txt").exists()


def test_many_savers_and_lookers(tmp_path):
    """No saver fails, and every look finds a whole plan."""
    folder, failures, looks = tmp_path / "plan", [], []
    save(folder, 0)

    def saver(start: int) -> None:
        try:
            for k in range(40):
                save(folder, (start + k) % 4)
        except Exception as error:
            failures.append(error)

    savers = [threading.Thread(target=saver, args=(k,)) for k in range(3)]
    for thread in savers:
        thread.start()
    while any(thread.is_alive() for thread in savers):
        looks.append(number_in(folder))
    assert failures == []
    assert len(looks) > 10
    assert len(names(folder)) == 2


def test_places_that_are_no_usual_folders(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("not/yet/there")
    for place, real in (("link", "real"), ("dangling", "not/yet/there"), ("new/deeper", "new/deeper")):
        save(tmp_path / place, 1)
        assert number_in(tmp_path / place) == 1
        assert len(names(tmp_path / real)) == 2
    assert (tmp_path / "link").is_symlink()
    monkeypatch.chdir(tmp_path / "new" / "deeper")
    save(Path("."), 2)
    assert number_in(Path()) == 2
    (tmp_path / "mounted" / "lost+found").mkdir(parents=True)
    save(tmp_path / "mounted", 1)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    for place in ("file", "file/below", "loop", "name" * 100):
        for write in (lambda place=place: save(tmp_path / place, 1), lambda place=place: check_destination(tmp_path / place)):
            with pytest.raises(MaskError, match=r"give another"):
                write()


def test_links_in_the_folder_lead_nowhere(tmp_path):
    """Files that someone else put there do not make a save write or remove elsewhere."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "0123.pt2").write_text("mine")
    for k, name in enumerate((NOTES, LOCK, PARTIAL, "parts", "plan.safetensors")):
        folder = tmp_path / str(k)
        save(folder, 1)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(outside if name == "parts" else outside / "made")
        if name != NOTES:
            (folder / NOTES).write_text("parts/0123.pt2\n")
        try:
            save(folder, 2)
        except MaskError:
            assert name in (NOTES, LOCK, "parts")
        assert names(outside) == ["0123.pt2"]


def test_files_have_the_permissions_that_the_umask_asks_for(tmp_path):
    for mask in (0o022, 0o077):
        old = os.umask(mask)
        try:
            save(tmp_path / str(mask), 1)
        finally:
            os.umask(old)
        assert {path.stat().st_mode & 0o777 for path in (tmp_path / str(mask)).iterdir()} == {0o666 & ~mask}


def test_a_plan_that_names_files_elsewhere_is_refused_and_they_stay(tmp_path):
    folder = tmp_path / "plan"
    save(folder, 1)
    (tmp_path / "plan.safetensors").write_bytes((folder / TENSORS).read_bytes())
    for path in ("../plan.safetensors", "/etc/passwd", "README.md", "plan.json", ".", ""):
        entry = {**plan_state(folder)["files"][TENSORS], "path": path}
        reseal(folder, files={TENSORS: entry})
        with pytest.raises(MaskError, match="not those of a plan"):
            load_plan(folder)
    save(folder, 2)
    assert (tmp_path / "plan.safetensors").exists()
    assert number_in(folder) == 2
