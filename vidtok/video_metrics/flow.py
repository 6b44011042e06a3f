"""Motion of every pixel without a trained network: a pyramid of Lucas-Kanade steps, warping, and where the motion can be trusted.

Source: Lucas and Kanade, An Iterative Image Registration Technique, IJCAI 1981, made dense and coarse-to-fine; one window of equal
weights a pixel. Good for motion that is smooth over some pixels; at the edges of objects it blends both motions, so figures made of it
bear its name and stand beside those of the real clip.
"""

from __future__ import annotations

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

WINDOW = 7
COARSE_STEPS, FINE_STEPS = 4, 1  # of each scale, and of the finest: a step there costs most and has least left to find
LEAST_SIDE = 8  # of the coarsest image: half a window more would be all border
# Added to the squared gradient: a texture below about 2 of 255 levels a pixel is noise and does not say how it moves.
NOISE_GRADIENT = 1e-4


def grey(images: Tensor) -> Tensor:
    """Give the mean of the colours: (N, C, H, W) in [-1, 1] to (N, 1, H, W) in [0, 1], float32."""
    return (reduce(images.float(), "N C H W -> N 1 H W", "mean") + 1) / 2


def lucas_kanade(first: Tensor, second: Tensor) -> Tensor:
    """Estimate where every pixel of the first image is in the second.

    first, second: grey (N, 1, H, W) in [0, 1]. Gives (N, 2, H, W) in pixels, x to the right and y downwards, such that
    first(p) = second(p + flow(p)) as far as the images allow.
    """
    moving = (first != second).flatten(1).any(dim=1)
    if not moving.all():  # a copied frame does not move, and need not be searched
        result = first.new_zeros(len(first), 2, *first.shape[-2:])
        if moving.any():
            result[moving] = lucas_kanade(first[moving], second[moving])
        return result
    pyramid = [(first, second)]
    while min(pyramid[-1][0].shape[-2:]) >= 2 * LEAST_SIDE:
        coarse, coarse_second = (F.avg_pool2d(image, 2) for image in pyramid[-1])
        pyramid.append((coarse, coarse_second))
    flow = first.new_zeros(len(first), 2, *pyramid[-1][0].shape[-2:])
    for image, target in reversed(pyramid):
        if flow.shape[-2:] != image.shape[-2:]:
            flow = 2 * F.interpolate(flow, size=image.shape[-2:], mode="bilinear", align_corners=False)
        flow = _refine(image, target, flow, FINE_STEPS if image is first else COARSE_STEPS)
    return flow


def warp(images: Tensor, flow: Tensor) -> Tensor:
    """Fetch images(p + flow(p)), bilinear; images (N, C, H, W), flow (N, 2, H, W) in pixels; beyond the border the nearest pixel counts."""
    places = _targets(flow)
    height, width = images.shape[-2:]
    scaled = (2 * places + 1) / places.new_tensor([width, height]).reshape(2, 1, 1) - 1
    grid = rearrange(scaled, "N xy H W -> N H W xy")
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def trusted(forward: Tensor, backward: Tensor) -> Tensor:
    """Mark pixels of the first image whose motion can be believed: bool (N, H, W).

    forward: flow from the first image to the second, backward: from the second to the first. Left out are pixels that go beyond the
    frame, that do not come back (covered or misjudged: |w + w'|^2 > 0.01 (|w|^2 + |w'|^2) + 0.5) and edges of the motion
    (|grad u|^2 + |grad v|^2 > 0.01 |w|^2 + 0.002). Source: Ruder et al., Artistic Style Transfer for Videos, arXiv:1604.08610.
    """
    returned = warp(backward, forward)
    sizes = forward.square().sum(dim=1)
    is_back = (forward + returned).square().sum(dim=1) <= 0.01 * (sizes + returned.square().sum(dim=1)) + 0.5
    edges = sum(gradient.square().sum(dim=1) for gradient in _gradient(forward))
    return _is_inside(forward) & is_back & (edges <= 0.01 * sizes + 0.002)


def _refine(image: Tensor, target: Tensor, flow: Tensor, steps: int) -> Tensor:
    """Improve a flow at one scale: the gradients of the first image stay, the second is fetched anew at each of the steps.

    Solved for the whole flow and not for what is added to it, so that the window smooths it: the pixels around were fetched by flows of
    their own. Where there is no texture the flow stays. At the end the mean of the window evens out what noise did to single pixels.
    """
    gradient = torch.cat(_gradient(image), dim=1)
    x, y = gradient.split(1, dim=1)
    xx, xy, yy = _window_sum(torch.cat([x * x, x * y, y * y], dim=1)).split(1, dim=1)
    noise = NOISE_GRADIENT * WINDOW**2
    xx, yy = xx + noise, yy + noise
    inverse = torch.cat([yy, -xy, -xy, xx], dim=1) / (xx * yy - xy.square())
    for _ in range(steps):
        # A target beyond the border says nothing about the motion.
        rest = (warp(target, flow) - image) * rearrange(_is_inside(flow), "N H W -> N 1 H W")
        expected = (gradient * flow).sum(dim=1, keepdim=True) - rest
        sides = _window_sum(gradient * expected) + noise * flow
        found = inverse[:, :2] * sides[:, :1] + inverse[:, 2:] * sides[:, 1:]
        # The gradient speaks for about a pixel around; what is farther away is the coarser scale's to find.
        flow = flow + (found - flow).clamp(-1, 1)
    return _window_sum(flow) / WINDOW**2


def _window_sum(maps: Tensor) -> Tensor:
    """Give sums over WINDOW x WINDOW, the border repeated; sums of shifted maps, because pooling is five times as slow on a CPU."""
    padded = F.pad(maps, [WINDOW // 2] * 4, mode="replicate")
    return _running_sum(_running_sum(padded, -1), -2)


def _running_sum(maps: Tensor, dim: int) -> Tensor:
    """Sum WINDOW = 7 neighbours along one axis by sums of two and of four."""
    length = maps.shape[dim] - WINDOW + 1
    two = maps.narrow(dim, 0, length + 5) + maps.narrow(dim, 1, length + 5)
    four = two.narrow(dim, 0, length) + two.narrow(dim, 2, length)
    return four.add_(two.narrow(dim, 4, length)).add_(maps.narrow(dim, 6, length))


def _gradient(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Give the central differences along x and y, per pixel; both of the shape of maps (N, C, H, W)."""
    padded = F.pad(maps, [1] * 4, mode="replicate")
    x = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    y = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    return x, y


def _targets(flow: Tensor) -> Tensor:
    """Give p + flow(p) in pixels, (N, 2, H, W): x, then y; the middle of the first pixel is 0."""
    height, width = flow.shape[-2:]
    rows = torch.arange(height, device=flow.device, dtype=flow.dtype)
    columns = torch.arange(width, device=flow.device, dtype=flow.dtype)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return flow + torch.stack([x, y])


def _is_inside(flow: Tensor) -> Tensor:
    x, y = _targets(flow).unbind(dim=1)
    height, width = flow.shape[-2:]
    return (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
