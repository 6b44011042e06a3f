"""Frame figures against NumPy, scikit-image, torchmetrics and ffmpeg's own filters."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from einops import rearrange
from skimage.metrics import structural_similarity
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from vidtok.metrics import psnr_by_frame, ssim_by_frame
from vidtok.similarity import Window
from vidtok.video import to_frames
from vidtok.video_metrics.frames import (
    MS_SSIM_WEIGHTS,
    as_video,
    mae_by_frame,
    ms_ssim_by_frame,
    ms_ssim_scales,
    mse_by_frame,
    ssim_uniform_by_frame,
    sum_over_pixels,
)


@pytest.fixture
def frames(moving) -> tuple[np.ndarray, np.ndarray]:
    """Two uint8 clips (T, H, W, 3): a moving picture that is late and noisy, and itself."""
    real = to_frames(moving(1, 5, 48)[0])
    noise = np.random.default_rng(0).normal(0, 9, real[1:].shape)
    return np.clip(real[:-1] + noise, 0, 255).astype(np.uint8), real[1:]


def images(frames: np.ndarray) -> Tensor:
    return rearrange(torch.from_numpy(frames), "T H W C -> T C H W").float() / 255


def test_errors_and_their_moving_mnist_sums_are_those_of_numpy(frames) -> None:
    video, real = (as_video(clip) for clip in frames)
    difference = frames[0] / 255 - frames[1] / 255
    squared, absolute = mse_by_frame(video, real), mae_by_frame(video, real)
    np.testing.assert_allclose(squared[0], (difference**2).mean((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(absolute[0], np.abs(difference).mean((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(sum_over_pixels(squared, real)[0], (difference**2).mean(-1).sum((1, 2)), rtol=1e-5)


def test_digits_in_three_equal_colours_have_the_moving_mnist_error_of_grey_ones(frames) -> None:
    grey, real = (np.repeat(clip[..., :1], 3, axis=-1) for clip in frames)
    coloured = sum_over_pixels(mse_by_frame(as_video(grey), as_video(real)), as_video(real))
    alone = ((grey[..., 0] / 255 - real[..., 0] / 255) ** 2).sum((1, 2))
    np.testing.assert_allclose(coloured[0], alone, rtol=1e-5)


def test_psnr_is_that_of_torchmetrics_frame_by_frame(frames) -> None:
    video, real = frames
    expected = peak_signal_noise_ratio(images(video), images(real), data_range=1.0, dim=(1, 2, 3), reduction="none")
    torch.testing.assert_close(psnr_by_frame(as_video(video), as_video(real))[0].float(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("data_range", [1.0, 2.0])
def test_uniform_ssim_is_that_of_scikit_image_as_it_comes(frames, data_range) -> None:
    video, real = frames
    measured = ssim_uniform_by_frame(as_video(video), as_video(real), data_range=data_range)[0]
    pairs = zip(real / 255, video / 255, strict=True)
    expected = [structural_similarity(a, b, channel_axis=-1, data_range=data_range) for a, b in pairs]
    np.testing.assert_allclose(measured, expected, atol=1e-4, rtol=0)


def test_ssim_is_that_of_torchmetrics_where_whole_windows_count(frames) -> None:
    video, real = frames
    found = structural_similarity_index_measure(images(video), images(real), data_range=1.0, return_full_image=True)
    expected = found[1][..., 5:-5, 5:-5].mean((1, 2, 3))
    torch.testing.assert_close(ssim_by_frame(as_video(video), as_video(real))[0].float(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("scales", "size"), [(3, 49), (5, 180)])
def test_ms_ssim_is_that_of_torchmetrics_which_reflects_the_coarsest_border(moving, scales, size) -> None:
    real = moving(1, 2, size)[:, :, :1]
    video = (real + 0.2 * torch.randn(real.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    pair = [(clip[:, :, 0] + 1) / 2 for clip in (video, real)]
    weights = tuple(weight / sum(MS_SSIM_WEIGHTS[:scales]) for weight in MS_SSIM_WEIGHTS[:scales])
    expected = multiscale_structural_similarity_index_measure(*pair, data_range=1.0, betas=weights)
    assert ms_ssim_by_frame(video, real, scales, is_last_padded=True).item() == pytest.approx(float(expected), abs=1e-4)
    # By itself it counts whole windows only, made here of the parts that torchmetrics gives.
    product = 1.0
    for scale, weight in enumerate(weights):
        if scale < scales - 1:
            contrast = structural_similarity_index_measure(*pair, data_range=1.0, return_contrast_sensitivity=True)[1]
            product *= float(contrast) ** weight
            pair = [torch.nn.functional.avg_pool2d(image, 2) for image in pair]
        else:
            found = structural_similarity_index_measure(*pair, data_range=1.0, return_full_image=True)[1]
            product *= float(found[..., 5:-5, 5:-5].mean()) ** weight
    assert ms_ssim_by_frame(video, real, scales).item() == pytest.approx(product, abs=1e-4)


def ffmpeg(name: str, video: np.ndarray, real: np.ndarray) -> list[dict[str, str]]:
    """Run a filter of ffmpeg on uint8 clips (T, H, W, 3) as planes of RGB; gives what it writes beside every frame."""
    graph, second = av.filter.Graph(), Fraction(1, 25)
    height, width = real.shape[1:3]
    sources = [graph.add_buffer(width=width, height=height, format="gbrp", time_base=second) for _ in range(2)]
    compare, sink = graph.add(name), graph.add("buffersink")
    for pad, source in enumerate(sources):
        source.link_to(compare, 0, pad)
    compare.link_to(sink)
    graph.configure()
    for number, pair in enumerate(zip(video, real, strict=True)):
        for source, picture in zip(sources, pair, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24").reformat(format="gbrp")
            frame.pts, frame.time_base = number, second
            source.push(frame)
    return [dict(sink.pull().metadata) for _ in real]


def test_psnr_is_that_of_the_filter_of_ffmpeg_on_rgb_planes(frames) -> None:
    expected = [float(found["lavfi.psnr.psnr_avg"]) for found in ffmpeg("psnr", *frames)]
    np.testing.assert_allclose(psnr_by_frame(*(as_video(clip) for clip in frames))[0], expected, atol=1e-4, rtol=0)


def test_ssim_with_windows_of_8_at_steps_of_4_is_that_of_the_filter_of_ffmpeg(frames) -> None:
    expected = [float(found["lavfi.ssim.All"]) for found in ffmpeg("ssim", *frames)]
    # Its first constant is made for sums over 64 pixels, its second for 64 * 63 times the covariance.
    window = Window(8, None, stride=4, is_sample_covariance=True, k1=0.01 / 8)
    measured = ssim_uniform_by_frame(*(as_video(clip) for clip in frames), window)[0]
    np.testing.assert_allclose(measured, expected, atol=1e-4, rtol=0)
    assert abs(ssim_by_frame(*(as_video(clip) for clip in frames))[0] - measured).min() > 1e-3  # another convention


def test_how_many_scales_fit_and_what_does_not_is_refused(moving) -> None:
    assert [ms_ssim_scales(side, 500) for side in (10, 11, 43, 44, 64, 175, 176, 400)] == [0, 1, 2, 3, 3, 4, 5, 5]
    clip = moving(1, 2, 43)
    with pytest.raises(ValueError, match="43 x 43 pixels and needs at least 176 x 176: 2 scales fit"):
        ms_ssim_by_frame(clip, clip)
    with pytest.raises(ValueError, match="6 scales was asked for"):
        ms_ssim_by_frame(clip, clip, 6)
    with pytest.raises(ValueError, match="needs at least 50 x 50"):
        ssim_uniform_by_frame(clip, clip, Window(50, None))


def test_uint8_frames_become_clips_and_ambiguous_ones_are_refused(frames) -> None:
    one, two = as_video(frames[0]), as_video(torch.from_numpy(np.stack(frames)))
    assert one.shape == (1, 3, 4, 48, 48) and two.shape == (2, 3, 4, 48, 48)
    assert torch.equal(two[:1], one) and torch.equal(as_video(two), two)
    np.testing.assert_array_equal(to_frames(one[0]), frames[0])
    with pytest.raises(ValueError, match="1 or 3 colours"):
        as_video(frames[0][..., :2])
    with pytest.raises(ValueError, match=r"values in \[-1, 255\]"):
        as_video(torch.tensor([-1.0, 255.0]).reshape(1, 1, 1, 1, 2))
    with pytest.raises(ValueError, match="nan"):
        as_video(torch.full((1, 3, 1, 2, 2), float("nan")))
