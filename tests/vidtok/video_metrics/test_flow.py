"""Motion against known shifts, warping against SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch import Tensor

from vidtok.video_metrics.flow import grey, lucas_kanade, trusted, warp


def pair(moving, speed: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Two grey images (2, 1, 48, 48), the second moved by speed."""
    clip = moving(2, 2, 48, speed)
    return grey(clip[:, :, 0]), grey(clip[:, :, 1])


def test_warping_is_that_of_scipy_inside_the_frame() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 1, 9, 12, generator=generator)
    flow = torch.rand(1, 2, 9, 12, generator=generator) * 6 - 3
    rows, columns = np.mgrid[:9, :12]
    places = [rows + flow[0, 1].numpy(), columns + flow[0, 0].numpy()]
    expected = map_coordinates(image[0, 0].numpy(), places, order=1, mode="nearest")
    np.testing.assert_allclose(warp(image, flow)[0, 0], expected, atol=1e-5)


@pytest.mark.parametrize("speed", [(1, 0), (0, -2), (3, 2), (-4, 3)])
def test_a_known_shift_is_found_with_its_sign(moving, speed) -> None:
    first, second = pair(moving, speed)
    flow = lucas_kanade(first, second)
    inner = flow[..., 10:-10, 10:-10]
    error = (inner - torch.tensor(speed).reshape(2, 1, 1)).norm(dim=1)
    assert error.mean() < 0.1
    # That is, first(p) = second(p + flow(p)).
    assert (warp(second, flow) - first)[..., 10:-10, 10:-10].abs().mean() < 0.1 * (second - first).abs().mean()


def test_a_part_of_a_pixel_is_found(moving) -> None:
    first, _ = pair(moving, (1, 0))
    second = warp(first, torch.tensor([-0.4, 0.7]).reshape(1, 2, 1, 1).expand(2, 2, 48, 48))
    error = lucas_kanade(first, second)[..., 10:-10, 10:-10] - torch.tensor([0.4, -0.7]).reshape(2, 1, 1)
    assert error.norm(dim=1).mean() < 0.15


def test_equal_images_do_not_move_and_their_neighbours_in_the_batch_change_nothing(moving) -> None:
    first, second = pair(moving, (2, 1))
    mixed = lucas_kanade(torch.cat([first, first]), torch.cat([first, second]))
    assert torch.equal(mixed[:2], torch.zeros_like(mixed[:2]))
    torch.testing.assert_close(mixed[2:], lucas_kanade(first, second), atol=1e-5, rtol=0)
    assert not lucas_kanade(first, first).any()


def test_trust_ends_where_motion_leaves_the_frame_does_not_return_or_has_an_edge() -> None:
    flow = torch.zeros(1, 2, 8, 16)
    flow[:, 0] = 2.0
    assert trusted(flow, -flow)[0].sum(dim=0).tolist() == [8] * 14 + [0, 0]
    assert not trusted(flow, flow).any()  # comes back four pixels off
    flow[..., 8:] = 0
    edged = trusted(flow, -flow)[0].sum(dim=0)
    assert edged[:6].tolist() == [8] * 6 and edged[7:9].tolist() == [0, 0]
