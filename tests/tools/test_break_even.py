"""The command that says when a plan is paid back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fxmask.tools.cli import main

pytest.importorskip("diffusers")
CODE = """
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

def pipe():
    model = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    made = DDIMPipeline(model.eval(), DDIMScheduler())
    made.set_progress_bar_config(disable=True)
    return made

def none():
    return 3
"""


@pytest.fixture
def code(tmp_path: Path) -> str:
    (tmp_path / "code.py").write_text(CODE)
    return f"{tmp_path / 'code.py'}"


def test_break_even(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    call = '{"num_inference_steps": 6, "output_type": "np"}'
    arguments = ["break-even", f"{code}:pipe", "--call", call, "--images", "3", "--backend", "eager"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["seconds"]) == 3
    assert (found["images"], found["recorded"], found["calls"]) == (2, 1, 0)
    assert found["spent"] > 0
    assert main(arguments) == 0
    assert "images and seconds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{code}:pipe", "--images", "1"], "make 2 at least"),
        (["{code}:pipe", "--call", "x"], "is no JSON"),
        (["{code}:pipe", "--call", "[]"], "must be arguments by name"),
        (["{code}:none"], "returned int, and a pipeline"),
        (["no/folder/here"], "is no diffusers pipeline"),
    ],
)
def test_what_is_wrong_is_said(arguments: list[str], message: str, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["break-even", *(x.format(code=code) for x in arguments), "--backend", "eager"]) == 2
    assert message in capsys.readouterr().err
