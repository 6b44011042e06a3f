"""The table: how figures are averaged, samples kept apart, horizons numbered; and that every figure reacts to what it should."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vidtok.metrics import psnr_by_frame
from vidtok.video_metrics.detectors import FrechetMeter, RandomConvDetector
from vidtok.video_metrics.predictors import baseline_rows
from vidtok.video_metrics.table import PixelTable
from vidtok.video_metrics.temporal import dtssd_by_step


def noisy(video: Tensor, amount: float) -> Tensor:
    return (video + amount * torch.randn(video.shape, generator=torch.Generator().manual_seed(5))).clamp(-1, 1)


def table_of(rows: dict[str, Tensor], clip: Tensor, context: int = 2) -> PixelTable:
    table = PixelTable()
    table.update(rows, clip[:, :, context:], clip[:, :, context - 1])
    return table


def test_figures_are_averaged_by_frame_then_clip_and_numbered_by_horizon(moving) -> None:
    clips = moving(3, 7)
    real, last = clips[:, :, 2:], clips[:, :, 1]
    forecast = noisy(real, 0.1)
    whole, parts = table_of({"prediction": forecast}, clips), PixelTable()
    for part in ([0], [1, 2]):
        parts.update({"prediction": forecast[part]}, real[part], last[part])
    assert torch.equal(whole.values("prediction", "psnr_db"), parts.values("prediction", "psnr_db"))
    expected = psnr_by_frame(forecast, real)
    assert whole.summary()["prediction"]["psnr_db"] == pytest.approx(float(expected.mean(1).mean()))
    assert whole.by_horizon()["prediction"]["psnr_db"] == pytest.approx(expected.mean(0).tolist())
    # The change into the first predicted frame counts, as horizon 1.
    joined = [torch.cat([last[:, :, None], video], dim=2) for video in (forecast, real)]
    changes = dtssd_by_step(*joined)
    assert whole.by_horizon()["prediction"]["dtssd_grey_levels_of_255"] == pytest.approx(changes.mean(0).tolist())
    smooth = whole.by_horizon()["prediction"]["fie_smooth_linear_grey_levels_of_255"]
    assert [value is None for value in smooth] == [False, True, False, True, True]


def test_the_mean_and_the_best_of_samples_are_two_columns(moving) -> None:
    clips = moving(2, 5)
    real = clips[:, :, 2:]
    # Each clip has its own best sample; of every figure the best is chosen by itself.
    good, bad = noisy(real, 0.05), noisy(real, 0.4)
    samples = torch.stack([torch.stack([good[0], bad[1]]), torch.stack([bad[0], good[1]])])
    figures = table_of({"prediction": samples}, clips).summary()["prediction"]
    apart = [float(psnr_by_frame(video, real).mean()) for video in (good, bad)]
    assert figures["psnr_db_best_of_2"] == pytest.approx(apart[0])
    assert figures["psnr_db_mean_of_2"] == pytest.approx(sum(apart) / 2)
    assert figures["mse_best_of_2"] < figures["mse_mean_of_2"]
    assert "psnr_db" not in figures and "motion_lucas_kanade_pixels_per_frame_best_of_2" not in figures


def test_rows_tell_what_copies_and_what_is_real(moving) -> None:
    clips = moving(2, 9)
    rows = baseline_rows(clips[:, :, :2], 7) | {"prediction": noisy(clips[:, :, 2:], 0.1), "itself": clips[:, :, 2:]}
    table = table_of(rows, clips)
    summary, drift = table.summary(), table.drift()
    assert set(summary) == {"real", *rows}
    assert summary["copy_last_frame"]["motion_lucas_kanade_pixels_per_frame_ratio_to_real"] == 0
    for key, value in summary["itself"].items():
        assert "ratio_to_real" not in key or value == pytest.approx(1)
    assert summary["itself"]["psnr_db"] == 100 and summary["itself"]["ssim"] == pytest.approx(1, abs=1e-6)
    assert summary["itself"]["mse"] == summary["itself"]["dtssd_grey_levels_of_255"] == 0
    copied = drift["copy_last_frame"]
    assert copied["psnr_db_drift_slope_per_frame"] < -0.2 and copied["psnr_db_half_life_frames"] in range(2, 7)
    assert drift["itself"]["psnr_db_half_life_frames"] is None and drift["itself"]["psnr_db_drift_slope_per_frame"] == 0


Damage = Callable[[Tensor, int], Tensor]


def blurred(video: Tensor, degree: int) -> Tensor:
    width = 2 * degree + 1
    return F.avg_pool3d(video, (1, width, width), 1, (0, degree, degree), count_include_pad=False)


def shifted(video: Tensor, degree: int) -> Tensor:
    return video.roll(degree, dims=-1)


def flickering(video: Tensor, degree: int) -> Tensor:
    signs = torch.tensor([1.0, -1.0] * video.shape[2])[: video.shape[2]].reshape(-1, 1, 1)
    return (video + 0.05 * degree * signs).clamp(-1, 1)


def shuffled(video: Tensor, degree: int) -> Tensor:
    """Swap ever more pairs of neighbouring frames."""
    order = list(range(video.shape[2]))
    for pair in range(degree):
        order[2 * pair], order[2 * pair + 1] = 2 * pair + 1, 2 * pair
    return video[:, :, order]


DAMAGES: dict[str, Damage] = {
    "blur": blurred,
    "noise": lambda video, degree: noisy(video, 0.06 * degree) if degree else video,
    "shift": shifted,
    "flicker": flickering,
    "shuffle": shuffled,
}
FIDELITY_UP = ("mse", "mae", "mse_sum_over_pixels_moving_mnist", "mae_sum_over_pixels_moving_mnist", "dtssd_grey_levels_of_255")
FIDELITY_DOWN = ("psnr_db", "ssim", "ms_ssim_3_scales")
WITHOUT_REFERENCE = (
    "flicker_second_difference_grey_levels_of_255",
    "warping_error_lucas_kanade_mse",
    "fie_smooth_linear_grey_levels_of_255",
    "fie_smooth_lucas_kanade_grey_levels_of_255",
)


def reacts(figure: str, damage: str) -> bool:
    """Say which figures must see which damage; those without a reference take blur for calm and cannot see a shift."""
    return damage in ("noise", "flicker", "shuffle") if figure in WITHOUT_REFERENCE else True


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_figure_gets_worse_with_growing_damage_and_is_best_without(moving, damage) -> None:
    clips = moving(2, 10, 48)
    real = clips[:, :, 2:]
    rows = {f"degree {degree}": DAMAGES[damage](real, degree) for degree in range(4)}
    summary = table_of(rows, clips).summary()
    checked = 0
    for figure in (*FIDELITY_UP, *FIDELITY_DOWN, *WITHOUT_REFERENCE):
        if reacts(figure, damage):
            sign = -1 if figure in FIDELITY_DOWN else 1
            values = [sign * (summary[row][figure] or 0.0) for row in rows]
            assert values == sorted(values) and values[0] < values[1] < values[3], (figure, values)
            checked += 1
    assert checked >= 8


@pytest.mark.parametrize("damage", ["noise", "flicker"])
def test_flicker_of_still_pixels_grows_with_noise_and_flicker(damage) -> None:
    clips = torch.zeros(1, 3, 8, 24, 24)
    rows = {str(degree): DAMAGES[damage](clips[:, :, 2:], degree) for degree in range(4)}
    values = [
        figures["flicker_static_grey_levels_of_255"] for row, figures in table_of(rows, clips).summary().items() if row != "real"
    ]
    assert values[0] == 0 and values == sorted(values) and len(set(values)) == 4


@pytest.mark.parametrize("damage", ["blur", "noise", "flicker", "shuffle"])
def test_the_proxy_distance_grows_with_damage_and_is_nought_of_the_clips_themselves(moving, damage) -> None:
    real = moving(40, 8, 64)
    meter = FrechetMeter(RandomConvDetector(), None, False)
    meter.add_real(real)
    for degree in range(4):
        meter.add_generated(DAMAGES[damage](real, degree), str(degree))
    values = [meter.distance(str(degree)) for degree in range(4)]
    assert values[0] < 1e-6 and values == sorted(values) and values[1] > 10 * values[0]


def test_small_frames_leave_out_what_they_cannot_have(moving) -> None:
    clips = moving(1, 4, 10)
    figures = table_of({"prediction": clips[:, :, 2:]}, clips).summary()["prediction"]
    assert "psnr_db" in figures and not [name for name in figures if "ssim" in name]


def test_clips_that_do_not_belong_together_are_refused(moving) -> None:
    clips = moving(2, 5)
    real, last = clips[:, :, 2:], clips[:, :, 1]
    table = table_of({"prediction": real}, clips)
    with pytest.raises(ValueError, match=r"Row prediction has the shape \(2, 3, 2, 32, 32\)"):
        table.update({"prediction": real[:, :, 1:]}, real, last)
    with pytest.raises(ValueError, match="must stay the same"):
        table.update({"other": real}, real, last)
    with pytest.raises(ValueError, match="must stay the same"):
        table.update({"prediction": torch.stack([real, real])}, real, last)
    with pytest.raises(ValueError, match="must stay the same"):
        table.update({"prediction": real[:, :, 1:]}, real[:, :, 1:], last)
    with pytest.raises(ValueError, match="'real'"):
        table.update({"real": real}, real, last)
    assert table.values("prediction", "psnr_db").shape == (1, 2, 3)


def test_lpips_of_given_weights_is_a_column_with_the_name_of_its_network(moving, tmp_path: Path) -> None:
    from vidtok.perceptual import Lpips

    generator = torch.Generator().manual_seed(0)
    sizes = {0: (8, 3, 11), 3: (8, 8, 5), 6: (8, 8, 3), 8: (8, 8, 3), 10: (8, 8, 3)}
    weights = {
        f"{at}.weight": torch.randn(o, i, k, k, generator=generator) / (i * k * k) ** 0.5 for at, (o, i, k) in sizes.items()
    }
    biases = {f"{at}.bias": torch.zeros(8) for at in sizes}
    lpips = Lpips("alex", weights | biases, {str(n): torch.full((1, 8, 1, 1), 0.125) for n in range(5)}, "0" * 64)
    clips = moving(1, 4, 64)
    table = PixelTable(lpips)
    rows = {str(degree): DAMAGES["noise"](clips[:, :, 2:], degree) for degree in range(3)}
    table.update(rows, clips[:, :, 2:], clips[:, :, 1])
    values = [table.summary()[row]["lpips_alex"] for row in rows]
    assert values[0] == 0 and values[0] < values[1] < values[2]
    one = lpips(rows["2"][:, :, 0], clips[:, :, 2])
    assert table.values("2", "lpips_alex")[0, 0, 0] == pytest.approx(one.item(), rel=1e-5)


def test_without_optical_flow_its_figures_are_left_out_and_no_flow_is_computed(moving, monkeypatch) -> None:
    clips = moving(2, 6)
    rows = {"prediction": noisy(clips[:, :, 2:], 0.1)}
    whole = table_of(rows, clips).summary()
    for module in ("temporal", "interpolation"):
        monkeypatch.setattr(f"vidtok.video_metrics.{module}.lucas_kanade", None)
    table = PixelTable(is_flow=False)
    table.update(rows, clips[:, :, 2:], clips[:, :, 1])
    for row, figures in table.summary().items():
        assert figures == {name: value for name, value in whole[row].items() if "lucas_kanade" not in name}
        assert len(figures) < len(whole[row]) and "fie_smooth_linear_grey_levels_of_255" in figures
