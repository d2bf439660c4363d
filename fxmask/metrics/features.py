"""Features of a set of images, batch after batch and rank by rank, and a set to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from fxmask.errors import InputError
from fxmask.metrics.sets import frechet_distance, inception_score, precision_recall
from fxmask.metrics.statistics import Moments

Extractor = Callable[[torch.Tensor], "torch.Tensor | Mapping[str, torch.Tensor]"]
POOL, SPATIAL, LOGITS = "pool", "spatial", "logits"


class FeatureSet:
    """What an extractor makes of the images of a set.

    Args:
        extractor: a module, or any function, of images ``[B, C, H, W]``. It returns features ``[B, ...]``, or a dict of
            ``"pool"`` (FID, precision, recall), ``"spatial"`` (sFID) and ``"logits"`` (IS).
        keep: keep each image's pooled features and logits, which precision, recall and IS need; FID and sFID do not.
    """

    def __init__(self, extractor: Extractor, keep: bool = True) -> None:
        self._extractor = extractor
        self._keep = keep
        self._moments: dict[str, Moments] = {}
        self._kept: dict[str, list[torch.Tensor]] = {POOL: [], LOGITS: []}

    @torch.no_grad()
    def update(self, images: torch.Tensor) -> None:
        """Add a batch."""
        found = self._extractor(images)
        named = {POOL: found} if isinstance(found, torch.Tensor) else dict(found)
        unknown = named.keys() - {POOL, SPATIAL, LOGITS}
        if unknown or POOL not in named:
            raise InputError(f"the extractor returns {sorted(named)}; 'pool', and perhaps 'spatial' and 'logits', are needed")
        for name, value in named.items():
            flat = value.flatten(1)
            if name != LOGITS:
                part = Moments.of(flat)
                self._moments[name] = self._moments[name] + part if name in self._moments else part
            if self._keep and name in self._kept:
                self._kept[name].append(flat.cpu())

    def gathered(self) -> FeatureSet:
        """The set of all ranks together, in the order of ranks; this one, without ``torch.distributed``."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return self
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (self._moments, self._kept))
        whole = FeatureSet(self._extractor, self._keep)
        for moments, kept in parts:
            for name, value in moments.items():
                whole._moments[name] = whole._moments[name] + value if name in whole._moments else value
            for name, values in kept.items():
                whole._kept[name] += values
        return whole

    @property
    def count(self) -> int:
        """How many images there are."""
        return self._moments[POOL].count if POOL in self._moments else 0

    def moments(self, name: str = POOL) -> Moments | None:
        """Mean and covariance of features; ``None`` if the extractor does not make them."""
        return self._moments.get(name)

    def kept(self, name: str) -> torch.Tensor | None:
        """Features or logits of every image ``[N, D]``, where they were kept."""
        return torch.cat(self._kept[name]) if self._kept[name] else None

    def reference(self) -> Reference:
        """This set as one to compare with."""
        pool, spatial = self.moments(), self.moments(SPATIAL)
        if pool is None:
            raise InputError("no images were added; call update(images) first")
        pair = None if spatial is None else (spatial.mean, spatial.covariance)
        return Reference((pool.mean, pool.covariance), pair, self.kept(POOL))


@dataclass(frozen=True)
class Reference:
    """Statistics of a set of real images.

    Attributes:
        pool: mean ``[D]`` and covariance ``[D, D]`` of pooled features.
        spatial: those of spatial features, if known.
        features: of each image ``[N, D]``, for precision and recall, if known.
    """

    pool: tuple[torch.Tensor, torch.Tensor]
    spatial: tuple[torch.Tensor, torch.Tensor] | None = None
    features: torch.Tensor | None = None

    @classmethod
    def of(cls, extractor: Extractor, batches: Iterable[torch.Tensor]) -> Reference:
        """Of batches of images."""
        found = FeatureSet(extractor)
        for batch in batches:
            found.update(batch)
        return found.reference()

    @classmethod
    def load(cls, path: str | Path, extractor: Extractor | None = None, batch_size: int = 64) -> Reference:
        """Read a file in the layout of ADM's evaluation suite.

        Args:
            path: ``.npz`` with ``mu`` and ``sigma``, perhaps ``mu_s`` and ``sigma_s``, and ``features`` of ours; or with
                images ``arr_0``, uint8 ``[N, H, W, C]``.
            extractor: of the images, taken as ``[B, C, H, W]`` in [-1, 1].
            batch_size: of the images.

        Raises:
            InputError: it is no such file, or it holds images and no extractor was given.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in ("mu", "sigma", "mu_s", "sigma_s", "features") if name in file}
                images = file["arr_0"] if "arr_0" in file and ("mu" not in file) else None
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read as an .npz of reference statistics: {error}") from error
        if images is not None and extractor is not None:
            return cls.of(extractor, (as_tensor(images[k : k + batch_size]) for k in range(0, len(images), batch_size)))
        if not {"mu", "sigma"} <= arrays.keys():
            raise InputError(f"{path} holds {'images, and needs an extractor' if images is not None else 'no mu and sigma'}")
        found = {name: torch.from_numpy(value) for name, value in arrays.items()}
        spatial = (found["mu_s"], found["sigma_s"]) if {"mu_s", "sigma_s"} <= found.keys() else None
        return cls((found["mu"], found["sigma"]), spatial, found.get("features"))

    def save(self, path: str | Path) -> None:
        """Write the same layout."""
        arrays = {"mu": self.pool[0], "sigma": self.pool[1]}
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial[0], "sigma_s": self.spatial[1]}
        if self.features is not None:
            arrays["features"] = self.features
        np.savez(path, **{name: value.numpy() for name, value in arrays.items()})  # type: ignore[arg-type]


def as_tensor(images: np.ndarray[Any, Any]) -> torch.Tensor:
    """Images uint8 ``[N, H, W, C]`` as float32 ``[N, C, H, W]`` in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def compare_sets(found: FeatureSet, reference: Reference, neighbours: int = 3, splits: int = 10) -> dict[str, float]:
    """FID, sFID, IS, precision and recall of a set; those that its features and the reference allow.

    Args:
        found: features of the generated images, of all ranks (``gathered``).
        reference: of the real ones.
        neighbours: of precision and recall.
        splits: of IS.
    """
    pool, spatial = found.moments(), found.moments(SPATIAL)
    if pool is None:
        raise InputError("no images were added; call update(images) first")
    scores = {"fid": frechet_distance(pool.mean, pool.covariance, *reference.pool)}
    if spatial is not None and reference.spatial is not None:
        scores["sfid"] = frechet_distance(spatial.mean, spatial.covariance, *reference.spatial)
    logits, features = found.kept(LOGITS), found.kept(POOL)
    if logits is not None and len(logits) >= splits:
        scores["is"] = inception_score(logits, splits)[0]
    if features is not None and reference.features is not None:
        scores["precision"], scores["recall"] = precision_recall(features, reference.features, neighbours)
    return scores
