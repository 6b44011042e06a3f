"""The Fréchet distance between Gaussians, and the statistics it takes, gathered a batch at a time; all in fp64."""

from __future__ import annotations

import torch
from torch import Tensor


class FeatureStatistics:
    """Gather mean and covariance of feature vectors without keeping these.

    The covariance divides by n - 1. Batches are merged by their means (Chan, Golub and LeVeque, 1979), so a large mean costs no digits.
    """

    def __init__(self, dimensions: int) -> None:
        if dimensions < 1:
            raise ValueError(f"Features of {dimensions} dimensions were announced: give 1 or more.")
        self.count = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64)
        self._scatter = torch.zeros(dimensions, dimensions, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add features (n, d). Raises ValueError on another shape and on values that are not finite."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"Features of shape {tuple(features.shape)} came: they must be (clips, {len(self.mean)}).")
        values = features.detach().cpu().double()
        if not values.isfinite().all():
            raise ValueError("Features with NaN or infinite values came: look at the clips and at the detector that made them.")
        if not len(values):
            return
        mean = values.mean(dim=0)
        centred = values - mean
        total, step = self.count + len(values), mean - self.mean
        self._scatter += centred.T @ centred + torch.outer(step, step) * (self.count * len(values) / total)
        self.mean = self.mean + step * (len(values) / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """Give the covariance (d, d), divided by n - 1; raises ValueError below two vectors."""
        if self.count < 2:
            raise ValueError(f"{self.count} feature vectors were seen: a covariance needs 2 or more.")
        return self._scatter / (self.count - 1)


def frechet_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """Give |m - m'|^2 + Tr(S + S' - 2 (S S')^(1/2)) of two Gaussians: the squared 2-Wasserstein distance, 0 or more.

    means (d,), covariances (d, d), symmetric, of any rank. The trace of the root is that of (S^(1/2) S' S^(1/2))^(1/2), which is symmetric:
    two eigen-decompositions, no inverse and no complex number. Source: Dowson and Landau, 1982.
    """
    shapes = [tuple(value.shape) for value in (mean, covariance, other_mean, other_covariance)]
    size = len(mean)
    if shapes != [(size,), (size, size)] * 2:
        raise ValueError(f"Means and covariances of shapes {shapes} came: they must be (d,), (d, d), (d,), (d, d).")
    mean, covariance, other_mean, other_covariance = (
        value.detach().cpu().double() for value in (mean, covariance, other_mean, other_covariance)
    )
    root = _root(covariance)
    product = root @ other_covariance @ root
    # Rounding leaves eigenvalues just below 0 where the rank is not full.
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    traces = covariance.trace() + other_covariance.trace() - 2 * cross
    return max(0.0, float((mean - other_mean).square().sum() + traces))


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
