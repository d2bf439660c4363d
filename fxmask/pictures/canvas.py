"""What all pictures share: a figure that is nobody's current one, and a file that is there as a whole."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fxmask.errors import InputError
from fxmask.files.replace import replace_file

SUFFIXES = (".png", ".svg")
DPI = 150
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "x")
SHADES = ("#08306b", "#c6590a", "#3f7f3f", "#6a51a3", "#555555", "#000000")  # dark enough in grey, too


@contextlib.contextmanager
def figure(path: str | Path, width: float, height: float) -> Iterator[Any]:
    """A figure that is written when the block ends.

    Args:
        path: PNG or SVG, by its suffix. Folders on the way are made, and a file that is there is replaced as a whole.
        width: in inches.
        height: in inches.

    Raises:
        InputError: another suffix, matplotlib is not installed, or the file cannot be written.
    """
    path = check_path(path)
    made = figure_class()(figsize=(width, height), layout="constrained")
    yield made
    content = io.BytesIO()
    # Nothing of the day or the machine is in the file: the same content is the same picture.
    software = {"Software": "fxmask"} if path.suffix.lower() == ".png" else {"Creator": "fxmask", "Date": None}
    made.savefig(content, format=path.suffix[1:].lower(), dpi=DPI, metadata=software)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content.getvalue(), path.with_name(f".{path.name}.{os.getpid()}.partial"))
    except OSError as error:
        raise InputError(f"the picture {path} cannot be written ({error}); give another file") from error


def check_path(path: str | Path) -> Path:
    """The file that a picture goes to, known to be of a kind that can be made, before the work is done.

    Raises:
        InputError: another suffix than .png and .svg.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"a picture is written as PNG or SVG, by the file's suffix; {str(path)!r} must end in .png or .svg")
    return path


def figure_class() -> Any:
    """matplotlib's figure.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(f"pictures need matplotlib: pip install matplotlib ({error})") from error
    return Figure


def style(number: int) -> dict[str, Any]:
    """Colour, line and marker of a curve; any two of the first ones differ in line and marker, too."""
    return {
        "color": SHADES[number % len(SHADES)],
        "linestyle": LINES[number % len(LINES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 4,
        "linewidth": 1.2,
    }
