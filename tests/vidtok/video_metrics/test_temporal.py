"""Temporal figures against NumPy, and what each of them sees that PSNR does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vidtok.metrics import psnr_by_frame
from vidtok.video_metrics.interpolation import blend, fie_smooth_by_frame, fie_task, fill_between, lucas_kanade_between
from vidtok.video_metrics.temporal import dtssd_by_step, flicker_by_frame, warped_steps


def test_dtssd_and_flicker_are_those_of_numpy(moving) -> None:
    video, real = moving(seed=1), moving(seed=2)
    a, b = 127.5 * video.double().numpy(), 127.5 * real.double().numpy()
    expected = np.sqrt(((np.diff(a, axis=2) - np.diff(b, axis=2)) ** 2).mean((1, 3, 4)))
    np.testing.assert_allclose(dtssd_by_step(video, real), expected, rtol=1e-6)
    np.testing.assert_allclose(flicker_by_frame(video), np.abs(np.diff(a, n=2, axis=2)).mean((1, 3, 4)), rtol=1e-6)


def test_of_two_equal_errors_only_the_one_that_flickers_is_seen_by_the_temporal_figures(moving) -> None:
    real = moving(1) * 0.8
    signs = torch.tensor([1.0, -1.0] * 5)[: real.shape[2]].reshape(-1, 1, 1)
    steady, flickering = real + 0.1, real + 0.1 * signs
    torch.testing.assert_close(psnr_by_frame(steady, real), psnr_by_frame(flickering, real), atol=1e-4, rtol=0)
    assert dtssd_by_step(steady, real).max() < 1e-4
    assert dtssd_by_step(flickering, real).mean() == pytest.approx(0.2 * 127.5, rel=1e-4)
    assert flicker_by_frame(flickering).mean() > flicker_by_frame(steady).mean() + 10
    assert warped_steps(flickering).error.nanmean() > 10 * warped_steps(steady).error.nanmean()
    assert fie_smooth_by_frame(flickering).mean() > fie_smooth_by_frame(steady).mean() + 5


def test_what_moves_evenly_is_explained_by_motion_and_measured_in_pixels(moving) -> None:
    clip = moving(2, 5, 48, (3, -2))
    steps = warped_steps(clip)
    assert steps.speed.mean() == pytest.approx(13**0.5, rel=0.05)
    unexplained = (clip[:, :, 1:] - clip[:, :, :-1]).square().mean() / 4
    assert steps.error.mean() < 0.02 * unexplained and steps.trusted.mean() > 0.6
    frozen = warped_steps(clip[:, :, :1].expand(-1, -1, 5, -1, -1))
    assert frozen.error.max() < 1e-12 and not frozen.speed.any() and bool((frozen.trusted == 1).all())


def test_the_warping_error_is_the_mean_over_trusted_pixels_of_a_hand_made_step() -> None:
    # Nothing to hold on to, so nothing moves and every pixel is trusted: the error is the mean squared change in [0, 1].
    video = torch.zeros(1, 3, 2, 16, 16)
    video[:, :, 1] = 0.2
    steps = warped_steps(video)
    assert steps.error.item() == pytest.approx(0.01, rel=1e-4) and steps.trusted.item() == 1.0


def test_fie_smooth_drops_every_odd_frame_and_linear_fades_have_none() -> None:
    fade = torch.linspace(-1, 1, 8).reshape(1, 1, 8, 1, 1).expand(1, 3, 8, 16, 16)
    assert fie_smooth_by_frame(fade).abs().max() < 1e-4
    broken = fade.clone()
    broken[:, :, 3] += 0.1
    # Frames 1, 3 and 5 are made again; frame 7 has no neighbour after it, and of the dropped ones only frame 3 is wrong.
    torch.testing.assert_close(fie_smooth_by_frame(broken), torch.tensor([[0.0, 12.75, 0.0]]).double(), atol=1e-3, rtol=0)
    broken[:, :, 7] += 9.0
    assert fie_smooth_by_frame(broken).shape == (1, 3) and fie_smooth_by_frame(broken)[0, 2] < 1e-3


def test_interpolation_along_the_motion_beats_a_blend_of_what_moves(moving) -> None:
    clip = moving(2, 9, 48, (2, 1))
    assert fie_smooth_by_frame(clip, lucas_kanade_between).mean() < 0.5 * fie_smooth_by_frame(clip).mean()
    ends = clip[:, :, 0], clip[:, :, 2]
    for place, frame in ((0.0, 0), (1.0, 2)):
        torch.testing.assert_close(blend(*ends, place), clip[:, :, frame])
        torch.testing.assert_close(lucas_kanade_between(*ends, place), clip[:, :, frame], atol=1e-5, rtol=0)


def test_fie_task_scores_inner_frames_beside_both_interpolations(moving) -> None:
    clip = moving(1, 5, 32, (2, 1))
    perfect = fie_task(clip, clip)
    assert list(perfect) == ["model", "linear", "lucas_kanade"]
    assert perfect["model"]["fie_task_psnr_db"] == 100 and perfect["model"]["fie_task_ssim"] == pytest.approx(1, abs=1e-6)
    as_blend = fie_task(fill_between(clip, blend), clip)
    assert as_blend["model"] == as_blend["linear"] == perfect["linear"]
    assert perfect["linear"]["fie_task_mae_grey_levels_of_255_middle_frame"] > 1
    spoilt = clip.clone()
    spoilt[:, :, [0, 4]] = 0  # the given ends are not scored
    assert fie_task(spoilt, clip)["model"] == perfect["model"]
    spoilt[:, :, 2] = 0
    assert (
        fie_task(spoilt, clip)["model"]["fie_task_psnr_db_middle_frame"]
        < 20
        < fie_task(spoilt, clip)["model"]["fie_task_psnr_db"]
    )


def test_clips_that_are_too_short_are_refused(moving) -> None:
    one, two = moving(1, 1), moving(1, 2)
    for measure, clip in ((warped_steps, one), (flicker_by_frame, two), (fie_smooth_by_frame, two)):
        with pytest.raises(ValueError, match="put the last given frame before"):
            measure(clip)
    with pytest.raises(ValueError, match="dtSSD needs 2"):
        dtssd_by_step(one, one)
    with pytest.raises(ValueError, match="two given ends"):
        fie_task(two, two)
