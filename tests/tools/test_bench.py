"""The benchmark's own parts, and the command. Nothing is timed here: figures are looked at for being there."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fxmask
from fxmask.backends import inductor
from fxmask.backends.generated_code import count_calls
from fxmask.tools import bench as benchmark
from fxmask.tools import bench_cases, bench_parts, cli
from fxmask.tools.bench import EAGER, PLAIN, REDUCED, Bench, Configuration, LostDevice, Measurement
from fxmask.tools.bench_masks import random_mask
from fxmask.tools.bench_report import to_markdown

MODEL = """
import sys; sys.path.insert(0, {tests!r})
import torch
from conftest import TinyTransformer, make_calls

def tiny():
    torch.manual_seed(0)
    return TinyTransformer(width=16, depth=2), make_calls()[0]

def nothing():
    return 3

def sized(batch, dtype):
    assert torch.get_default_dtype() == dtype
    return TinyTransformer(width=16, depth=2), make_calls(batch)[0]
"""
QUICK = ["--ratios", "1.5", "--modes", "whole", "--backends", "eager", "--steps", "4", "--repeats", "2"]


@pytest.fixture
def case(tmp_path):
    path = tmp_path / "denoiser_of_a_test.py"
    path.write_text(MODEL.format(tests=str(Path(__file__).parents[1])))
    return str(path)


def test_random_mask(case):
    model, call = bench_cases.load_case(f"{case}:tiny")
    program = fxmask.capture(model, call)
    for ratio in (1.0, 1.3, 1.8):
        mask = random_mask(program, 20, ratio)
        assert fxmask.rectify(program, mask).mac_ratio == pytest.approx(ratio, rel=0.05)
        assert bool(mask.compute[0].all())
        assert set(mask.blocks) == {block.name for block in program.branches}
    assert len({tuple(row) for row in mask.compute.tolist()}) >= 8
    assert random_mask(program, 20, 1.8) == random_mask(program, 20, 1.8)
    with pytest.raises(fxmask.FxmaskError, match="too little"):
        random_mask(program, 4, 40.0)


def test_a_case_that_is_none(case):
    for wrong in ("nowhere.py:f", "no.such.module:f", f"{case}:missing", "nothing"):
        with pytest.raises(fxmask.InputError, match="no function that makes a denoiser"):
            bench_cases.load_case(wrong)
    with pytest.raises(fxmask.InputError, match="returned int"):
        bench_cases.load_case(f"{case}:nothing")


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


def test_few_distinct_rows(tiny):
    mask = random_mask(tiny, 20, 1.5, distinct=3, timesteps=range(20, 0, -1))
    assert len({tuple(row) for row in mask.compute[1:].tolist()}) <= 3
    assert all(torch.equal(mask.compute[i], mask.compute[i - 3]) for i in range(4, 20))
    assert mask.timesteps == tuple(map(float, range(20, 0, -1)))
    assert fxmask.rectify(tiny, mask).distinct_graphs <= 8
    assert fxmask.rectify(tiny, mask).mac_ratio == pytest.approx(1.5, rel=0.1)


@pytest.fixture
def uncompiled(monkeypatch):
    """torch.compile takes seconds, and nothing here depends on it; its mode is noted."""
    asked = []

    def compile(model, dynamic, mode):
        asked.append(mode)
        return model.forward

    monkeypatch.setattr(torch, "compile", compile)
    return asked


def test_table(case, tmp_path, capsys, uncompiled):
    """Several batches, a type, and a backend that fails: a row with its reason, and everything else is there."""
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    options = [*QUICK, "--backends", "eager", "cudagraph", "--batches", "1", "3", "--dtype", "bfloat16", "--traces", "2"]
    assert cli.main(["bench", f"{case}:tiny", *options, "--output", str(out)]) == 0
    said = capsys.readouterr().out
    assert "## denoiser_of_a_test.py:tiny, batch 1, bfloat16, cpu" in said
    assert "## denoiser_of_a_test.py:tiny, batch 3, bfloat16, cpu" in said
    rows = json.loads((out / "bench.json").read_text())
    assert [row["batch"] for row in rows] == [1] * 6 + [3] * 6
    assert {(row["dtype"], row["device"], row["case"]) for row in rows} == {("bfloat16", "cpu", "denoiser_of_a_test.py:tiny")}
    for row in rows:
        failing = "cudagraph" in row["name"]
        assert (row["problem"] is not None, row["seconds"] is None, row["speedup"] is None) == (failing,) * 3
        assert not failing or "need every tensor on one NVIDIA GPU" in row["problem"]
    assert "need every tensor on one NVIDIA GPU" in (out / "bench.md").read_text()
    facts = json.loads((out / "environment.json").read_text())
    assert facts["torch"] == torch.__version__
    assert facts["asked"]["steps"] == 4
    assert {p.name for p in out.glob("*.png")} == {"bench.png", "bench-denoiser_of_a_test.py-tiny-b3.png"}
    traces = {p.name for p in (out / "traces").iterdir()}
    assert "denoiser-of-a-test.py-tiny-b1-torch.compile-step3.json.gz" in traces
    assert sum("fxmask-whole-eager-1.5x" in name for name in traces) == 2
    for path in (out / "traces").iterdir():
        step = path.name.removesuffix(".json.gz").rpartition("-step")[2]
        names = {event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}
        assert {f"step {step}", "aten::addmm"} <= names


def test_a_function_may_take_batch_and_type(case):
    model, call = bench_cases.load_case(f"{case}:sized", 5, dtype=torch.bfloat16)
    assert model.inp.weight.dtype == call["x"].dtype == torch.bfloat16
    assert call["x"].shape == (5, 6, 4)
    assert torch.get_default_dtype() == torch.float32


def test_a_function_with_a_generator_of_its_own(case):
    """Which is the CPU's, and draws nothing on another device."""
    model, call = bench_cases.load_case(f"{case}:tiny", 3, torch.device("meta"), torch.float16)
    assert {x.device.type for x in [*model.parameters(), *call.values()]} == {"meta"}
    assert (len(call["x"]), call["x"].dtype, call["t"].dtype) == (3, torch.float16, torch.int64)


def test_what_does_not_fit_is_a_row(case, monkeypatch, uncompiled, capsys):
    """A configuration, and in a table a whole model."""
    compiled = Bench._compile

    def compile(self, variant, row):
        if variant.ratio == 1.5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return compiled(self, variant, row)

    monkeypatch.setattr(Bench, "_compile", compile)
    model, call = bench_cases.load_case(f"{case}:tiny")
    bench = Bench(model, call, 4)
    rows = bench.measure(benchmark.configurations([1.5], ["whole"], ["eager"]), 1, progress=False)
    assert [row.problem for row in rows] == [None, None, None, "does not fit in memory"]
    assert all(row.speedup for row in rows[:-1])
    assert "fxmask whole (eager), 1.5x" not in bench.runs
    monkeypatch.setitem(bench_cases.SHAPES, "huge", lambda batch=1: (_ for _ in ()).throw(torch.OutOfMemoryError("20 GiB")))
    assert cli.main(["bench", "huge", *QUICK, "--batches", "1", "2"]) == 1
    assert capsys.readouterr().out.count("does not fit in memory") == 2
    with pytest.raises(torch.OutOfMemoryError):  # of one alone, as of any program
        cli.main(["bench", "huge", *QUICK])


def test_what_fails_while_it_is_timed_is_a_row(case, uncompiled):
    model, call = bench_cases.load_case(f"{case}:tiny")
    bench = Bench(model, call, 4)

    def begin(name):
        if name == EAGER and len(bench.runs) == 3:  # all are compiled
            bench.runs[EAGER].calls[0]["x"] = None

    rows = bench.measure(benchmark.configurations([], ["whole"], ["eager"]), 2, progress=False, begin=begin)
    assert all(row.problem is not None and row.seconds is None for row in rows)  # they share the calls
    assert "InputError" in to_markdown(rows)


def test_reduce_overhead(case, uncompiled):
    """Beside the baseline, not in its place."""
    chosen = benchmark.configurations([1.5], ["whole"], ["eager"], reduced=True)
    assert [v.name for v in chosen[:3]] == [EAGER, PLAIN, REDUCED]
    model, call = bench_cases.load_case(f"{case}:tiny")
    rows = Bench(model, call, 4).measure(chosen, 2, progress=False)
    assert uncompiled == [None, "reduce-overhead"]
    assert all(row.against_reduced for row in rows)
    made = [Measurement(name) for name in (PLAIN, REDUCED, "ours")]
    benchmark.compare(made, [[4.0, 6.0, 8.0], [2.0, 3.0, 4.0], [1.0, 2.0, 2.0]])
    assert [row.seconds for row in made] == [6.0, 3.0, 2.0]
    assert [row.speedup for row in made] == [1.0, 2.0, 4.0]
    assert [row.against_reduced for row in made] == [0.5, 1.0, 2.0]
    assert "| 4.00x |" in to_markdown(made)
    assert "over reduce-overhead" in to_markdown(made)
    assert "over reduce-overhead" not in to_markdown(made[:1][:0])


def test_without_a_baseline_there_are_seconds():
    rows = [Measurement(PLAIN, problem="no compiler"), Measurement("ours")]
    benchmark.compare(rows, [[], [1.0, 3.0]])
    assert (rows[1].seconds, rows[1].speedup) == (2.0, None)
    assert "no compiler" in to_markdown(rows)


def part_of(case, *chosen, **given):
    return bench_parts.Part(case, None, tuple(chosen), steps=3, repeats=1, **given)


EAGER_STEPS = Configuration("ours", 1.0, "whole", "eager")


def test_a_part_in_a_process_of_its_own(case):
    rows = bench_parts.measure_apart(part_of(f"{case}:tiny", Configuration(EAGER), EAGER_STEPS))
    assert [(row.name, row.problem) for row in rows] == [(EAGER, None), ("ours", None)]
    assert all(row.seconds for row in rows)


def test_what_ends_a_process_is_a_row_and_the_rest_is_tried_again(case, monkeypatch):
    """Of a process that is gone, the last thing that it began is to blame."""
    asked = []

    def run(command, input, **_):
        names = [v["name"] for v in json.loads(input)["chosen"]]
        asked.append(names)
        said = [{"begin": bench_parts.MODEL}]
        for name in names:
            said.append({"begin": name})
            if name == "lost":
                said.append({"reason": "CUDA error: an illegal memory access was encountered"})
            if name in ("lost", "killed"):
                break
        else:
            said.append({"rows": [{"name": name, "seconds": 1.0} for name in names]})
        text = "".join(f"\nsomething else\n{bench_parts.MARK}{json.dumps(message)}\n" for message in said)
        return subprocess.CompletedProcess(command, 0 if "rows" in said[-1] else -9, text, "")

    monkeypatch.setattr(subprocess, "run", run)
    chosen = [Configuration(name) for name in ("first", "lost", "second", "killed", "third")]
    rows = bench_parts.measure_apart(part_of(f"{case}:tiny", *chosen))
    assert [row.name for row in rows] == ["first", "lost", "second", "killed", "third"]
    assert [row.problem is None for row in rows] == [True, False, True, False, True]
    assert "illegal memory access" in rows[1].problem
    assert "ended with status -9" in rows[3].problem
    assert [len(names) for names in asked] == [5, 4, 3]


def test_a_lost_device_ends_the_process(case, monkeypatch, tiny):
    """Whatever fails after it would fail of it."""
    bench = Bench(*bench_cases.load_case(f"{case}:tiny"), 3)
    monkeypatch.setattr(benchmark, "release", lambda device: (_ for _ in ()).throw(RuntimeError("CUDA error")))
    with pytest.raises(LostDevice, match="need every tensor on one NVIDIA GPU"):
        bench.measure([Configuration("ours", 1.0, "whole", "cudagraph")], 1, progress=False)


def test_cuda_without_cuda(case, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", f"{case}:tiny", "--device", "cuda"]) == 2
    assert "sees no NVIDIA GPU here" in capsys.readouterr().err
    assert cli.main(["bench", f"{case}:tiny", "--batches", "0"]) == 2
    assert "batch sizes begin at 1" in capsys.readouterr().err


def test_what_is_measured_on_a_gpu(monkeypatch, tmp_path):
    """Without being asked for: every backend and mode, torch.compile with CUDA graphs, several batches, traces of the first."""
    from fxmask.tools import bench_command

    monkeypatch.setattr(bench_command, "require_device", lambda name: torch.device("cuda", 1))
    given = ["bench", "gpu", "--device", "cuda:1", "--dtype", "float16", "--output", str(tmp_path)]
    parts = []
    monkeypatch.setattr(bench_command, "run_bench", lambda options: parts.extend(bench_command.parts_of(options)) or 0)
    assert cli.main(given) == 0
    assert [(part.case, part.batch) for part in parts] == [(name, b) for name in bench_cases.SHAPES for b in (1, 2, 8)]
    assert {(part.device, part.dtype, part.distinct) for part in parts} == {("cuda:1", "float16", 3)}
    assert [part.traces for part in parts[:3]] == [4, 0, 0]
    made = {(v.backend, v.mode) for v in parts[0].chosen if v.ratio is not None}
    assert made == {(backend, mode) for backend in ("inductor", "cudagraph") for mode in ("regions", "whole")}
    assert REDUCED in [v.name for v in parts[0].chosen]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_command_on_a_gpu(case, tmp_path):
    """The whole command in a process of its own, as it is called."""
    options = [*QUICK[:2], *QUICK[6:], "--batches", "1", "2", "--dtype", "bfloat16", "--output", str(tmp_path)]
    command = [sys.executable, "-m", "fxmask.tools.cli", "bench", f"{case}:tiny", "--device", "cuda", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "bench.json").read_text())
    assert {row["problem"] for row in rows} == {None}
    assert {row["device"] for row in rows} == {"cuda:0"}
    assert all(row["speedup"] and row["against_reduced"] for row in rows)
    assert list((tmp_path / "traces").glob("*cudagraph*.json.gz"))
    facts = json.loads((tmp_path / "environment.json").read_text())
    assert facts["gpu"]
    assert facts["collect_env"]
    assert "Please send us" in done.stdout
