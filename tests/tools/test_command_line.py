"""The command ``fxmask``: each command on small denoisers and pipelines, what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch

import fxmask
from fxmask.tools import cli
from fxmask.tools.command_line import Command, Several
from fxmask.tools.commands import learn as learn_module

pytest.importorskip("diffusers")
CODE = """
import torch
from beside import unet
from diffusers import DDIMPipeline, DDIMScheduler

def pipe():
    return DDIMPipeline(unet(), DDIMScheduler()), {"output_type": "np"}

def pair():
    return unet(), DDIMScheduler()

def alone():
    return unet()

def other():
    return 3

def calls():
    return pipe()[0], []
"""
BESIDE = """
import torch
from diffusers import UNet2DModel

def unet():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()
"""
EAGER = ("--backend", "eager")


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of functions, which import another one beside it."""
    folder = tmp_path_factory.mktemp("code")
    (folder / "of_a_test.py").write_text(CODE)
    (folder / "beside.py").write_text(BESIDE)
    return str(folder / "of_a_test.py")


@pytest.fixture(scope="module")
def saved(code: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Plans of the pipeline, made by the command."""
    folder = str(tmp_path_factory.mktemp("saved") / "plans")
    assert cli.main(["learn", f"{code}:pipe", "--steps", "6", "--effort", "instant", "--output", folder, *EAGER, "--json"]) == 0
    return folder


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Also where the tests run in the background of a shell, which has Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def said(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


# How it is called


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in ("demo", "inspect", "learn", "show", "run", "pareto", "bench", "break-even"):
        assert f"  {name} " in text
        assert cli.main([name, "--help"]) == 0
        assert "Usage: fxmask" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fxmask, version {fxmask.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "Usage"),
        (["nothing"], 2, "No such command"),
        (["learn", "{code}:pipe"], 2, "Missing option '--output'"),
        (["inspect", "{code}:nothing"], 2, "is no function that makes a denoiser"),
        (["inspect", "{code}:other"], 2, "returned int"),
        (["inspect", "{code}:calls"], 2, "no call by name"),
        (["inspect", "no/folder"], 2, "is no diffusers pipeline"),
        (["inspect", "{code}:pipe", "--call", "x"], 2, "is no JSON"),
        (["inspect", "{code}:pipe", "--call", "[]"], 2, "must be arguments by name"),
        (["inspect", "{code}:alone", "--prompt", "a cat"], 2, "are for pipelines"),
        (["inspect", "{code}:pipe", "--device", "tpu"], 2, "is no device"),
        (["learn", "{code}:alone", "--output", "{tmp}/x"], 2, "a denoiser without a scheduler"),
        (["learn", "{code}:pipe", "--output", "{tmp}/x", "--heat-map", "x.gif"], 2, "must end in .png or .svg"),
        (["learn", "{code}:pipe", "--output", "{tmp}/x", "--scores", "x.png"], 2, "the default learner has no scores"),
        (["learn", "{code}:pipe", "--output", "{tmp}/x", "--speedup", "0.5"], 1, "must be at least 1"),
        (["learn", "{code}:pipe", "--output", "{tmp}"], 1, "holds no plan"),
        (["show", "{tmp}/nothing"], 1, "holds no plan"),
        (["run", "{code}:alone", "{tmp}"], 2, "only pipelines make images"),
        (["demo", "--checkpoints", "{tmp}"], 2, "the shipped checkpoint is not in"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    arguments: list[str], status: int, message: str, code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("someone's")
    assert cli.main([x.format(code=code, tmp=tmp_path) for x in arguments]) == status
    text = capsys.readouterr().err
    assert message in text
    assert "Traceback" not in text
    assert sorted(x.name for x in tmp_path.iterdir()) == ["file"]


def test_several_values_after_one_option() -> None:
    @click.command(cls=Command)
    @click.argument("model")
    @click.option("--ratios", cls=Several, type=float, default=(2.0, 4.0))
    @click.option("--modes", cls=Several)
    @click.option("--flag", is_flag=True)
    def command(**_: Any) -> None: ...

    def parsed(*arguments: str) -> tuple[Any, ...]:
        given = command.make_context("x", list(arguments)).params
        return given["model"], given["ratios"], given["modes"], given["flag"]

    assert parsed("m") == ("m", (2.0, 4.0), (), False)
    assert parsed("m", "--ratios", "1.5", "-3", "--flag") == ("m", (1.5, -3.0), (), True)
    assert parsed("--modes", "a", "b", "--flag", "m", "--ratios", "1") == ("m", (1.0,), ("a", "b"), True)
    assert parsed("m", "--modes", "a", "--ratios", "1", "--modes", "b", "c") == ("m", (1.0,), ("b", "c"), False)
    with pytest.raises(click.UsageError):
        parsed("m", "--ratios")


def test_an_error_that_nobody_foresaw_is_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise ZeroDivisionError("first\nsecond")

    monkeypatch.setattr(cli, "main", fail)
    assert cli.run() == 1
    assert capsys.readouterr().err == "fxmask: ZeroDivisionError: first (FXMASK_TRACEBACK=1 shows where)\n"
    monkeypatch.setenv("FXMASK_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        cli.run()


# Commands


def test_inspect_a_pipeline(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", f"{code}:pipe", "--json"]) == 0
    found = said(capsys)
    assert (found["pipeline"], found["component"], found["lanes"]) == ("DDIMPipeline", "unet", 1)
    assert found["macs"] == max(block["macs"] for block in found["blocks"])
    assert found["roles"] == {"sample": "sample", "timestep": "timestep"}
    assert cli.main(["inspect", f"{code}:pipe", "--top", "2"]) == 0
    text = capsys.readouterr().out
    assert f"the 2 largest of {len(found['blocks'])} blocks" in text
    assert "UNet2DModel" in text


def test_inspect_a_denoiser_by_module(code: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What lies in the folder that the command is called in can be imported."""
    monkeypatch.chdir(Path(code).parent)
    monkeypatch.setattr(sys, "path", [x for x in sys.path if x != str(Path(code).parent)])
    assert cli.main(["inspect", "of_a_test:alone", "--json"]) == 0
    assert said(capsys)["pipeline"] is None


def test_a_pipeline_in_a_folder(code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fxmask.tools.subjects import load_subject

    load_subject(f"{code}:pipe").pipe.save_pretrained(tmp_path / "pipe")
    assert cli.main(["inspect", str(tmp_path / "pipe"), "--json"]) == 0
    assert said(capsys)["pipeline"] == "DDIMPipeline"
    load_subject(f"{code}:pipe").model.save_pretrained(tmp_path / "unet")
    assert cli.main(["inspect", str(tmp_path / "unet"), "--json"]) == 0
    assert said(capsys)["pipeline"] is None


def test_learn_a_pipeline(code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Learned, measured on other seeds, drawn, saved; a second process makes the same images with it."""
    pictures = {name: tmp_path / f"{name}.png" for name in ("heat-map", "counts", "errors")}
    drawn = [x for name, path in pictures.items() for x in (f"--{name}", str(path))]
    arguments = ["--steps", "6", "--speedup", "1.5", "--held-out", "2", *EAGER, *drawn]
    assert cli.main(["learn", f"{code}:pipe", "--output", str(tmp_path / "plans"), *arguments]) == 0
    text = capsys.readouterr().out
    assert "held-out PSNR" in text
    assert "fxmask show" in text
    assert all(path.stat().st_size > 1000 for path in pictures.values())
    assert cli.main(["show", str(tmp_path / "plans"), "--json"]) == 0
    (plan,) = said(capsys)
    assert plan["steps"] == 6
    assert plan["quality"]["images"] == 2
    assert plan["facts"]["learned"]["seeds"] == [0, 1, 2, 3]
    assert plan["facts"]["plan"]["mac_ratio"] == pytest.approx(1.5, rel=0.1)
    arguments = ["run", f"{code}:pipe", str(tmp_path / "plans"), "--steps", "6", "--seed", "7", *EAGER]
    assert cli.main([*arguments, "--output", str(tmp_path / "here")]) == 0
    command = [sys.executable, "-m", "fxmask.tools.cli", *arguments, "--output", str(tmp_path / "there")]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    (image,) = (tmp_path / "here").iterdir()
    assert image.read_bytes() == (tmp_path / "there" / image.name).read_bytes()


def test_learn_a_denoiser_and_take_its_scores(code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = tmp_path / "scores.svg"
    arguments = ["--steps", "5", "--speedup", "1.2", "--learner", "paper", "--held-out", "1", "--scores", str(scores), *EAGER]
    arguments += ["--checkpoint", str(tmp_path / "state")]
    assert cli.main(["learn", f"{code}:pair", "--output", str(tmp_path / "plan"), *arguments, "--json"]) == 0
    found = said(capsys)
    assert found["mac_ratio"] == pytest.approx(1.2, rel=0.05)
    assert found["quality"]["images"] == 8
    assert scores.read_text().startswith("<?xml")
    assert (tmp_path / "state").exists()
    from fxmask.tools.subjects import load_subject

    subject = load_subject(f"{code}:pair")
    loaded = fxmask.load(tmp_path / "plan", subject.model, backend="eager", progress=False)
    assert loaded.report().quality.psnr == found["quality"]["psnr"], "what was measured goes on with the plan"


def test_show(saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", saved, "--heat-map", str(tmp_path / "x.svg")]) == 0
    text = capsys.readouterr().out
    assert "num_inference_steps=6" in text
    assert "held-out PSNR" in text
    assert "█ computed" in text
    assert (tmp_path / "x.svg").exists()
    assert cli.main(["show", saved, "--plan", "2"]) == 2
    assert "holds 1" in capsys.readouterr().err


def test_a_heat_map_of_many_blocks_fits_a_terminal() -> None:
    from fxmask.tools.commands.show import heat_map_text

    compute = torch.ones(250, 200, dtype=torch.bool)
    compute[1:, 100:] = False
    names = tuple(f"transformer_blocks.{b // 4}.part{b % 4}" for b in range(200))
    lines = heat_map_text(fxmask.Mask(compute, tuple(range(250, 0, -1)), names)).plain.splitlines()
    assert len(lines) <= 41
    assert max(map(len, lines)) <= 150
    assert len(lines) > 20
    assert set(lines[0].split()[-1]) == {"█"}
    assert set(lines[-2].split()[-1][1:]) == {"·"}


def test_run_compares(code: str, saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, picture = tmp_path / "images", tmp_path / "both.png"
    arguments = ["run", f"{code}:pipe", saved, "--steps", "6", "--images", "2", "--output", str(output), *EAGER, "--json"]
    assert cli.main([*arguments, "--compare", str(picture)]) == 0
    found = said(capsys)
    assert [Path(x).name for x in found["files"]] == ["0000.png", "0001.png"]
    assert len(found["psnr"]) == 2
    assert found["runs"][-1]["followed"] == 5
    assert picture.exists()
    assert cli.main(arguments) == 0
    assert [Path(x).name for x in said(capsys)["files"]] == ["0002.png", "0003.png"], "none is overwritten"


def test_pareto(code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--steps", "6", "--speedups", "1.5", "2", *EAGER, "--plot", str(tmp_path / "curve.png")]
    assert cli.main(["pareto", f"{code}:pipe", *arguments, "--json"]) == 0
    found = said(capsys)
    assert [point["mac_ratio"] for point in found] == pytest.approx([1.5, 2.0], rel=0.05)
    assert (tmp_path / "curve.png").exists()


# Ctrl-C


def test_an_interrupted_plan_is_saved(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C while a better plan is sought: the one that there is is saved, and the status says so."""
    from fxmask.settings import session

    def interrupt(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr(session, "better_mask", interrupt)
    folder = tmp_path / "plans"
    assert cli.main(["learn", f"{code}:pipe", "--steps", "6", "--output", str(folder), *EAGER, "--json"]) == 130
    assert said(capsys)["interrupted"] is True
    assert cli.main(["show", str(folder), "--json"]) == 0
    assert said(capsys)[0]["steps"] == 6


def test_interrupted_before_there_is_a_plan(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(learn_module, "accelerate", interrupt)
    assert cli.main(["learn", f"{code}:pipe", "--output", str(tmp_path / "plans"), *EAGER]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "plans").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_bench_takes_what_a_function_returns(code: str) -> None:
    """A pipeline, or a denoiser with its scheduler: it is the denoiser that is measured, on a call of its own."""
    from fxmask.tools.bench_cases import load_case

    for name in ("pipe", "pair", "alone"):
        model, call = load_case(f"{code}:{name}")
        assert type(model).__name__ == "UNet2DModel"
        assert ("sample" in call) == (name == "pipe")
