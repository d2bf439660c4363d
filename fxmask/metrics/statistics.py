"""Mean and covariance of features, batch after batch, and the file that they are kept in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxmask.errors import InputError


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of centred products of features; parts can be added in any order.

    Chan et al., "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.

    Attributes:
        count: N.
        mean: float64 ``[D]``.
        products: float64 ``[D, D]``, ``sum (x - mean)(x - mean)^T``.
    """

    count: int
    mean: torch.Tensor
    products: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor) -> Moments:
        """Of features ``[N, D]``."""
        if features.dim() != 2:
            raise InputError(f"features must be [N, D], got {list(features.shape)}; flatten them first")
        x = features.detach().double().cpu()
        mean = x.mean(0) if len(x) else torch.zeros(x.shape[1], dtype=torch.float64)
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    def __add__(self, other: Moments) -> Moments:
        """Of both sets together."""
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        apart = other.mean - self.mean
        products = self.products + other.products
        products = products + torch.outer(apart, apart) * (self.count * other.count / count)
        return Moments(count, self.mean + apart * (other.count / count), products)

    @property
    def covariance(self) -> torch.Tensor:
        """Unbiased, float64 ``[D, D]``.

        Raises:
            InputError: of fewer than two samples.
        """
        if self.count < 2:
            raise InputError(f"a covariance needs two samples or more, got {self.count}")
        return self.products / (self.count - 1)
