"""The shipped checkpoints are what they claim to be, and the examples run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fxmask

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "studies")]
digits = pytest.importorskip("digits")

PIXELS = ["ddpm", "pruned", "consistency", "dit", "classifier", "autoencoder"]
TEXT = ["ldm", "pixart"]


@pytest.mark.parametrize("name", [*PIXELS, *TEXT, *(f"{name}/text_encoder" for name in TEXT)])
def test_checkpoints_are_small_and_in_half_precision(name):
    from safetensors.torch import load_file

    if "text_encoder" in name:
        pytest.importorskip("transformers")
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
    trajectory = fxmask.record(
        digits.load_model("dit"),
        digits.load_scheduler(),
        num_inference_steps=20,
        batch_size=40,
        example_inputs={"class_labels": labels},
    )
    predicted = digits.load_classifier()(trajectory.final.clamp(-1, 1)).argmax(dim=1)
    assert float((predicted == labels).float().mean()) >= 0.75


def test_autoencoder_reconstructs_and_its_latents_have_unit_variance():
    autoencoder = digits.load_model("autoencoder")
    images = digits.load_digits()[0][:200]
    latents = autoencoder.encode(images).latent_dist.mean
    scaled = latents * autoencoder.config.scaling_factor
    assert latents.shape[1:] == (4, 8, 8)
    assert abs(float(scaled.mean())) < 0.1
    assert abs(float(scaled.std()) - 1) < 0.1
    error = (autoencoder.decode(latents).sample - images).square().mean()
    assert float(10 * torch.log10(4 / error)) > 30


def test_latents_are_not_clipped():
    config = digits.load_scheduler(folder="latent_scheduler").config
    assert not config.clip_sample
    assert config.beta_schedule == digits.load_scheduler().config.beta_schedule


def test_captions_become_one_token_per_word():
    pytest.importorskip("transformers")
    captions = [caption for digit in range(digits.NUM_CLASSES) for caption in digits.captions_of(digit)]
    tokens, mask = digits.tokenize_captions([*captions, "", "a handwritten elephant"])
    assert tokens.shape == mask.shape == (len(captions) + 2, digits.CAPTION_TOKENS)
    pad, start, end, unknown = range(len(digits.SPECIAL_TOKENS))
    assert torch.equal(mask == 0, tokens == pad)
    assert (tokens[:, 0] == start).all()
    assert ((tokens == end).sum(1) == 1).all()  # Nothing was cut off.
    assert ((tokens == unknown).sum(1) == torch.tensor([0] * (len(captions) + 1) + [1])).all()
    assert mask.sum(1).tolist() == [len(caption.split()) + 2 for caption in [*captions, "", "a handwritten elephant"]]


@pytest.mark.parametrize("name", TEXT)
def test_pipelines_run_without_a_hub(name, tmp_path, monkeypatch):
    pytest.importorskip("transformers")

    def refuse(*_):
        raise AssertionError("no network, please")

    monkeypatch.setattr("socket.socket.connect", refuse)
    pipeline = digits.load_pipeline(name)
    captions = ["the digit 7", "a handwritten three"]
    images = digits.draw_captions(pipeline, captions, steps=4, generator=torch.Generator().manual_seed(0))
    assert images.shape == (2, 1, 16, 16)
    assert images.isfinite().all()
    pipeline.save_pretrained(tmp_path)
    again = type(pipeline).from_pretrained(tmp_path)
    loaded = digits.draw_captions(again, captions, steps=4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded, images)


@pytest.mark.parametrize("name", TEXT)
def test_text_models_follow_their_captions(name):
    """As above: a few samples of 20 steps must not be far from the 1,000 of 50 steps that `train.py evaluate` draws."""
    pytest.importorskip("transformers")
    labels = torch.arange(20) % 10
    captions = [digits.captions_of(label)[place % 14] for place, label in enumerate(labels.tolist())]
    images = digits.draw_captions(digits.load_pipeline(name), captions, steps=20, generator=torch.Generator().manual_seed(0))
    predicted = digits.load_classifier()(images).argmax(dim=1)
    assert float((predicted == labels).float().mean()) >= 0.75


@pytest.mark.parametrize("name", TEXT)
def test_conditioning_is_what_the_pipeline_passes(name):
    """So that what `encode_captions` returns can stand for a call of the pipeline's own."""
    pytest.importorskip("transformers")
    pipeline = digits.load_pipeline(name)
    denoiser = pipeline.unet if name == "ldm" else pipeline.transformer
    calls = []
    denoiser.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    digits.draw_captions(pipeline, ["the digit 7"], steps=1, guidance=1.0)
    expected = digits.encode_captions(pipeline.text_encoder, ["the digit 7"])
    given = {key: value for key, value in calls[0].items() if value is not None and key not in ("timestep", "return_dict")}
    assert given.pop("added_cond_kwargs", None) == expected.pop("added_cond_kwargs", None)
    torch.testing.assert_close(given, expected)


def run_example(name, *options):
    common = ["--steps", "4", "--speedup", "1.4", "--batches", "1", "--repeats", "1"]
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *common, *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize(("name", "dtype"), [*((name, "float32") for name in ("ddpm", "dit", *TEXT)), ("pixart", "bfloat16")])
def test_example(name, dtype, tmp_path):
    if name in TEXT:
        pytest.importorskip("transformers")
    picture = tmp_path / "out.png"
    options = ["--backend", "eager", "--device", "cpu", "--dtype", dtype, "--output", str(picture)]
    result = run_example(name, *options)
    assert result.returncode == 0, result.stderr
    assert f"cpu, {dtype}" in result.stdout
    for line in ("MAC ratio", "measured speed-up", "PSNR", "distinct step graphs", "learning and compilation"):
        assert line in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_example_on_a_gpu_that_is_not_there():
    result = run_example("ddpm", "--device", "cuda")
    assert result.returncode == 2
    assert "argument --device: device 'cuda'" in result.stderr
    assert "sees no NVIDIA GPU" in result.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("backend", ["inductor", "cudagraph"])
@pytest.mark.parametrize("name", ["ddpm", "dit", *TEXT])
def test_example_on_a_gpu(name, backend, tmp_path):
    options = ["--backend", backend, "--device", "cuda", "--dtype", "bfloat16", "--output", str(tmp_path / "out.png")]
    result = run_example(name, *options)
    assert result.returncode == 0, result.stderr
    assert "cuda:0, bfloat16" in result.stdout


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("family", ["dit", "pixart", "dit-4"])
def test_coarse_sampling_at_every_step_is_the_fine_one(family, eta):
    """The rival "fewer steps, same noise" is the scheduler's own rule: with all of the steps it is the full sampler."""
    if family in TEXT:
        pytest.importorskip("transformers")
    import quality

    cell = quality.Cell.of(family, 5, eta)
    fine = cell.record(3, 2)
    coarse = quality.coarse_ddim(cell.model, fine, [int(t) for t in fine.timesteps], eta)
    assert torch.allclose(coarse, fine.final, atol=1e-5)
    fewer = quality.coarse_ddim(cell.model, fine, [int(t) for t in fine.timesteps[::2]], eta)
    assert float((fewer - fine.final).abs().max()) > 1e-3, "fewer steps are not the same"


def test_quality_table_says_who_leads(tmp_path):
    import quality

    results = quality.Results(tmp_path / "dit-20-deterministic.json")
    for name, decibels in (("fxmask", 40.0), ("FORA: all branches reused", 35.5), ("whole output, fitted forecast", 38.0)):
        results.put(f"{name} 2.0", {"ratio": 2.0, "psnr": decibels, "p10": 30.0, "images": torch.zeros(1)})
    assert quality.Results(results.path).has("fxmask 2.0")
    quality.write_table(tmp_path, tmp_path / "out.md")
    assert "| 40.0 | 35.5 FORA: all branches reused | +4.5 | 38.0 |" in (tmp_path / "out.md").read_text()
    for name, decibels in (("FORA: all branches reused", 39.0), ("whole output, fitted forecast", 40.2)):
        results.put(f"{name} 2.0", {"ratio": 2.0, "psnr": decibels, "p10": 30.0, "images": torch.zeros(1)})
    quality.write_table(tmp_path, tmp_path / "out.md")
    assert "| 40.0 | 39.0 FORA: all branches reused | **+1.0** | **40.2** |" in (tmp_path / "out.md").read_text()


def test_quality_table_with_guidance(tmp_path):
    import quality

    results = quality.Results(tmp_path / "dit-4-20-deterministic.json")
    for name, decibels in (("fxmask", 30.5), ("fxmask, lanes alike", 30.0), ("FORA: all branches reused", 20.0)):
        more = {"ssim": decibels / 100, "features": 1 - decibels / 100, "p10": 15.0, "images": torch.zeros(1)}
        results.put(f"{name} 2.0", {"ratio": 2.0, "psnr": decibels, **more})
    quality.write_table(tmp_path, tmp_path / "out.md")
    text = (tmp_path / "out.md").read_text()
    assert "| dit-4-20-deterministic | 2x | 30.5 | 20.0 FORA: all branches reused | +10.5 |" in text, "lanes alike are no rival"
    assert "| dit-4-20-deterministic | 2x | 30.0 | 30.5 | 0.305 | 0.200 | 0.695 | 0.800 |" in text


def test_converged_noise_adds_up_to_the_recorded_one():
    """The bridge passes every timestep, is normal, and the rule of coarse steps gives the recorded noise back."""
    from quality_cells import Cell
    from quality_converged import bridge
    from quality_rivals import coarse_ddim, noise_weights

    cell = Cell("dit", 5, 1.0)
    run = cell.record(3, 4)
    timesteps, noises = bridge(run, 1.0, torch.Generator().manual_seed(0))
    assert timesteps == list(range(int(run.timesteps[0]), -1, -1))
    assert torch.stack(noises).std() == pytest.approx(1.0, abs=0.01)
    grid = [int(t) for t in run.timesteps]
    for i, (t, after) in enumerate(zip(grid, [*grid[1:], -1], strict=True)):
        weights = noise_weights(run.scheduler, list(range(t, after - 1, -1)), 1.0)
        inside = torch.stack([z for s, z in zip(timesteps, noises, strict=True) if after < s <= t])
        if t:  # the last step injects none
            total = torch.tensordot(weights.float(), inside, 1)
            torch.testing.assert_close(total, run.noises[i][0], rtol=1e-4, atol=1e-4)
    given = coarse_ddim(cell.model, run, grid, 1.0, [z[0] if z else torch.zeros(1) for z in run.noises])
    torch.testing.assert_close(given, run.final, rtol=1e-4, atol=1e-4)


def test_tables_of_the_paper_that_were_not_made_stay(tmp_path):
    import paper

    row = {"method": "full", "macs": 1e9, "ratio": 1.0, "images": 16, "psnr": 40.0}
    place = tmp_path / "made" / "table5" / "full" / "seed0" / "row.json"
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps(row))
    notes = "Notes.\n\n## What they say\n\nMore.\n"
    first = paper.page(tmp_path / "made", notes, "")
    assert "| full | 1G | 1.00x | 40.0 |" in first
    assert first.count("Not measured yet.") == len(paper.TABLES) - 1
    assert paper.page(tmp_path / "nothing", notes, first) == first
