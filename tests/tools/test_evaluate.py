"""``fxmask evaluate``: the same noise in every row, resumable, shared among ranks; the run files of the paper can be read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fxmask
from fxmask.passes.rectify import rectify
from fxmask.tools.cli import main
from fxmask.tools.evaluation.images import batches
from fxmask.tools.evaluation.plans import best_stage, evenly, macs_of
from fxmask.tools.evaluation.run_file import load_run
from fxmask.tools.evaluation.table import averaged, latex, markdown

ROOT = Path(__file__).resolve().parents[2]
SUBJECT = """
import sys
sys.path.insert(0, {tests!r})
from types import SimpleNamespace
import torch
from conftest import ddim, tiny_unet

class Pipe:
    def __init__(self, **config):
        self.unet, self.scheduler = tiny_unet(**config), ddim()

    @torch.no_grad()
    def __call__(self, batch_size=1, num_inference_steps=5, generator=None, output_type="pt"):
        x = torch.randn(batch_size, 1, 8, 8, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.unet(x, t).sample, t, x).prev_sample
        return SimpleNamespace(images=(x.clamp(-1, 1) + 1) / 2)

def pipe():
    return Pipe(), [{{}}]

def narrow():
    return Pipe(block_out_channels=(8, 8)), [{{}}]

def extractor():
    def features(x):
        flat = x.flatten(1)
        return {{"pool": flat[:, :6], "spatial": flat[:, 6:12], "logits": 3 * flat[:, :5]}}
    return features

def real():
    return [torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1]
"""
RUN = """
title = "a small one"
subject = "subject.py:pipe"
steps = 6
images = 12
batch = 4
extractor = "subject.py:extractor"
reference = "subject.py:real"
configurations = [
  {name = "full", kind = "full"},
  {name = "fewer steps", kind = "steps", speedup = 2.0},
  {name = "interval", kind = "interval", speedup = 1.5},
  {name = "streams", kind = "interval", blocks = "stream", speedup = 1.5},
  {name = "stage", kind = "stage", speedup = 1.3},
  {name = "paper's", kind = "paper", speedup = 1.4, options = {epochs = 3}},
  {name = "paper's, unrectified", kind = "paper", speedup = 1.4, options = {epochs = 3}, rectify = false, mask_of = "paper's"},
  {name = "narrow", kind = "full", subject = "subject.py:narrow", extra_data = "yes"},
  {name = "short", kind = "full", subject = "subject.py:narrow", steps = 3, against = "short"},
  {name = "narrow interval", kind = "interval", subject = "subject.py:narrow", steps = 3, speedup = 1.5, against = "short"},
]
published = [{method = "theirs", macs = "0.6T", fid = 4.2}]

[small]
images = 4
"""


@pytest.fixture
def run_file(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "subject.py").write_text(SUBJECT.format(tests=str(ROOT / "tests")))
    (tmp_path / "run.toml").write_text(RUN)
    return tmp_path / "run.toml"


def evaluated(run_file: Path, *more: str, folder: str = "made") -> list[dict]:
    given = ["evaluate", str(run_file), "--folder", folder, "--format", "json", "--output", "table.json", "--quiet", *more]
    assert main(given) == 0
    return json.loads(Path("table.json").read_text())


def test_every_row_has_what_the_paper_tabulates(run_file):
    rows = {row["method"]: row for row in evaluated(run_file)}
    assert rows["full"]["ratio"] == 1
    assert rows["fewer steps"]["macs"] == pytest.approx(rows["full"]["macs"] / 2)
    assert rows["interval"]["ratio"] == pytest.approx(1.5, rel=0.2)
    assert rows["paper's"]["ratio"] == pytest.approx(1.4, rel=0.03)
    assert rows["paper's"]["training"] > 0
    for row in rows.values():
        if "(paper)" not in row["method"]:
            assert {"fid", "sfid", "is", "precision", "recall", "speed", "macs", "macs_without_attention"} <= row.keys()
            assert row["macs_without_attention"] < row["macs"]
    assert rows["*theirs* (paper)"] == {"method": "*theirs* (paper)", "macs": "0.6T", "fid": 4.2}
    assert rows["paper's"]["psnr"] == rows["paper's, unrectified"]["psnr"]
    assert rows["paper's"]["ratio"] > rows["paper's, unrectified"]["ratio"]


def test_another_model_is_measured_beside_the_runs_own(run_file):
    """MACs and speed beside the first row's model and steps; PSNR beside the row that is named, which is made too."""
    rows = {row["method"]: row for row in evaluated(run_file, "--only", "narrow", "narrow interval")}
    assert list(rows) == ["full", "narrow", "short", "narrow interval", "*theirs* (paper)"]
    narrow, short, interval = (rows[name] for name in ("narrow", "short", "narrow interval"))
    assert narrow["ratio"] == pytest.approx(rows["full"]["macs"] / narrow["macs"])
    assert narrow["ratio"] > 1.2
    assert short["ratio"] == pytest.approx(2 * narrow["ratio"])
    assert interval["ratio"] / short["ratio"] == pytest.approx(1.5, rel=0.2)
    assert narrow["extra_data"] == "yes"
    assert "extra_data" not in rows["full"]
    assert narrow["psnr"] < interval["psnr"]
    assert "psnr" not in short


def test_what_is_there_is_not_made_again(run_file):
    first = evaluated(run_file, "--only", "interval")
    assert [row["method"] for row in first][:2] == ["full", "interval"]
    file = Path("made/interval/seed0/00001.npz")
    before = file.stat().st_mtime_ns
    Path("made/interval/seed0/row.json").unlink()
    Path("made/interval/seed0/00002.npz").unlink()
    again = evaluated(run_file, "--only", "interval")
    assert file.stat().st_mtime_ns == before
    assert again[1]["psnr"] == pytest.approx(first[1]["psnr"])
    assert again[1]["fid"] == pytest.approx(first[1]["fid"])


def test_images_are_those_of_the_pipeline(run_file):
    """The noise of a batch is that of its seed, whatever the configuration; arrays are in ADM's layout."""
    evaluated(run_file, "--small", "--only", "interval", "--png", "--seeds", "3")
    sys.path.insert(0, str(run_file.parent))
    try:
        import subject

        pipe, _ = subject.pipe()
    finally:
        sys.path.remove(str(run_file.parent))
    made = pipe(batch_size=4, num_inference_steps=6, generator=torch.Generator().manual_seed(200_000)).images * 2 - 1
    ((exact, rounded, _, _),) = batches(Path("made/full/seed3"))
    assert torch.equal(exact, made)
    assert (exact - rounded).abs().max() <= 1 / 255 + 1e-6
    with np.load("made/full/seed3/00000.npz") as file:
        assert file["arr_0"].dtype == np.uint8
        assert file["arr_0"].shape == (4, 8, 8, 1)
    assert len(list(Path("made/full/seed3").glob("*.png"))) == 4


def test_two_ranks_make_what_one_makes(run_file):
    alone = evaluated(run_file, "--only", "interval")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29617"]
    command += ["-m", "fxmask.tools.cli", "evaluate", str(run_file), "--folder", "ranks", "--quiet", "--only", "interval"]
    command += ["--format", "json", "--output", "ranks.json"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, check=True, capture_output=True, timeout=300, env={**os.environ, "PYTHONPATH": paths})
    together = json.loads(Path("ranks.json").read_text())
    for one, two in zip(alone[:2], together[:2], strict=True):
        assert {**one, "speed": 0} == pytest.approx({**two, "speed": 0})


def test_seeds_are_averaged_with_an_error(run_file):
    rows = evaluated(run_file, "--small", "--only", "interval", "--seeds", "0", "1", "2")
    assert rows[1]["seeds"] == 3
    single = [json.loads(Path(f"made/interval/seed{k}/row.json").read_text())["fid"] for k in range(3)]
    assert rows[1]["fid"] == pytest.approx(sum(single) / 3)
    assert rows[1]["fid_error"] == pytest.approx(float(np.std(single, ddof=1)) / 3**0.5)


def test_forms_of_a_table():
    rows = [averaged([{"method": "a", "macs": 2.5e12, "fid": 3.0}, {"method": "a", "macs": 2.5e12, "fid": 4.0}])]
    assert "| a | 2.5T | 3.500 ± 0.500 |" in markdown(rows)
    assert r"a & 2.5T & 3.500 $\pm$ 0.500 \\" in latex(rows)
    assert latex(rows).startswith(r"\begin{tabular}{lrr}")


def test_slips_in_run_files_are_named(run_file, capsys):
    for old, new, message in (
        ('kind = "steps"', 'kind = "step"', "is of kind 'step'"),
        ('against = "short"', 'against = "shirt"', "is compared with 'shirt'; choose of"),
        ("steps = 6", "stops = 6", "unknown entries"),
        ("[small]", "[tiny]", "has no \\[small\\]|unknown entries"),
    ):
        run_file.write_text(RUN.replace(old, new, 1))
        with pytest.raises(fxmask.InputError, match=message):
            load_run(run_file, small=True)


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "paper").glob("*.toml")), ids=lambda path: path.stem)
def test_the_papers_runs_can_be_read(path):
    whole, small = load_run(path), load_run(path, small=True)
    assert whole.images >= 30_000
    assert whole.published
    assert small.subject.startswith(str(path.parent))
    assert whole.configurations[0].kind == "full"


@pytest.mark.parametrize("name", ["cifar10", "lsun_bedroom", "lsun_church", "imagenet_256", "imagenet_512", "coco"])
def test_data_sets_that_are_absent_are_named(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "paper"))
    import data

    monkeypatch.delenv("FXMASK_DATA", raising=False)
    with pytest.raises(fxmask.InputError, match="set FXMASK_DATA"):
        list(getattr(data, name)())
    monkeypatch.setenv("FXMASK_DATA", str(tmp_path))
    with pytest.raises(fxmask.InputError, match="is not in"):
        list(getattr(data, name)())


@pytest.mark.parametrize(
    ("name", "variable"), [("pruned_cifar10", "FXMASK_PRUNED"), ("consistency_cifar10", "FXMASK_CONSISTENCY")]
)
def test_models_that_are_absent_are_named(name, variable, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "paper"))
    import models

    for folder in (None, tmp_path / "nowhere"):
        if folder:
            monkeypatch.setenv(variable, str(folder))
        else:
            monkeypatch.delenv(variable, raising=False)
        with pytest.raises(fxmask.InputError, match=f"is needed: set {variable}"):
            getattr(models, name)()


def test_pictures_of_a_folder_are_cut_square(tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "paper"))
    import data

    monkeypatch.setenv("FXMASK_DATA", str(tmp_path))
    (tmp_path / "coco" / "val2017").mkdir(parents=True)
    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, 10:20] = 255
    image.fromarray(pixels).save(tmp_path / "coco" / "val2017" / "a.png")
    (batch,) = data.pictures("coco", 10)
    assert torch.equal(batch, torch.ones(1, 3, 10, 10))


def test_evenly_comes_nearest_and_the_stage_is_the_best_of_those_near(unet_program, unet_trajectory):
    _, calls = unet_trajectory
    names = tuple(b.name for b in unet_program.streams)
    found = rectify(unet_program, evenly(unet_program, calls.timesteps, names, 2.0)).mac_ratio
    every = []
    for count in range(1, 7):
        rows = torch.zeros(6, len(names), dtype=torch.bool)
        rows[[k * 6 // count for k in range(count)]] = True
        every.append(rectify(unet_program, fxmask.Mask(rows, calls.timesteps, names)).mac_ratio)
    assert abs(found - 2.0) == pytest.approx(min(abs(ratio - 2.0) for ratio in every))
    stage = best_stage(unet_program, calls, 1.3)
    assert len(stage.blocks) == 1
    assert stage.blocks[0] in {s.name for s in unet_program.stages}


def test_macs_without_attention(unet_program, unet_trajectory):
    _, calls = unet_trajectory
    ones = rectify(unet_program, fxmask.Mask.ones(unet_program, calls.timesteps))
    assert macs_of(unet_program, ones) == (6 * unet_program.macs, 6 * (unet_program.macs - unet_program.attention_macs))
    half = rectify(unet_program, fxmask.policies.interval(2, blocks="stream")(unet_program, calls.timesteps))
    total, without = macs_of(unet_program, half)
    assert 0 < total - without < 6 * unet_program.attention_macs
