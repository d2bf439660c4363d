"""JSON that begins with the digest of all that follows.

    {"digest": "<SHA-256 of every byte after this comma>",
     "fields": {"facts.scheduler": "<the beginning of its digest>", ...},
     "format": "fxmask plan",
     "version": 2,
     ...}

The digest shows damage, and those of fields show where. It is no signature: whoever may write the file can make another one, so
what is read is checked as if it had none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import msgspec

from fxmask.files.bounded import check_json, digest_of

T = TypeVar("T")

FIELDS = "fields"
MOST_FIELDS = 64  # of one mapping or list that are told apart
DEPTH = 4  # of fields in fields
SHORT = 8  # characters of a field's digest
SHOWN = 5  # names of fields in a message

_HEAD = re.compile(rb'\s*\{\s*"digest":\s*"([0-9a-f]{64})",')


class Head(msgspec.Struct, frozen=True):
    """What every file of ours begins with. The first formats have no name."""

    version: int
    format: str = ""


def seal(content: Mapping[str, Any], indent: int | None = None, others: Mapping[str, str] | None = None) -> bytes:
    """A file with that content.

    Args:
        content: of the file.
        indent: of its lines.
        others: digests of what lies elsewhere, by name, from ``short_digest``; see ``fields_in``.

    Raises:
        TypeError, ValueError: the content is no JSON, or more than can be read again.
    """
    content = {name: value for name, value in content.items() if name != FIELDS}
    fields = {**dict(_fields(content)), **(others or {})}
    text = json.dumps({"digest": "", FIELDS: fields, **content}, allow_nan=False, indent=indent).encode() + b"\n"
    start, rest = text.split(b'""', 1)
    rest = rest.removeprefix(b",")
    return check_json(start + b'"' + digest_of(rest).encode() + b'",' + rest)


def head_of(raw: bytes) -> Head:
    """Format and version of a file, whatever else is in it.

    Raises:
        ValueError: it is no JSON, or no file of ours.
    """
    return msgspec.json.decode(check_json(raw), type=Head)


def is_sealed(raw: bytes) -> bool:
    """Whether the file begins with a digest. Those of the first formats do not."""
    return _HEAD.match(raw) is not None


def unseal(raw: bytes, kind: type[T]) -> T:
    """What is in a file.

    Args:
        raw: all of it, from ``seal``.
        kind: type of its content.

    Raises:
        ValueError: it is not what was written, or not of that type; says where.
    """
    found = _HEAD.match(raw)
    if found is None or digest_of(raw[found.end() :]) != found[1].decode():
        raise ValueError(f"its content is not what its digest was made of{differing(fields_in(raw), fields_now(raw))}")
    content = parse(b"{" + raw[found.end() :], dict[str, msgspec.Raw])
    content.pop(FIELDS, None)
    return parse(msgspec.json.encode(content), kind)


def fields_in(raw: bytes) -> dict[str, str]:
    """Digests of the fields of a file, as it says; none if it says nothing."""
    try:
        said = json.loads(check_json(raw)).get(FIELDS, {})
        return {str(name): str(digest) for name, digest in said.items()}
    except (ValueError, AttributeError):  # damaged beyond that
        return {}


def differing(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Names of the fields whose digests differ, for the end of a message."""
    return _told([name for name in sorted({*before, *now}) if before.get(name) != now.get(name)])


def short_digest(content: bytes) -> str:
    """The beginning of a digest."""
    return digest_of(content)[:SHORT]


def _told(names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f": {', '.join(names[:SHOWN])}{more} {'differs' if len(names) == 1 else 'differ'}"


def fields_now(raw: bytes) -> dict[str, str]:
    """Digests of the fields of a file as they are; of what lies elsewhere, as it says. None if it is damaged beyond that."""
    said = fields_in(raw)
    if not said:
        return {}
    content = {name: value for name, value in json.loads(raw).items() if name not in ("digest", FIELDS)}
    return {**{name: digest for name, digest in said.items() if ": " in name}, **dict(_fields(content))}


def _fields(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Names and digests of fields, e.g. ``settings[0].effort``."""
    inner: list[tuple[str, Any]] = []
    if depth < DEPTH and isinstance(value, Mapping):
        inner = [(f"{path}.{name}" if path else str(name), item) for name, item in value.items()]
    elif depth < DEPTH and isinstance(value, (list, tuple)) and all(isinstance(item, Mapping) for item in value):
        inner = [(f"{path}[{k}]", item) for k, item in enumerate(value)]
    if not 0 < len(inner) <= MOST_FIELDS:
        yield path, short_digest(json.dumps(value, sort_keys=True).encode())
        return
    for name, item in inner:
        yield from _fields(item, name, depth + 1)


def parse(raw: bytes, kind: type[T]) -> T:
    """JSON of a type, within bounds.

    Raises:
        ValueError: it is no JSON, or not of that type; says where.
    """
    return msgspec.json.decode(check_json(raw), type=kind)
