"""What differs between two descriptions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two nested dictionaries, as readable lines."""
    lines = []
    for key in sorted({*saved, *now}):
        a, b = saved.get(key), now.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: saved {_short(a)}, now {_short(b)}")
    return lines


def scheduler_differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two schedulers, each a class and a configuration; of two classes, only what both can have."""
    if saved.get("class") != now.get("class"):
        before, after = (x.get("config") or {} for x in (saved, now))
        both = before.keys() & after.keys()
        saved, now = ({**x, "config": {k: v for k, v in (x.get("config") or {}).items() if k in both}} for x in (saved, now))
    return differences(saved, now)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
