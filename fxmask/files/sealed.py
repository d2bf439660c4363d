"""JSON that begins with the digest of all that follows.

    {"digest": "<SHA-256 of every byte after this comma>",
     "format": "fxmask plan",
     "version": 2,
     ...}

The digest shows damage. It is no signature: whoever may write the file can make another one, so what is read is checked as if
it had none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from fxmask.files.bounded import check_json, digest_of

T = TypeVar("T")

_HEAD = re.compile(rb'\s*\{\s*"digest":\s*"([0-9a-f]{64})",')


class Head(msgspec.Struct, frozen=True):
    """What every file of ours begins with. The first formats have no name."""

    version: int
    format: str = ""


def seal(content: Mapping[str, Any], indent: int | None = None) -> bytes:
    """A file with that content.

    Raises:
        TypeError, ValueError: the content is no JSON, or more than can be read again.
    """
    text = json.dumps({"digest": "", **content}, allow_nan=False, indent=indent).encode() + b"\n"
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
        raise ValueError("its content is not what its digest was made of")
    return parse(b"{" + raw[found.end() :], kind)


def parse(raw: bytes, kind: type[T]) -> T:
    """JSON of a type, within bounds.

    Raises:
        ValueError: it is no JSON, or not of that type; says where.
    """
    return msgspec.json.decode(check_json(raw), type=kind)
