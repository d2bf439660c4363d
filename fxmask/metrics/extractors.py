"""Feature extractors whose weights are had elsewhere: Inception for FID and its kin, CLIP for captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fxmask.errors import InputError
from fxmask.metrics.features import LOGITS, POOL, SPATIAL
from fxmask.metrics.optional import optional

SPATIAL_CHANNELS = 7  # of Mixed_6d's first branch, as in ADM's evaluation suite: 7 x 17 x 17 = 2,023 features


class Inception(torch.nn.Module):
    """The Inception network that FID is defined on, by ``torch-fidelity``.

    Args:
        weights: its ``.pth`` file; downloaded if not given.

    Raises:
        InputError: torch-fidelity is missing, or the weights cannot be had.
    """

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        library = optional("torch_fidelity.feature_extractor_inceptionv3")
        kind: Any = library.FeatureExtractorInceptionV3
        try:
            path = None if weights is None else str(weights)
            self.network = kind("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=path)
        except Exception as error:  # of a download, or of a file
            raise InputError(
                f"the weights of Inception cannot be had ({type(error).__name__}); download "
                "pt_inception-2015-12-05-6726825d.pth where there is a network and pass its path, or give another extractor"
            ) from error
        self._spatial: list[torch.Tensor] = []
        self.network.Mixed_6d.branch1x1.register_forward_hook(lambda _module, _given, made: self._spatial.append(made))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features of images ``[B, 3, H, W]`` in [-1, 1]; of one channel, it is repeated."""
        wide = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        self._spatial.clear()
        pool, logits = self.network(((wide.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
        (spatial,) = self._spatial
        return {POOL: pool, SPATIAL: spatial[:, :SPATIAL_CHANNELS].flatten(1), LOGITS: logits}


class Clip:
    """Embeddings of images and captions by a CLIP model of ``transformers``.

    Args:
        name: on the hub, or a local folder.

    Raises:
        InputError: transformers is missing, or the weights cannot be had.
    """

    def __init__(self, name: str = "openai/clip-vit-large-patch14") -> None:
        library = optional("transformers")
        try:
            self.model = library.CLIPModel.from_pretrained(name).eval()
            self.processor = library.CLIPProcessor.from_pretrained(name)
        except Exception as error:  # of a hub, of a file
            raise InputError(
                f"the weights of CLIP {name!r} cannot be had ({type(error).__name__}); give a local folder"
            ) from error

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings ``[N, D]`` of images ``[N, 3, H, W]`` in [-1, 1], and of their captions."""
        pictures = list(((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
        given = self.processor(text=list(captions), images=pictures, return_tensors="pt", padding=True, truncation=True)
        told = self.model(**given)
        return told.image_embeds, told.text_embeds
