"""A run: what is sampled, in which configurations, and what it is compared with. Kept as TOML."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fxmask.errors import InputError

KINDS = ("full", "steps", "interval", "stage", "paper", "default")


@dataclass(frozen=True)
class Configuration:
    """One row of the table.

    Attributes:
        name: of the row.
        kind: ``"full"``; ``"steps"``, fewer of them; ``"interval"``, reuse of all blocks between evenly spaced steps;
            ``"stage"``, reuse of one stage (DeepCache); ``"paper"`` and ``"default"``, the learners.
        speedup: ratio of MACs that is asked for.
        blocks: of ``"interval"``: ``"branch"`` or ``"stream"``.
        options: of the paper's learner, by name; ``ours = true`` begins with ``PaperOptions.ours``.
        effort: of a learner.
        rectify: whether dead computes are dropped.
        mask_of: name of another row whose learned mask this one has.
        subject: another one than the run's, e.g. a pruned model.
        steps: other than the run's.
        against: name of the row that PSNR is taken against: an earlier one, or its own for no PSNR; by default the first.
        extra_data: what its column says, e.g. of a pruned model that was fine-tuned.
    """

    name: str
    kind: str
    speedup: float = 1.0
    blocks: str = "branch"
    options: Mapping[str, Any] = field(default_factory=dict)
    effort: str = "quick"
    rectify: bool = True
    mask_of: str | None = None
    subject: str | None = None
    steps: int | None = None
    against: str | None = None
    extra_data: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"configuration {self.name!r} is of kind {self.kind!r}; choose one of {list(KINDS)}")


@dataclass(frozen=True)
class Run:
    """A table to be made.

    Attributes:
        title: of the table.
        subject: pipeline, as ``NAME`` of the command line.
        steps: sampling steps.
        images: how many per configuration and seed.
        configurations: rows.
        batch: images of one call.
        call: further arguments of each call.
        extractor: ``"inception"``, or ``file.py:function`` that returns one.
        reference: ``.npz`` of statistics or images, or ``file.py:function`` that returns batches; none: no FID.
        captions: whether calls have a ``prompt``, and CLIP scores are wanted.
        published: rows of the paper, by column.
        note: what a reader must know of this run.
    """

    title: str
    subject: str
    steps: int
    images: int
    configurations: tuple[Configuration, ...]
    batch: int = 16
    call: Mapping[str, Any] = field(default_factory=dict)
    extractor: str = "inception"
    reference: str | None = None
    captions: bool = False
    published: tuple[Mapping[str, Any], ...] = ()
    note: str = ""


def load_run(path: str | Path, small: bool = False) -> Run:
    """Read a run file.

    Args:
        path: TOML. Files that it names lie beside it.
        small: what its ``[small]`` says takes the place of the rest.

    Raises:
        InputError: it cannot be read, or has unknown or missing entries.
    """
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"run file {path} cannot be read: {error}") from error
    other = data.pop("small", None)
    if small and other is None:
        raise InputError(f"run file {path} has no [small]; leave --small out")
    given = {**data, **(other or {})} if small else data
    for name in ("subject", "extractor", "reference"):
        given[name] = _beside(given.get(name), Path(path).parent) if name in given else None
    given = {name: value for name, value in given.items() if value is not None}
    rows = tuple(_made(Configuration, row, f"a configuration of {path}") for row in given.pop("configurations", ()))
    for k, row in enumerate(rows):
        if row.subject:
            object.__setattr__(row, "subject", _beside(row.subject, Path(path).parent))
        if row.against and row.against not in (names := [other.name for other in rows[: k + 1]]):
            raise InputError(f"configuration {row.name!r} of {path} is compared with {row.against!r}; choose of {names}")
    run: Run = _made(Run, {**given, "configurations": rows, "published": tuple(given.get("published", ()))}, str(path))
    return run


def _beside(name: str | None, folder: Path) -> str | None:
    """A file of that name in the folder, where there is one; else the name."""
    if name is None:
        return None
    file = name.split(":")[0]
    return str(folder / name) if (folder / file).exists() else name


def _made(kind: type[Any], data: Mapping[str, Any], where: str) -> Any:
    known = {f.name for f in fields(kind)}
    unknown = data.keys() - known
    if unknown:
        raise InputError(f"{where} has unknown entries {sorted(unknown)}; known are {sorted(known)}")
    try:
        return kind(**data)
    except TypeError as error:
        raise InputError(f"{where} lacks an entry: {error}") from error
