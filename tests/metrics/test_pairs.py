"""SSIM and LPIPS agree with their libraries; PSNR and relative error with their formulas."""

from __future__ import annotations

import pytest
import torch

import fxmask
from fxmask.metrics import lpips, psnr, relative_error, ssim


def pair(side: int = 32, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(4, channels, side, side, generator=generator) * 2 - 1
    return a, (a + 0.2 * torch.randn(a.shape, generator=generator)).clamp(-1, 1)


def test_ssim_is_that_of_scikit_image_or_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional.image")
    a, b = pair()
    theirs = functional.structural_similarity_index_measure(b, a, data_range=2.0, reduction="none")
    assert ssim(b, a).tolist() == pytest.approx(theirs.tolist(), rel=1e-3)
    assert ssim(a, a).tolist() == pytest.approx([1.0] * 4)
    small = pair(16, 1)
    assert (ssim(*small, window=7) < 1).all()


def test_lpips_is_that_of_torchmetrics_on_the_same_network():
    """Its AlexNet with random weights, and the channel weights that it ships."""
    library = pytest.importorskip("torchmetrics.functional.image.lpips")
    torch.manual_seed(0)
    theirs = library._LPIPS(pretrained=True, net="alex", pnet_rand=True)
    a, b = pair(64)
    layers = [getattr(theirs, f"lin{k}") for k in range(theirs.L)]
    weights = [next(layer.parameters()).detach() for layer in layers]
    with torch.no_grad():
        expected = theirs(b, a, normalize=False).flatten()
        found = lpips(b, a, lambda x: list(theirs.net(theirs.scaling_layer(x))), weights)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-3)


def test_lpips_on_any_network():
    a, b = pair()
    network = torch.nn.Conv2d(3, 8, 3)
    with torch.no_grad():
        assert lpips(a, a, lambda x: [network(x)]).tolist() == [0.0] * 4
        assert (lpips(b, a, lambda x: [network(x), network(x) ** 2]) > 0).all()


def test_psnr_and_relative_error():
    a = torch.zeros(2, 1, 4, 4)
    b = a + torch.tensor([0.1, 0.2]).reshape(2, 1, 1, 1)
    assert psnr(b, a).tolist() == pytest.approx([26.0206, 20.0], abs=1e-3)
    assert relative_error(1.1 * torch.ones(3, 2), torch.ones(3, 2)) == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("metric", [psnr, ssim, relative_error])
def test_model_outputs_are_refused(metric):
    with pytest.raises(fxmask.InputError, match="must be a tensor"):
        metric({"sample": torch.zeros(1)}, torch.zeros(1))
