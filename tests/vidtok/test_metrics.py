"""Pixel metrics against scikit-image and arithmetic; codebook figures against counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from einops import rearrange
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from vidtok import metrics
from vidtok.metrics import PSNR_CAP_DB, CodeMeter, FrameMeter, psnr, psnr_by_frame, ssim, ssim_by_frame


def clips(seed: int, shape: tuple[int, ...] = (2, 3, 4, 24, 20)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reference = torch.rand(shape, generator=generator) * 2 - 1
    noisy = (reference + 0.3 * torch.randn(shape, generator=generator)).clamp(-1, 1)
    return noisy, reference


def images(video: Tensor) -> np.ndarray:
    return ((rearrange(video, "B C T H W -> B T H W C") + 1) / 2).numpy()


def test_psnr_of_every_frame_agrees_with_scikit_image() -> None:
    video, reference = clips(0)
    measured = psnr_by_frame(video, reference)
    for b, t in np.ndindex(2, 4):
        expected = peak_signal_noise_ratio(images(reference)[b, t], images(video)[b, t], data_range=1.0)
        assert measured[b, t].item() == pytest.approx(expected, rel=1e-5)


def test_ssim_of_every_frame_agrees_with_scikit_image() -> None:
    video, reference = clips(1)
    measured = ssim_by_frame(video, reference)
    for b, t in np.ndindex(2, 4):
        expected = structural_similarity(
            images(reference)[b, t],
            images(video)[b, t],
            data_range=1.0,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert measured[b, t].item() == pytest.approx(expected, abs=1e-4)


def test_a_constant_error_of_a_tenth_of_the_range_is_twenty_decibels() -> None:
    reference = torch.zeros(1, 3, 2, 12, 12)
    assert psnr(reference + 0.2, reference) == pytest.approx(20.0, abs=1e-4)


def test_identical_frames_give_the_stated_cap_and_an_ssim_of_one() -> None:
    video, _ = clips(2)
    assert psnr(video, video) == PSNR_CAP_DB
    assert ssim(video, video) == pytest.approx(1.0, abs=1e-6)


def test_psnr_is_the_mean_over_frames_and_not_the_psnr_of_the_pooled_error() -> None:
    reference = torch.zeros(1, 1, 2, 12, 12)
    video = reference.clone()
    video[:, :, 0] += 0.2
    video[:, :, 1] += 0.02
    assert psnr(video, reference) == pytest.approx((20 + 40) / 2, abs=1e-4)


def test_ssim_does_not_depend_on_the_neighbouring_frames_or_on_chunking() -> None:
    video, reference = clips(3, (1, 3, 40, 16, 16))
    whole = ssim_by_frame(video, reference)
    alone = torch.cat([ssim_by_frame(video[:, :, t : t + 1], reference[:, :, t : t + 1]) for t in range(40)], dim=1)
    torch.testing.assert_close(whole, alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("measure", [psnr_by_frame, ssim_by_frame])
def test_work_is_bounded_by_pixels_and_a_bound_changes_no_figure(measure, monkeypatch: pytest.MonkeyPatch) -> None:
    video, reference = clips(5, (3, 3, 5, 24, 20))
    whole, sizes = measure(video, reference), []
    for name in ("_ssim_of_images", "_squared_error_of_images"):
        compare = getattr(metrics, name)
        monkeypatch.setattr(
            metrics, name, lambda images, targets, compare=compare: sizes.append(len(images)) or compare(images, targets)
        )
    for bound, largest in ((1, 1), (4 * 24 * 20 + 1, 4), (10**6, 15)):
        sizes.clear()
        monkeypatch.setattr(metrics, "COMPARED_PIXELS_AT_ONCE", bound)
        torch.testing.assert_close(measure(video, reference), whole, atol=1e-6, rtol=0)
        assert max(sizes) == largest and sum(sizes) == 15


def test_wrong_shapes_types_and_sizes_are_refused_with_what_came() -> None:
    video, reference = clips(4)
    with pytest.raises(ValueError, match=r"\(2, 3, 3, 24, 20\)"):
        psnr_by_frame(video[:, :, :3], reference)
    with pytest.raises(ValueError, match=r"\(B, C, T, H, W\)"):
        ssim_by_frame(video[0], reference[0])
    with pytest.raises(ValueError, match="uint8"):
        psnr_by_frame(video.to(torch.uint8), reference)
    with pytest.raises(ValueError, match="8 x 20"):
        ssim_by_frame(video[..., :8, :], reference[..., :8, :])


def test_the_frame_meter_weighs_every_frame_the_same_across_clips_of_unlike_length() -> None:
    meter = FrameMeter()
    meter.update(torch.tensor([[10.0, 20.0]]))
    meter.update(torch.tensor([[30.0, 40.0, 50.0], [20.0, 30.0, 70.0]]))
    assert meter.by_frame() == [20.0, 30.0, 60.0]
    assert meter.mean() == pytest.approx(270 / 8)
    with pytest.raises(ValueError, match="at least one"):
        FrameMeter().mean()


def test_the_code_meter_counts_used_and_dead_codes_and_their_perplexity() -> None:
    meter = CodeMeter(8)
    meter.update(torch.tensor([[[0, 1], [2, 2]]]))
    meter.update(torch.tensor([0, 1]))
    assert meter.counts.tolist() == [2, 2, 2, 0, 0, 0, 0, 0]
    assert (meter.used(), meter.dead()) == (3, 5)
    assert meter.perplexity() == pytest.approx(3.0)
    assert meter.summary()["codebook_used_fraction"] == 3 / 8


def test_perplexity_of_an_uneven_histogram_is_the_exponential_of_its_entropy() -> None:
    meter = CodeMeter(4)
    assert meter.perplexity() == 0.0
    meter.update(torch.tensor([0, 0, 0, 1]))
    assert meter.perplexity() == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))


def test_the_code_meter_refuses_ids_outside_the_codebook() -> None:
    with pytest.raises(ValueError, match="from -1 to 3"):
        CodeMeter(8).update(torch.tensor([-1, 3]))
    with pytest.raises(ValueError, match="0 to 7"):
        CodeMeter(8).update(torch.tensor([8]))
