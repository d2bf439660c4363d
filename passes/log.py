"""What passes do, as they run: ``FXMASK_LOG`` and ``FXMASK_DUMP``.

FXMASK_LOG=passes python sample.py      a line for every pass: name, time, nodes before and after
FXMASK_DUMP=folder python sample.py     the code of every graph that a pass leaves, in numbered files
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
from pathlib import Path
from typing import Any

from torch import fx

logger = logging.getLogger("fxmask.passes")
_numbers = itertools.count()


def log_pass(record: Any, graph: fx.Graph | None) -> None:
    """Tell of one run of a pass, where the environment asks for it."""
    if "passes" in os.environ.get("FXMASK_LOG", "").split(","):
        _show()
    logger.info("%s", record)
    folder = os.environ.get("FXMASK_DUMP")
    if folder and graph is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder) / f"{next(_numbers):04}_{record.name}.txt"
        path.write_text(f"# {record}\n{graph}\n", encoding="utf-8")


def _show() -> None:
    """Records of passes go to standard error, also in a program that has not set logging up."""
    if not logger.handlers:
        handler = logging.StreamHandler(sys.__stderr__)  # capture redirects the other one
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
