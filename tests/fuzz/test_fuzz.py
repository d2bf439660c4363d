"""A small part of what ``damage.py`` and ``kills.py`` do by the thousand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that are forked")


def command(name: str, *options: str) -> None:
    """Run it in a process of its own, which forks and replaces the compiler."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, str(HERE / name), *options], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_damaged_folders_are_refused_or_harmless():
    command("damage.py", "--plans", "150", "--packages", "30")


def test_kills_full_disks_and_several_writers():
    command("kills.py", "--rounds", "28")
