"""Rows of an evaluation as Markdown, JSON or LaTeX, beside the paper's."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = {
    "method": "method",
    "extra_data": "extra data",
    "training": "training time",
    "macs": "MACs",
    "macs_without_attention": "MACs without attention",
    "ratio": "MAC ratio",
    "speed": "speed",
    "is": "IS",
    "fid": "FID",
    "sfid": "sFID",
    "precision": "precision",
    "recall": "recall",
    "clip": "CLIP",
    "psnr": "PSNR",
}
DIGITS = {"is": 2, "fid": 3, "sfid": 3, "precision": 3, "recall": 3, "clip": 2, "psnr": 1}


def averaged(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row of those of several seeds: means, and standard errors as ``NAME_error`` where there are two or more."""
    first = dict(rows[0])
    for name in {key for row in rows for key in row}:
        values = [row[name] for row in rows if isinstance(row.get(name), float)]
        if len(values) == len(rows):
            first[name] = statistics.fmean(values)
            if len(values) > 1 and name in DIGITS:
                first[f"{name}_error"] = statistics.stdev(values) / len(values) ** 0.5
    first["seeds"] = len(rows)
    return first


def cell(row: Mapping[str, Any], name: str) -> str:
    """The text of one cell."""
    value = row.get(name)
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if name in ("macs", "macs_without_attention"):
        return human(float(value))
    if name == "training":
        return f"{value / 3600:.2f} h" if value >= 360 else f"{value:.0f} s"
    if name in ("ratio", "speed"):
        return f"{value:.2f}x"
    if not isinstance(value, float):
        return str(value)
    error = row.get(f"{name}_error")
    text = f"{value:.{DIGITS.get(name, 2)}f}"
    return text if error is None else f"{text} ± {error:.{DIGITS.get(name, 2)}f}"


def human(value: float) -> str:
    """MACs with a unit."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns that some row fills."""
    return [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table."""
    names = columns_of(rows)
    lines = ["| " + " | ".join(COLUMNS[name] for name in names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(cell(row, name) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def latex(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same for a paper, in ``booktabs`` style."""
    names = columns_of(rows)
    lines = [r"\begin{tabular}{l" + "r" * (len(names) - 1) + "}", r"\toprule"]
    lines += [" & ".join(COLUMNS[name] for name in names) + r" \\", r"\midrule"]
    for row in rows:
        texts = (cell(row, name).replace("±", r"$\pm$").replace("%", r"\%").replace("_", r"\_") for name in names)
        lines.append(" & ".join(texts) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The numbers as JSON."""
    return json.dumps(list(rows), indent=1, default=str)
