"""Flicker, moving pixels and changing ids against arithmetic and a loop in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from vidtok.metrics import PSNR_CAP_DB
from vidtok.temporal_metrics import ChangeMeter, MotionMeter, static_pixels, static_places

LEVEL = 2 / 255


def noise(frames: int = 5, height: int = 8, width: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(40, 200, (2, 3, frames, height, width), generator=generator) * LEVEL - 1


def still(frames: int = 5) -> Tensor:
    return noise(1).expand(-1, -1, frames, -1, -1).clone()


def test_the_source_itself_has_no_flicker_and_the_highest_psnr() -> None:
    meter = MotionMeter()
    video = torch.cat([still(), noise()], dim=3)
    assert meter.update(video, video).tolist() == [0.0, 0.0]
    figures = meter.figures()
    assert figures["flicker_static_grey_levels_of_255"] == 0
    assert figures["psnr_db_moving_pixels"] == PSNR_CAP_DB
    assert figures["static_pixels_fraction"] == pytest.approx(0.5, abs=0.01)


def test_a_flicker_of_known_size_is_measured_exactly() -> None:
    source = still()
    flickering = source.clone()
    flickering[:, :, 1::2] += 3 * LEVEL
    meter = MotionMeter()
    assert meter.update(flickering, source).tolist() == pytest.approx([3, 3], abs=1e-4)
    figures = meter.figures()
    assert figures["flicker_static_above_source_grey_levels_of_255"] == pytest.approx(3, abs=1e-4)
    assert figures["static_pixels_fraction"] == 1
    assert figures["psnr_db_moving_pixels"] is None


def test_flicker_and_a_shift_of_equal_error_are_told_apart() -> None:
    source = still()
    signs = torch.tensor([1.0, -1, 1, -1, 1]).view(1, 1, 5, 1, 1)
    shifted, flickering = MotionMeter(), MotionMeter()
    shifted.update(source + 4 * LEVEL, source)
    flickering.update(source + 4 * LEVEL * signs, source)
    assert shifted.figures()["flicker_static_grey_levels_of_255"] == pytest.approx(0, abs=1e-4)
    assert flickering.figures()["flicker_static_grey_levels_of_255"] == pytest.approx(8, abs=1e-4)


def test_a_frozen_reconstruction_has_the_flicker_of_the_source() -> None:
    source = still()
    source[:, :, 1::2] += LEVEL
    meter = MotionMeter()
    meter.update(still(), source)
    figures = meter.figures()
    assert figures["flicker_static_grey_levels_of_255"] == pytest.approx(1, abs=1e-4)
    assert figures["flicker_static_above_source_grey_levels_of_255"] == 0


def test_figures_agree_with_a_loop_over_pixels_whatever_the_batches() -> None:
    source, reconstruction = noise(), noise(seed=1)
    source[..., ::2] = still()[..., ::2]
    whole, parts = MotionMeter(), MotionMeter()
    whole.update(reconstruction, source)
    for index in range(2):
        parts.update(reconstruction[index : index + 1], source[index : index + 1])
    flicker, moving = [], []
    s, r = (video.double().numpy() * 127.5 for video in (source, reconstruction))
    for b, t, y, x in np.ndindex(2, 4, 8, 12):
        step = s[b, :, t + 1, y, x] - s[b, :, t, y, x]
        if np.abs(step).max() <= 2.001:
            flicker.append(np.abs(r[b, :, t + 1, y, x] - r[b, :, t, y, x] - step).mean())
        else:
            moving.append(((r - s)[b, :, t + 1, y, x] ** 2).mean())
    for figures in (whole.figures(), parts.figures()):
        assert figures["flicker_static_grey_levels_of_255"] == pytest.approx(np.mean(flicker), rel=1e-5)
        assert figures["psnr_db_moving_pixels"] == pytest.approx(10 * math.log10(255**2 / np.mean(moving)), rel=1e-5)


def test_two_levels_are_still_and_three_are_motion() -> None:
    video = torch.zeros(1, 3, 3, 2, 2)
    video[:, 1, 1, 0, 0] = 2 * LEVEL
    video[:, 1, 2, 0, 0] = 5 * LEVEL
    assert static_pixels(video)[0, :, 0, 0].tolist() == [True, False]
    assert static_pixels(video)[0, :, 1, 1].tolist() == [True, True]


def test_one_moving_pixel_makes_its_patch_move_and_no_other() -> None:
    video = torch.zeros(1, 3, 5, 8, 8)
    video[:, 0, 2, 5, 1] = 1
    static = static_places(video, (5, 2, 2), first_frames=1, stride_t=1, stride_s=4)
    moving = [(1, 1, 0), (2, 1, 0)]
    assert [tuple(place) for place in (~static[0]).nonzero().tolist()] == moving


@pytest.mark.parametrize(("first_frames", "frames"), [(1, 9), (4, 12)])
def test_a_place_moves_when_any_frame_of_the_two_latent_frames_does(first_frames: int, frames: int) -> None:
    video = torch.zeros(1, 3, frames, 4, 4)
    video[:, :, first_frames + 1] = 1  # inside the second latent frame
    static = static_places(video, (3, 1, 1), first_frames, 4, 4)
    assert static.flatten().tolist() == [False, False]
    video = torch.zeros(1, 3, frames, 4, 4)
    video[:, :, -1] = 1
    assert static_places(video, (3, 1, 1), first_frames, 4, 4).flatten().tolist() == [True, False]


def test_padding_repeats_the_last_frame_row_and_column() -> None:
    video = noise(3, 6, 5)
    padded = torch.nn.functional.pad(video, (0, 3, 0, 2, 0, 2), mode="replicate")
    sizes = {"first_frames": 1, "stride_t": 4, "stride_s": 4}
    assert torch.equal(static_places(video, (2, 2, 2), **sizes), static_places(padded, (2, 2, 2), **sizes))


def test_ids_are_counted_apart_where_the_source_is_still_and_where_it_moves() -> None:
    indices = torch.tensor([[1, 1], [1, 2], [3, 2]]).view(1, 3, 1, 2)
    static = torch.tensor([[True, False], [True, True]]).view(1, 2, 1, 2)
    meter = ChangeMeter()
    meter.update(indices, static)
    figures = meter.figures()
    assert figures["changed_ids_static_fraction"] == pytest.approx(1 / 3)
    assert figures["changed_ids_moving_fraction"] == 1
    assert figures["static_places_fraction"] == 0.75
    assert set(ChangeMeter().figures().values()) == {None}


def test_clips_of_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="both must be one"):
        MotionMeter().update(noise(4), noise(5))
