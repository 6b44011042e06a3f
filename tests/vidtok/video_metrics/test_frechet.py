"""The Fréchet distance on Gaussians with a known answer; detectors, their cards, and what they refuse."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vidtok.perceptual import file_sha256
from vidtok.video_metrics.detectors import FrechetMeter, RandomConvDetector, TorchScriptDetector, resized, try_detector
from vidtok.video_metrics.frechet import FeatureStatistics, frechet_distance
from vidtok.video_metrics.protocol import check_comparable


def gaussians(seed: int, dimensions: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(dimensions, generator=generator, dtype=torch.float64)
    factor = torch.randn(dimensions, dimensions, generator=generator, dtype=torch.float64)
    return mean, factor @ factor.T


def test_the_distance_of_gaussians_with_diagonal_covariance_is_that_of_their_standard_deviations() -> None:
    mean, other = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 4.0])
    deviations, others = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([3.0, 2.0, 0.0])
    expected = (0 + 4 + 1) + (4 + 0 + 0.25)
    distance = frechet_distance(mean, deviations.square().diag(), other, others.square().diag())
    assert distance == pytest.approx(expected, abs=1e-12)


def test_covariances_that_do_not_commute_give_what_the_root_of_their_product_gives() -> None:
    (mean, covariance), (other, second) = gaussians(0), gaussians(1)
    root = scipy.linalg.sqrtm(covariance.numpy() @ second.numpy()).real
    expected = float((mean - other).square().sum()) + np.trace(covariance.numpy() + second.numpy() - 2 * root)
    distance = frechet_distance(mean, covariance, other, second)
    assert distance == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(other, second, mean, covariance) == pytest.approx(distance, rel=1e-9)


def test_equal_gaussians_have_no_distance_and_rank_one_ones_the_known_one() -> None:
    mean, covariance = gaussians(2)
    assert frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-9)
    zero, one, other = torch.zeros(3), torch.tensor([1.0, 2.0, 2.0]), torch.tensor([2.0, -1.0, 2.0])
    # Tr((aa' bb')^(1/2)) = |a . b|, so the distance is |a|^2 + |b|^2 - 2 |a . b|.
    distance = frechet_distance(zero, torch.outer(one, one), zero, torch.outer(other, other))
    assert distance == pytest.approx(9 + 9 - 2 * 4, abs=1e-6)
    assert frechet_distance(zero, torch.zeros(3, 3), one, torch.zeros(3, 3)) == pytest.approx(9)


@pytest.mark.parametrize(("count", "others", "dimensions"), [(9, 14, 40), (30, 5, 24), (24, 24, 24), (64, 64, 100)])
def test_sets_of_no_more_clips_than_features_have_the_distance_of_their_centred_features(
    count: int, others: int, dimensions: int
) -> None:
    rng = np.random.default_rng(count)
    mixing = rng.standard_normal((dimensions, dimensions))
    sets = [rng.standard_normal((count, dimensions)) @ mixing, 1.3 * rng.standard_normal((others, dimensions)) @ mixing + 0.2]
    gathered = [FeatureStatistics(dimensions) for _ in sets]
    for statistics, features in zip(gathered, sets, strict=True):
        statistics.update(torch.from_numpy(features))
    assert min(np.linalg.matrix_rank(statistics.covariance.numpy()) for statistics in gathered) < dimensions
    pair = [(statistics.mean, statistics.covariance) for statistics in gathered]
    distance = frechet_distance(*pair[0], *pair[1])
    # With S = A'A and S' = B'B the trace of the root is the sum of the singular values of A B': no root of what is singular.
    factors = [(features - features.mean(0)) / math.sqrt(len(features) - 1) for features in sets]
    cross = np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum()
    apart = ((sets[0].mean(0) - sets[1].mean(0)) ** 2).sum()
    expected = apart + sum((factor**2).sum() for factor in factors) - 2 * cross
    assert distance == pytest.approx(expected, rel=1e-6)
    # What the published code does, whose root of a singular product is less exact.
    root = scipy.linalg.sqrtm(np.cov(sets[0].T) @ np.cov(sets[1].T))
    published = apart + np.trace(np.cov(sets[0].T) + np.cov(sets[1].T) - 2 * root).real
    assert distance == pytest.approx(published, rel=1e-3)
    assert frechet_distance(*pair[0], *pair[0]) == pytest.approx(0, abs=1e-6 * expected)


def test_few_clips_raise_the_distance_of_two_sets_that_are_alike() -> None:
    generator = torch.Generator().manual_seed(4)

    def distance(count: int) -> float:
        pair = [FeatureStatistics(32), FeatureStatistics(32)]
        for statistics in pair:
            statistics.update(torch.randn(count, 32, generator=generator))
        return frechet_distance(pair[0].mean, pair[0].covariance, pair[1].mean, pair[1].covariance)

    found = [distance(count) for count in (8, 32, 256)]
    assert found == sorted(found, reverse=True) and found[0] > 10 * found[2] > 0


def test_statistics_gathered_in_pieces_are_those_of_numpy_also_far_from_zero() -> None:
    features = torch.randn(37, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 1e6
    statistics = FeatureStatistics(5)
    for piece in features.split([1, 20, 0, 16]):
        statistics.update(piece)
    np.testing.assert_allclose(statistics.mean, features.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance, np.cov(features.numpy().T), rtol=1e-8)
    assert statistics.count == 37


def test_wrong_features_and_shapes_are_refused() -> None:
    statistics = FeatureStatistics(2)
    with pytest.raises(ValueError, match=r"\(clips, 2\)"):
        statistics.update(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="NaN"):
        statistics.update(torch.full((1, 2), torch.nan))
    statistics.update(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="2 or more"):
        _ = statistics.covariance
    with pytest.raises(ValueError, match="must be"):
        frechet_distance(torch.zeros(2), torch.eye(2), torch.zeros(3), torch.eye(3))


class Colours(nn.Module):
    """Mean colour of a clip, with the arguments of the widespread I3D file; wrong ones would show."""

    def forward(self, video: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False) -> Tensor:
        assert return_features and not rescale and not resize and video.shape[3] == 8
        return video.mean((2, 3, 4))


@pytest.fixture
def detector_file(tmp_path: Path) -> Path:
    torch.jit.script(Colours()).save(str(tmp_path / "colours.pt"))
    return tmp_path / "colours.pt"


def test_a_detector_file_gives_fvd_of_its_features_with_a_card_that_names_it(detector_file, moving) -> None:
    detector = TorchScriptDetector(detector_file, file_sha256(detector_file)[:12], side=8, least_frames=2)
    meter = FrechetMeter(detector, 10.0, is_context_included=False)
    real, generated = moving(7, 4, 16), moving(5, 4, 16, seed=1)
    meter.add_real(real)
    meter.add_generated(generated[:2])
    meter.add_generated(generated[2:])
    meter.add_generated(real, "ceiling")
    colours, others = (resized(clips, 8).double().mean((2, 3, 4)) for clips in (real, generated))
    expected = frechet_distance(colours.mean(0), colours.T.cov(), others.mean(0), others.T.cov())
    assert meter.distance() == pytest.approx(expected, rel=1e-5) and meter.distance("ceiling") < 1e-9
    card = meter.card().as_dict()
    assert (card["figure"], card["detector"], card["detector_sha256"]) == ("fvd", "colours.pt", file_sha256(detector_file))
    assert (card["frames"], card["num_real"], card["num_generated"], card["is_context_included"]) == (4, 7, 5, False)
    assert (card["num_features"], card["is_covariance_singular"]) == (3, False)


def published(video: Tensor, side: int) -> Tensor:
    """Resize a clip (C, T, H, W) as the published code does, step by step: Python's floats, the longer side rounded up, the middle."""
    height, width = video.shape[-2:]
    scale = side / min(height, width)
    if height < width:
        size = (side, math.ceil(width * scale))
    else:
        size = (math.ceil(height * scale), side)
    scaled = F.interpolate(video, size=size, mode="bilinear", align_corners=False)
    top, left = ((length - side) // 2 for length in scaled.shape[-2:])
    return scaled[:, :, top : top + side, left : left + side]


# 224 / 30 * 53 = 395.7 and 64 / 30 * 46 = 98.1: to the nearest would be the same of the first and another of the second.
@pytest.mark.parametrize(
    ("height", "width", "side"), [(30, 53, 224), (30, 46, 64), (46, 30, 64), (50, 50, 224), (120, 160, 64), (64, 64, 64)]
)
def test_clips_are_resized_as_the_published_code_does(height: int, width: int, side: int) -> None:
    clip = torch.rand(1, 3, 2, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = resized(clip, side)
    assert found.shape == (1, 3, 2, side, side)
    torch.testing.assert_close(found[0], published(clip[0], side), atol=1e-6, rtol=0)


def test_detector_files_that_are_missing_changed_or_something_else_are_refused(detector_file, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="TorchScript file of a video network"):
        TorchScriptDetector(tmp_path / "none.pt", "0" * 64)
    for checksum in ("0" * 64, "", file_sha256(detector_file)[:7]):
        with pytest.raises(ValueError, match="SHA-256"):
            TorchScriptDetector(detector_file, checksum)
    other = tmp_path / "other.pt"
    other.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="cannot be read as TorchScript"):
        TorchScriptDetector(other, file_sha256(other))


def test_the_proxy_bears_its_own_name_and_repeats_itself(moving) -> None:
    detector = RandomConvDetector()
    assert "fvd" not in detector.figure and detector.sha256 == RandomConvDetector().sha256 != RandomConvDetector(1).sha256
    clips = moving(3, 6, 64)
    together = detector.features(clips)
    assert together.shape == (3, 32)
    torch.testing.assert_close(together, torch.cat([detector.features(clip) for clip in clips.split(1)]), atol=1e-5, rtol=0)


def test_too_few_clips_and_unlike_lengths_are_refused_in_one_sentence(moving) -> None:
    meter = FrechetMeter(RandomConvDetector(), None, False)
    with pytest.raises(ValueError, match="needs both"):
        meter.distance()
    meter.add_real(moving(3, 6, 16))
    meter.add_generated(moving(1, 6, 16))
    with pytest.raises(ValueError, match="3 real clips and 1 of prediction: a covariance needs 2 or more"):
        meter.distance()
    meter.add_generated(moving(1, 6, 16, seed=1))
    assert meter.distance() > 0
    card = meter.card()
    assert (card.num_real, card.num_generated, card.num_features) == (3, 2, 32)
    assert card.is_covariance_singular and card.as_dict()["is_covariance_singular"] is True
    with pytest.raises(ValueError, match="7 frames came after clips of 6"):
        meter.add_generated(moving(1, 7, 16))
    with pytest.raises(ValueError, match="needs 5"):
        meter.add_real(moving(1, 4, 16))


def test_cards_that_differ_are_not_compared_and_every_difference_is_named(moving) -> None:
    meter = FrechetMeter(RandomConvDetector(), 25.0, False)
    meter.add_real(moving(1, 6, 16))
    card = meter.card()
    check_comparable(card, meter.card())
    other = dataclasses.replace(card, fps=10.0, is_context_included=True)
    with pytest.raises(ValueError, match=r"differ in fps \(25.0 and 10.0\), is_context_included \(False and True\)") as refusal:
        check_comparable(card, other)
    assert "detector" not in str(refusal.value) and "\n" not in str(refusal.value)
    meter.add_real(moving(2, 6, 16))
    with pytest.raises(ValueError, match=r"differ in num_real \(1 and 3\): measure"):
        check_comparable(card, meter.card())


class Failing(nn.Module):
    """A network of another kind of input, as its file may hold."""

    def forward(self, video: Tensor) -> Tensor:
        assert video.shape[1] == 1
        return video.mean((2, 3, 4))


class Single(nn.Module):
    """Tells one vector of all clips together."""

    def forward(self, video: Tensor) -> Tensor:
        return video.mean((0, 2, 3, 4))[None]


class Infinite(nn.Module):
    def forward(self, video: Tensor) -> Tensor:
        return video.mean((2, 3, 4)) / 0


class Forwardless(nn.Module):
    @torch.jit.export
    def other(self, video: Tensor) -> Tensor:
        return video


@pytest.mark.parametrize(
    ("network", "sentence"),
    [
        (Failing, r"failing\.pt fails on clips of shape \(2, 3, 4, 8, 8\) \(.+\): give a network of clips"),
        (Single, r"failing\.pt gave \(1, 3\) for 2 clips"),
        (Infinite, r"failing\.pt gave features that are no numbers"),
        (Forwardless, r"failing\.pt cannot be read as TorchScript"),
    ],
)
def test_a_detector_that_does_not_work_is_found_on_noise_in_one_sentence(network, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "failing.pt"
    torch.jit.script(network()).save(str(file))
    with pytest.raises(ValueError, match=sentence) as refusal:
        try_detector(TorchScriptDetector(file, file_sha256(file), side=8, least_frames=2), 4)
    assert "\n" not in str(refusal.value)


def test_a_detector_that_works_tells_how_many_features_it_has(detector_file) -> None:
    assert try_detector(TorchScriptDetector(detector_file, file_sha256(detector_file), side=8, least_frames=2), 4) == 3
    assert try_detector(RandomConvDetector(), 5) == 32
