"""Structural similarity of images, window by window, for SSIM, its uniform variants and MS-SSIM.

Source: Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity, IEEE Transactions on Image
Processing, 2004. Only windows that lie wholly inside the image count, as in the paper and in scikit-image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Window:
    """How local means, variances and the covariance are taken, and the constants of the formula, K1 and K2."""

    size: int = 11
    sigma: float | None = 1.5  # of the Gaussian weights, in pixels; None: all pixels weigh the same
    stride: int = 1
    is_sample_covariance: bool = False  # divide by n - 1 instead of n; of equal weights only
    k1: float = 0.01
    k2: float = 0.03

    def means(self, images: Tensor) -> Tensor:
        """Give local means of images (N, C, H, W): (N, C, h, w), h = (H - size) // stride + 1."""
        if self.sigma is None:
            return F.avg_pool2d(images, self.size, self.stride)
        offsets = torch.arange(self.size, device=images.device, dtype=torch.float64) - (self.size - 1) / 2
        weights = (-offsets.square() / (2 * self.sigma**2)).exp()
        # A Gaussian window is the product of a row and a column: 22 products a pixel instead of 121.
        line = repeat((weights / weights.sum()).to(images.dtype), "k -> C 1 1 k", C=images.shape[1])
        rows = F.conv2d(images, line, stride=(1, self.stride), groups=images.shape[1])
        return F.conv2d(rows, rearrange(line, "C o i k -> C o k i"), stride=(self.stride, 1), groups=images.shape[1])


GAUSSIAN = Window()


def similarity_maps(images: Tensor, targets: Tensor, window: Window, data_range: float = 1.0) -> tuple[Tensor, Tensor]:
    """Compare images (N, C, H, W) with targets, colour by colour; gives SSIM and its contrast-structure factor, each (N, C, h, w).

    Values lie in [0, 1]. data_range: L in the paper, which makes the constants. Sides must be at least the window's.
    """
    # Convolutions of a GPU may round fp32 to ten bits (TF32), which E[x^2] - E[x]^2 does not survive; fp64 is never rounded.
    kind = torch.float64 if images.is_cuda else torch.float32
    # About the middle of the range, because that difference loses fewer digits the smaller the values are.
    images, targets = images.to(kind) - 0.5, targets.to(kind) - 0.5
    colours = images.shape[1]
    stacked = torch.cat([images, targets, images.square() + targets.square(), images * targets], dim=1)
    mean, target_mean, squares, product = window.means(stacked).split(colours, dim=1)
    factor = window.size**2 / (window.size**2 - 1) if window.is_sample_covariance else 1.0
    variances = factor * (squares - mean.square() - target_mean.square()).clamp(min=0)
    covariance = factor * (product - mean * target_mean)
    c1, c2 = (window.k1 * data_range) ** 2, (window.k2 * data_range) ** 2
    contrast = (2 * covariance + c2) / (variances + c2)
    mean, target_mean = mean + 0.5, target_mean + 0.5
    return contrast * (2 * mean * target_mean + c1) / (mean.square() + target_mean.square() + c1), contrast
