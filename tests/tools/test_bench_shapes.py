"""Models of the benchmark: they are what they are called, and a plan's timesteps are those that they receive."""

from __future__ import annotations

import pytest
import torch

import fxmask
from fxmask.tools import bench_cases
from fxmask.tools.bench import Bench, Configuration
from fxmask.tools.bench_shapes import SHAPES
from fxmask.tools.place import DTYPES, require_device

pytest.importorskip("diffusers")

MILLIONS = {"dit-xl-2": 750, "pixart-sigma-1024": 611, "sdxl": 2567, "flux": 11901}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
SMALLER = {
    "dit-xl-2": {**HEADS, "num_layers": 2, "sample_size": 8},
    "pixart-sigma-1024": {**HEADS, "num_layers": 2, "sample_size": 8, "cross_attention_dim": 16, "caption_channels": 12},
    "sdxl": {
        **{"sample_size": 8, "block_out_channels": (8, 16), "transformer_layers_per_block": 1, "attention_head_dim": 2},
        **{"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")},
        **{"cross_attention_dim": 12, "norm_num_groups": 4, "addition_time_embed_dim": 8, "layers_per_block": 1},
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
    },
    "flux": {
        **{"side": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2},
        **{"in_channels": 8, "joint_attention_dim": 12, "pooled_projection_dim": 10, "axes_dims_rope": (2, 2, 4)},
    },
}


@pytest.mark.parametrize("name", SHAPES)
def test_full_size(name):
    """On the meta device: nothing is allocated."""
    model, call = bench_cases.load_case(name, 3, torch.device("meta"), torch.bfloat16)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == MILLIONS[name]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {x.device.type for x in [*model.parameters(), *model.buffers()]} == {"meta"}
    sample = call[next(key for key in call if key in ("sample", "hidden_states"))]
    assert (len(sample), sample.dtype, sample.device.type) == (3, torch.bfloat16, "meta")


@pytest.mark.parametrize(("name", "dtype"), [*((name, "bfloat16") for name in SHAPES), ("flux", "float32")])
def test_a_plan_is_followed(name, dtype, monkeypatch):
    """That nothing was accelerated would be a warning, and so an error."""
    monkeypatch.setitem(SHAPES, name, lambda batch=1, make=SHAPES[name]: make(batch, **SMALLER[name]))
    model, call = bench_cases.load_case(name, 2, dtype=DTYPES[dtype])
    bench = Bench(model, call, num_steps=6, distinct=2)
    (row,) = bench.measure([Configuration("fxmask", 1.5, "whole", "eager")], repeats=1, progress=False)
    assert row.problem is None
    assert row.seconds is not None
    assert 1.3 < row.macs < 1.7
    accelerated = bench.runs["fxmask"].accelerated
    assert accelerated is not None
    assert accelerated.mask.timesteps == bench.timesteps
    runs = accelerated.report().runs
    assert all(run.followed == 5 for run in runs), "all calls but the first"


def test_another_batch():
    """Rows of a call that is given for one batch are repeated or left out, where they are rows."""
    model = torch.nn.Linear(2, 2)
    call = {"input": torch.arange(6.0).reshape(3, 2), "other": {"rows": torch.arange(3), "table": torch.zeros(5)}}
    for batch in (1, 3, 7):
        made = bench_cases.with_batch(model, call, batch)
        assert made["input"].shape == (batch, 2)
        assert made["other"]["rows"].tolist() == [k % 3 for k in range(batch)]
        assert made["other"]["table"].shape == (5,)
    assert bench_cases.with_batch(model, call, None) is call


def test_a_folder_with_weights(tmp_path):
    from conftest import tiny_dit

    model = tiny_dit()
    model.save_pretrained(tmp_path / "pipe" / "transformer")
    for folder in (tmp_path / "pipe", tmp_path / "pipe" / "transformer"):
        loaded, call = bench_cases.load_case(str(folder), dtype=torch.bfloat16)
        assert call == {}
        assert loaded.dtype == torch.bfloat16
        torch.testing.assert_close(loaded.state_dict(), model.to(torch.bfloat16).state_dict())
    (tmp_path / "empty").mkdir()
    with pytest.raises(fxmask.InputError, match="no diffusers model, and no pipeline"):
        bench_cases.load_case(str(tmp_path / "empty"))


def test_devices(monkeypatch):
    assert require_device("cpu") == torch.device("cpu")
    with pytest.raises(fxmask.InputError, match="is no device; choose cpu, cuda"):
        require_device("gpu0")
    with pytest.raises(fxmask.InputError, match="'mps' has not been tried"):
        require_device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(fxmask.InputError, match="sees no NVIDIA GPU"):
        require_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert require_device("cuda") == torch.device("cuda", 0)
    assert require_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(fxmask.InputError, match=r"has 2 GPU\(s\)"):
        require_device("cuda:2")
