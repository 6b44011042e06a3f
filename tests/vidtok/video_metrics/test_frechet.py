"""The Fréchet distance on Gaussians with a known answer; detectors, their cards, and what they refuse."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from vidtok.perceptual import file_sha256
from vidtok.video_metrics.detectors import FrechetMeter, RandomConvDetector, TorchScriptDetector, resized
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
    meter.add_generated(moving(3, 6, 16))
    with pytest.raises(ValueError, match="3 real clips and 3 of prediction for 32 features"):
        meter.distance()
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
