"""The benchmark's own parts, and the command. Nothing is timed here: figures are looked at for being there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fxmask
from fxmask.backends import inductor
from fxmask.backends.generated_code import count_calls
from fxmask.tools import bench as benchmark
from fxmask.tools import cli

MODEL = """
import sys; sys.path.insert(0, {tests!r})
import torch
from conftest import TinyTransformer, make_calls

def tiny():
    torch.manual_seed(0)
    return TinyTransformer(width=16, depth=2), make_calls()[0]

def nothing():
    return 3
"""


@pytest.fixture
def case(tmp_path):
    path = tmp_path / "denoiser_of_a_test.py"
    path.write_text(MODEL.format(tests=str(Path(__file__).parents[1])))
    return str(path)


def test_random_mask(case):
    model, call = benchmark.load_case(f"{case}:tiny")
    program = fxmask.capture(model, call)
    for ratio in (1.0, 1.3, 1.8):
        mask = benchmark.random_mask(program, 20, ratio)
        assert fxmask.rectify(program, mask).mac_ratio == pytest.approx(ratio, rel=0.05)
        assert bool(mask.compute[0].all())
        assert set(mask.blocks) == {block.name for block in program.branches}
    assert len({tuple(row) for row in mask.compute.tolist()}) >= 8
    assert benchmark.random_mask(program, 20, 1.8) == benchmark.random_mask(program, 20, 1.8)
    with pytest.raises(fxmask.FxmaskError, match="too little"):
        benchmark.random_mask(program, 4, 40.0)


def test_a_case_that_is_none(case):
    for wrong in ("nowhere.py:f", "no.such.module:f", f"{case}:missing", "nothing"):
        with pytest.raises(fxmask.InputError, match="no function that makes a denoiser"):
            benchmark.load_case(wrong)
    with pytest.raises(fxmask.InputError, match="returned int"):
        benchmark.load_case(f"{case}:nothing")


def test_bootstrap():
    assert benchmark.bootstrap([2.0] * 9) == (2.0, 2.0)
    low, high = benchmark.bootstrap([1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 9.0])
    assert 1.0 <= low < 1.4 < high <= 9.0


def test_calls_in_generated_code():
    code = """
cpp_fused_add_0 = async_compile.cpp_pybinding(...)
def call(args):
    buf0 = extern_kernels.addmm(a, b, c)
    extern_kernels.mm(a, b, out=buf1)
    cpp_fused_add_0(buf0, buf1)
    # a comment about cpp_fused_add_0(
    triton_poi_fused_1.run(buf0, 3, stream=stream0)
    buf5 = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v)
    return (buf0, )
"""
    assert count_calls(code) == (2, 3)


@pytest.mark.skipif(inductor.cpu_compiler_problem() is not None, reason="no C++ compiler")
def test_command(case, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    torch._dynamo.reset()
    shape = ["--ratios", "1.5", "--modes", "regions", "--steps", "4", "--repeats", "2", "--kernels"]
    arguments = ["bench", f"{case}:tiny", *shape]
    assert cli.main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert "fxmask regions, 1.5x" in capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "bench.json").read_text())}
    assert rows["fxmask regions, all ones"]["error"] < 1e-5
    assert rows["fxmask regions, all ones"]["executed"] == pytest.approx(1, rel=0.01)
    assert rows["fxmask regions, 1.5x"]["macs"] == pytest.approx(1.5, rel=0.1)
    assert all(row["speedup"] > 0 and row["interval"] for row in rows.values())
    kernels = rows["fxmask regions, 1.5x"]["kernels"]
    assert len(kernels) == rows["fxmask regions, 1.5x"]["graphs"]
    full = max(kernels, key=lambda k: k[1])
    assert all(k[2] + k[3] < full[2] + full[3] for k in kernels if k[1] < full[1]), "kernels fall with the mask"
    assert (tmp_path / "out" / "bench.png").stat().st_size > 1000
    assert "fxmask regions" in (tmp_path / "out" / "bench.md").read_text()
    assert cli.main(["summary", f"{case}:tiny"]) == 0
    assert "branch blocks own" in capsys.readouterr().out
    assert cli.main(["summary", "nowhere.py:f"]) == 2
    assert "nowhere.py" in capsys.readouterr().err
