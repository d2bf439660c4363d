"""The shipped checkpoints are what they claim to be, and the examples run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fxmask

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
digits = pytest.importorskip("digits")


@pytest.mark.parametrize("name", ["ddpm", "dit", "classifier"])
def test_checkpoints_are_small_and_in_half_precision(name):
    from safetensors.torch import load_file

    path = EXAMPLES / "checkpoints" / name / "model.safetensors"
    assert path.stat().st_size < 10 * 2**20
    assert {tensor.dtype for tensor in load_file(path).values() if tensor.is_floating_point()} == {torch.float16}
    model = digits.load_model(name)
    assert not model.training
    assert next(model.parameters()).dtype == torch.float32


def test_unused_classes_are_empty():
    model = digits.load_model("dit")
    tables = [p for n, p in model.named_parameters() if "embedding_table" in n]
    assert tables
    for table in tables:
        assert len(table) == digits.NULL_CLASS + 1
        assert not table[digits.NUM_CLASSES : digits.NULL_CLASS].any()
        assert table[digits.NULL_CLASS].any()


def test_dit_follows_its_labels():
    """On 1,000 samples of 50 steps it is above 90 %; a few samples of 20 steps must not be far from that."""
    labels = torch.arange(40) % 10
    trajectory = fxmask.record(digits.load_model("dit"), digits.load_scheduler(), 20, 40, {"class_labels": labels})
    predicted = digits.load_classifier()(trajectory.final.clamp(-1, 1)).argmax(dim=1)
    assert float((predicted == labels).float().mean()) >= 0.75


@pytest.mark.parametrize("name", ["ddpm", "dit"])
def test_example(name, tmp_path):
    picture = tmp_path / "out.png"
    options = ["--steps", "4", "--speedup", "1.4", "--batches", "1", "--repeats", "1", "--backend", "eager"]
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *options, "--output", str(picture)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    for line in ("MAC ratio", "measured speed-up", "PSNR", "distinct step graphs", "learning and compilation"):
        assert line in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
