"""Distances and scores of sets of images, from their features."""

from __future__ import annotations

import numpy as np
import torch

from fxmask.errors import InputError
from fxmask.metrics.optional import optional

CHUNK = 4096  # rows of a distance matrix at a time


def frechet_distance(
    mean: torch.Tensor, covariance: torch.Tensor, other_mean: torch.Tensor, other_covariance: torch.Tensor
) -> float:
    """Squared Frechet distance of two Gaussians (Dowson and Landau, 1982, Eq. 4); FID on Inception's features.

        ||m - n||^2 + Tr(A) + Tr(B) - 2 Tr((B^(1/2) A B^(1/2))^(1/2))

    The matrix under the last root is symmetric, so that its eigenvalues are real also where A and B are singular.

    Args:
        mean: ``[D]``.
        covariance: ``[D, D]``.
        other_mean: ``[D]``.
        other_covariance: ``[D, D]``.
    """
    linalg = optional("scipy.linalg")
    a, b = (np.asarray(x, dtype=np.float64) for x in (covariance, other_covariance))
    values, vectors = linalg.eigh(b)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    shared = np.sqrt(np.clip(linalg.eigvalsh(root @ a @ root), 0, None)).sum()
    apart = np.square(np.asarray(mean, dtype=np.float64) - np.asarray(other_mean, dtype=np.float64)).sum()
    return float(apart + np.trace(a) + np.trace(b) - 2 * shared)


def inception_score(logits: torch.Tensor, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation over splits of ``exp E[KL(p(y|x) || p(y))]`` (Salimans et al., 2016).

    Args:
        logits: ``[N, classes]``; splits are taken in order.
        splits: how many.

    Raises:
        InputError: fewer images than splits.
    """
    if len(logits) < splits:
        raise InputError(f"{len(logits)} images make no {splits} splits; give more images, or fewer splits")
    scores = []
    for k in range(splits):
        part = logits[k * len(logits) // splits : (k + 1) * len(logits) // splits].double()
        told = part.log_softmax(1)
        usual = told.exp().mean(0, keepdim=True).log()
        scores.append((told.exp() * (told - usual)).sum(1).mean().exp())
    found = torch.stack(scores)
    return float(found.mean()), float(found.std(correction=0))


@torch.no_grad()
def precision_recall(generated: torch.Tensor, real: torch.Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., 2019): shares of each set within the other's manifold.

    A point is within a set's manifold if some point of the set is nearer than that point's ``neighbours``-th nearest one.

    Args:
        generated: features ``[N, D]``.
        real: features ``[M, D]``.
        neighbours: k.

    Raises:
        InputError: a set is too small.
    """
    if min(len(generated), len(real)) <= neighbours:
        raise InputError(f"sets of {len(generated)} and {len(real)} have no {neighbours} neighbours each; give more images")
    generated, real = generated.double(), real.double()
    return _within(generated, real, neighbours), _within(real, generated, neighbours)


def _within(points: torch.Tensor, manifold: torch.Tensor, neighbours: int) -> float:
    reach = torch.cat([_far(part, manifold, neighbours) for part in _parts(manifold)])
    found = [(torch.cdist(part, manifold, compute_mode=EXACT) <= reach).any(1) for part in _parts(points)]
    return float(torch.cat(found).double().mean())


EXACT = "donot_use_mm_for_euclid_dist"


def _far(part: torch.Tensor, manifold: torch.Tensor, neighbours: int) -> torch.Tensor:
    return torch.cdist(part, manifold, compute_mode=EXACT).kthvalue(neighbours + 1, dim=1).values  # itself is the first


def clip_score(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """CLIP score per pair, ``[N]``: ``100 max(cos(image, text), 0)`` (Hessel et al., 2021, with the usual scale).

    Args:
        images: embeddings ``[N, D]`` of the images.
        texts: embeddings ``[N, D]`` of their captions.
    """
    return 100 * torch.nn.functional.cosine_similarity(images.double(), texts.double(), dim=1).clamp_min(0)


def _parts(rows: torch.Tensor) -> list[torch.Tensor]:
    return [rows[k : k + CHUNK] for k in range(0, len(rows), CHUNK)]
