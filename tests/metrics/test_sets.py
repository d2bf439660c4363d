"""Metrics of sets agree with the reference libraries to 1e-3 relative, and with closed forms on Gaussians."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fxmask
from fxmask.metrics import (
    FeatureSet,
    Moments,
    Reference,
    clip_score,
    compare_sets,
    frechet_distance,
    inception_score,
    precision_recall,
)

pytest.importorskip("torchmetrics")
pytest.importorskip("torch_fidelity")


def features(count: int, width: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    return torch.randn(count, width, generator=generator) @ mixing + shift


def of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return Moments.of(x).mean, Moments.of(x).covariance


@pytest.mark.parametrize(("counts", "width"), [((300, 200), 24), ((40, 60), 64)])
def test_fid_is_that_of_both_libraries(counts, width):
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torchmetrics.image.fid import _compute_fid

    a, b = (features(n, width, k, 0.3 * k) for k, n in enumerate(counts))
    ours = frechet_distance(*of(a), *of(b))
    pairs = [dict(zip(("mu", "sigma"), (x.numpy() for x in of(y)), strict=True)) for y in (a, b)]
    theirs = fid_statistics_to_metric(*pairs, verbose=False)["frechet_inception_distance"]
    assert ours == pytest.approx(float(_compute_fid(*of(a), *of(b))), rel=1e-3)
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_fid_of_gaussians_is_the_closed_form():
    """Axis-aligned: ``|m - n|^2 + sum (s - t)^2``; the same rotated; zero of a set with itself."""
    s, t = torch.rand(6, dtype=torch.float64) + 0.5, torch.rand(6, dtype=torch.float64) + 0.5
    m, n = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    expected = float((m - n).square().sum() + (s - t).square().sum())
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    for r in (torch.eye(6, dtype=torch.float64), turn):
        found = frechet_distance(r @ m, r @ torch.diag(s**2) @ r.T, r @ n, r @ torch.diag(t**2) @ r.T)
        assert found == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(m, torch.diag(s**2), m, torch.diag(s**2)) == pytest.approx(0, abs=1e-9)


def test_fid_of_samples_comes_to_that_of_their_gaussians():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(40_000, 4, generator=generator) * 2.0
    b = torch.randn(40_000, 4, generator=generator) + 1.0
    assert frechet_distance(*of(a), *of(b)) == pytest.approx(4 * (1 + 1), rel=0.02)


@pytest.mark.parametrize("splits", [1, 7, 10])
def test_inception_score_is_that_of_torch_fidelity(splits):
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * features(203, 12, 5)
    theirs = isc_features_to_metric(logits, splits=splits, shuffle=False)
    mean, deviation = inception_score(logits, splits)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-3)
    assert deviation == pytest.approx(theirs["inception_score_std"], rel=1e-3, abs=1e-9)


def test_inception_score_of_sure_and_even_classes_is_their_number():
    sure = 100.0 * torch.eye(8).repeat(5, 1)
    assert inception_score(sure, 1)[0] == pytest.approx(8)
    assert inception_score(torch.zeros(40, 8), 1)[0] == pytest.approx(1)
    with pytest.raises(fxmask.InputError, match="no 10 splits"):
        inception_score(sure[:5])


@pytest.mark.parametrize("neighbours", [1, 3])
def test_precision_and_recall_are_those_of_torch_fidelity(neighbours):
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    generated, real = features(180, 5, 1, 0.4), features(210, 5, 2)
    theirs = calculate_precision_recall_full(generated, real, neighbours, 64)
    assert precision_recall(generated, real, neighbours) == pytest.approx(tuple(map(float, theirs)), rel=1e-3)


def test_precision_and_recall_at_their_ends():
    x = features(50, 4, 0)
    assert precision_recall(x, x.clone()) == (1.0, 1.0)
    assert precision_recall(x, x + 1000) == (0.0, 0.0)
    few = x[:1].repeat(50, 1) + 1e-6 * features(50, 4, 9)  # one mode: precise, and most of the set is not reached
    precision, recall = precision_recall(few, x)
    assert precision == 1.0
    assert recall < 0.1
    with pytest.raises(fxmask.InputError, match="no 3 neighbours"):
        precision_recall(x[:3], x)


def test_clip_score_is_that_of_torchmetrics():
    from torchmetrics.functional.multimodal.clip_score import _clip_score_update

    images, texts = features(6, 16, 0), features(6, 16, 1)

    class Model(torch.nn.Module):
        device = torch.device("cpu")
        config = None

        def get_image_features(self, *_args, **_kwargs):
            return images

        def get_text_features(self, *_args, **_kwargs):
            return texts

    theirs, _ = _clip_score_update([torch.zeros(3, 4, 4)] * 6, ["a"] * 6, Model(), _processor)
    assert (theirs > 0).any()
    assert clip_score(images, texts).tolist() == pytest.approx(theirs.clamp_min(0).tolist(), rel=1e-3, abs=1e-6)
    assert clip_score(images, -images).tolist() == [0.0] * 6


def _processor(**_given):
    return {"pixel_values": torch.zeros(6, 3, 4, 4), "input_ids": torch.zeros(6, 3), "attention_mask": torch.ones(6, 3)}


def test_moments_of_parts_are_those_of_the_whole():
    x = features(101, 7, 3, 50.0)
    parts = Moments.of(x[:1]) + Moments.of(x[1:30]) + Moments.of(x[30:30]) + Moments.of(x[30:])
    torch.testing.assert_close(parts.mean, x.double().mean(0))
    torch.testing.assert_close(parts.covariance, torch.cov(x.double().T))
    assert parts.count == 101
    with pytest.raises(fxmask.InputError, match="two samples"):
        _ = Moments.of(x[:1]).covariance


class Extractor(torch.nn.Module):
    """Pooled and spatial features, and logits, of images [B, 1, 4, 4]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pool, self.logits = torch.nn.Linear(16, 6), torch.nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        flat = x.flatten(1)
        return {"pool": self.pool(flat).tanh(), "spatial": x[:, :, :2], "logits": 4 * self.logits(flat)}


def images(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_batches_do_not_matter_and_a_file_keeps_the_reference(tmp_path):
    extractor, real, made = Extractor(), images(60, 0), images(50, 1)
    reference = Reference.of(extractor, [real])
    reference.save(tmp_path / "real.npz")
    whole, parts = FeatureSet(extractor), FeatureSet(extractor)
    whole.update(made)
    for part in made.split(13):
        parts.update(part)
    scores = compare_sets(whole, reference)
    assert set(scores) == {"fid", "sfid", "is", "precision", "recall"}
    again = compare_sets(parts, Reference.load(tmp_path / "real.npz"))
    assert again == pytest.approx(scores, rel=1e-6)
    assert scores["fid"] == pytest.approx(frechet_distance(*of(extractor(made)["pool"]), *of(extractor(real)["pool"])))


def test_the_files_of_adm_are_read(tmp_path):
    """``mu``, ``sigma``, ``mu_s``, ``sigma_s``, as its reference batches have them; or uint8 images [N, H, W, C]."""
    extractor = Extractor()
    pixels = torch.randint(0, 256, (40, 4, 4, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    np.savez(tmp_path / "images.npz", arr_0=pixels.numpy())
    found = Reference.load(tmp_path / "images.npz", extractor, batch_size=7)
    scaled = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.testing.assert_close(found.pool[0], extractor(scaled)["pool"].double().mean(0))
    mean, covariance = of(features(30, 6, 0))
    np.savez(tmp_path / "statistics.npz", mu=mean, sigma=covariance, mu_s=mean, sigma_s=covariance)
    statistics = Reference.load(tmp_path / "statistics.npz")
    assert torch.equal(statistics.spatial[1], covariance)
    made = FeatureSet(extractor, keep=False)
    made.update(images(30, 4))
    assert set(compare_sets(made, Reference(found.pool))) == {"fid"}
    with pytest.raises(fxmask.InputError, match="needs an extractor"):
        Reference.load(tmp_path / "images.npz")
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    with pytest.raises(fxmask.InputError, match="cannot be read"):
        Reference.load(tmp_path / "bad.npz")


def test_a_plain_tensor_is_pooled_features_and_other_names_are_refused():
    plain = FeatureSet(lambda x: x.flatten(1))
    plain.update(images(20, 0))
    assert plain.count == 20
    with pytest.raises(fxmask.InputError, match="'pool'"):
        FeatureSet(lambda x: {"pools": x}).update(images(2, 0))
    with pytest.raises(fxmask.InputError, match="no images were added"):
        compare_sets(FeatureSet(Extractor()), plain.reference())


def _rank(rank: int, size: int, place: str, results) -> None:
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=size)
    extractor, made = Extractor(), images(50, 1)
    found = FeatureSet(extractor)
    bounds = [0, 18, 50]
    for part in made[bounds[rank] : bounds[rank + 1]].split(9):
        found.update(part)
    results[rank] = compare_sets(found.gathered(), Reference.of(extractor, [images(60, 0)]))
    dist.destroy_process_group()


def test_ranks_together_come_to_what_one_process_finds(tmp_path):
    """Two processes over gloo, with shares of other sizes."""
    alone = FeatureSet(Extractor())
    alone.update(images(50, 1))
    expected = compare_sets(alone, Reference.of(Extractor(), [images(60, 0)]))
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank, (2, str(tmp_path / "store"), results), nprocs=2)
        assert results[0] == results[1]
        assert dict(results[0]) == pytest.approx(expected, rel=1e-6)


def test_weights_that_cannot_be_had_are_named(tmp_path):
    from fxmask.metrics.extractors import Clip, Inception

    (tmp_path / "weights.pth").write_bytes(b"nothing")
    with pytest.raises(fxmask.InputError, match="weights of Inception cannot be had"):
        Inception(tmp_path / "weights.pth")
    with pytest.raises(fxmask.InputError, match="weights of CLIP"):
        Clip(str(tmp_path / "no such folder"))
