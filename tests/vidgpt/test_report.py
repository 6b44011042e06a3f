"""The page stands alone, shows everything it was given, and its pictures hold every frame; film strip and curves likewise."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import Page, check_page
from vidgpt.evaluation import TokenReport
from vidgpt.metrics import Baselines, RolloutMeter, TokenCounts, TokenMeter, changed_tokens
from vidgpt.plots import (
    plot_accuracy_by_frame,
    plot_accuracy_by_horizon,
    plot_accuracy_by_position,
    plot_changes_by_horizon,
    plot_changes_by_position,
    plot_losses,
    plot_psnr_by_horizon,
)
from vidgpt.report import (
    GIVEN_COLOUR,
    PREDICTED_COLOUR,
    STRIP_GAP,
    Clip,
    Report,
    strip_image,
    write_report,
)
from vidtok.page_parts import Figure, Measured, Table, difference_frames, format_cell, table_card
from vidtok.plots import Curve, plot_curves, spread


def frames(seed: int, count: int = 5, height: int = 6, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def small_report(folder: Path) -> Report:
    picture = folder / "curve.png"
    Image.fromarray(frames(9)[0]).save(picture)
    rows = {"real": frames(0), "predicted": frames(1), "difference": difference_frames(frames(0), frames(1))}
    return Report(
        title="Freeway <1> & more",
        summary="The model is 3 dB above copying.",
        clips=[Clip(rows, context=2, caption="episode 7"), Clip({"real": frames(2, 4)}, context=0)],
        figures=[Figure(picture, "PSNR by horizon")],
        tables=[Table("Accuracy", ["forecaster", "top-1"], [["model", 0.5], ["uniform", None]]), Table("Loss", ["x"], [[3]])],
        receipt={"seed": 17, "config": {"model": {"hidden_size": 24}}},
    )


@pytest.fixture
def page(tmp_path: Path) -> str:
    return write_report(small_report(tmp_path), tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def pictures(page: str) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))) for source in Page(page).sources]


def test_the_page_stands_alone(page: str) -> None:
    check_page(page)


def test_every_table_number_caption_and_line_of_the_receipt_is_on_the_page(page: str) -> None:
    text = Page(page).text
    for expected in (
        "The model is 3 dB above copying.",
        "episode 7",
        "PSNR by horizon",
        "Accuracy",
        "forecaster",
        "0.500",
        "–",
        "Loss",
        "seed",
        "17",
        "config.model.hidden_size",
        "24",
        "given",
        "predicted",
        "difference",
    ):
        assert expected in text
    assert Page(page).tags.count("table") == 3


def test_text_is_escaped(tmp_path: Path) -> None:
    bad = '<script>alert("x")</script>'
    report = replace(
        small_report(tmp_path),
        title=bad,
        summary=bad,
        tables=[Table(bad, [bad], [[bad]])],
        receipt={bad: bad},
        clips=[Clip({bad: frames(0)}, 1, bad)],
    )
    text = write_report(report, tmp_path / "r.html").read_text(encoding="utf-8")
    assert text.count("<script") == 1 and "<script>alert" not in text
    assert text.count("&lt;script&gt;") >= 8


def test_a_moving_picture_holds_all_frames_in_order_and_unchanged(page: str) -> None:
    columns = pictures(page)
    assert np.array_equal(columns[0].reshape(5, 6, 8, 3), frames(0))
    assert np.array_equal(columns[1].reshape(5, 6, 8, 3), frames(1))
    assert np.array_equal(columns[3].reshape(4, 6, 8, 3), frames(2, 4))


def test_one_player_moves_every_clip_and_the_page_begins_with_what_is_given(page: str) -> None:
    assert page.count('class="player"') == page.count("<script>") == 1
    assert 'max="5" value="1"' in page and "--share: 37.50%" in page and 'data-fps="8"' in page
    assert 'class="card clip" data-frames="5" data-context="2"' in page
    assert 'class="card clip predicted" data-frames="4" data-context="0"' in page
    badges = re.findall(r'class="badge">([^<]*)<', page)
    assert badges == ["given 1", "predicted 1"]
    assert "prefers-reduced-motion" in page and "<noscript>" in page


def test_panels_are_whole_multiples_of_their_frames_and_never_wider_than_the_page(tmp_path: Path) -> None:
    rows = {str(index): frames(index, 2, 64, 64) for index in range(5)}
    report = Report("t", "s", [Clip(dict(list(rows.items())[:count]), 1) for count in (1, 4, 5)], legend={"right": "#2563eb"})
    text = write_report(report, tmp_path / "r.html").read_text(encoding="utf-8")
    assert [int(width) for width in re.findall(r"--width: (\d+)px", text)] == [256, 256, 192]
    assert '<span class="key filled" style="--key: #2563eb">right</span>' in text


def test_small_frames_are_enlarged_by_a_whole_factor_to_at_least_192_pixels(page: str) -> None:
    widths = [int(width) for width in re.findall(r"--width: (\d+)px", page)]
    assert widths == [280, 280]
    assert "image-rendering: pixelated" in page


def test_a_large_moving_picture_is_compressed(tmp_path: Path) -> None:
    report = Report("t", "s", [Clip({"real": frames(0, 4, 400, 400)}, 1)])
    text = write_report(report, tmp_path / "r.html").read_text(encoding="utf-8")
    assert "data:image/webp" in text
    assert pictures(text)[0].shape == (1600, 400, 3)


def test_an_empty_report_has_a_title_and_no_empty_sections(tmp_path: Path) -> None:
    page = Page(write_report(Report("Title", "Sentence."), tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "Title" in page.text
    assert not {"section", "script"} & set(page.tags)


def test_clips_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    for rows, context, message in (
        ({"a": frames(0), "b": frames(0, 4)}, 1, r"b uint8 \(4, 6, 8, 3\)"),
        ({"a": frames(0), "b": frames(0, 5, 7)}, 1, "of one size"),
        ({"a": frames(0).astype(np.float32)}, 1, "float32"),
        ({}, 0, "none at all"),
        ({"a": frames(0)}, 6, "context of 6 for 5 frames"),
    ):
        with pytest.raises(ValueError, match=message):
            write_report(Report("t", "s", [Clip(rows, context)]), tmp_path / "r.html")
    with pytest.raises(ValueError, match="above 0"):
        write_report(Report("t", "s", fps=0), tmp_path / "r.html")


def test_numbers_are_short_and_nothing_measured_is_a_dash() -> None:
    cells = (None, math.nan, 3, "text", 0.0, 0.81234, 12.345, 123.45, 12345.6, 0.000976, -0.5)
    expected = ["–", "–", "3", "text", "0.000", "0.812", "12.35", "123.5", "12,345.6", "0.000976", "-0.500"]
    assert [format_cell(cell) for cell in cells] == expected


def test_an_interval_stands_below_its_number() -> None:
    card = table_card(Table("t", ["", "PSNR"], [["model", Measured("31.2", "30 – 32")]]))
    assert "<td>31.2<small>30 – 32</small></td>" in card
    assert format_cell(Measured("31.2", "30 – 32")) == "31.2 (30 – 32)"


def test_a_band_is_drawn_around_its_curve_and_leaves_it_as_it_is(tmp_path: Path) -> None:
    pictures = []
    for band in ({}, {"low": [0.0, 0.1], "high": [1.0, 0.9]}):
        curve = Curve("model", [1, 2], [0.5, 0.5], "#2563eb", **band)
        path = plot_curves(tmp_path / "a.png", [curve], title="t", x_label="x", y_label="y", unit="fraction", least_span=1.0)
        pictures.append(np.asarray(Image.open(path).convert("RGB")).astype(int))
    # A pale blue: the ink of the curve at less than a fifth.
    pale = [((np.abs(picture - np.array([216, 226, 252])).sum(-1)) < 12).mean() for picture in pictures]
    assert pale[0] < 0.005 < 0.1 < pale[1]


def test_the_difference_is_absolute_and_does_not_wrap_around() -> None:
    low, high = np.full((1, 1, 1, 3), 10, np.uint8), np.full((1, 1, 1, 3), 250, np.uint8)
    assert difference_frames(low, high).max() == difference_frames(high, low).min() == 240


def near(image: np.ndarray, frame: np.ndarray, scale: int) -> tuple[int, int]:
    """Find the one place where an enlarged frame stands in the picture."""
    target = frame.repeat(scale, 0).repeat(scale, 1)
    height, width = target.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(image, (height, width, 3))[:, :, 0]
    corners = (windows[:, :, 0, 0] == target[0, 0]).all(-1)
    found = [(y, x) for y, x in np.argwhere(corners) if np.array_equal(windows[y, x], target)]
    assert len(found) == 1
    return int(found[0][0]), int(found[0][1])


def test_the_strip_shows_every_frame_once_in_reading_order_with_given_ones_framed_in_their_colour() -> None:
    real, predicted = frames(3, 3), frames(4, 3)
    strip = strip_image({"real": real, "predicted": predicted}, context=1)
    places = [[near(strip, frame, 12) for frame in row] for row in (real, predicted)]
    assert places[0][0][0] == places[0][2][0] < places[1][0][0]
    assert places[0][0][1] == places[1][0][1] < places[0][1][1] < places[0][2][1]
    for row in places:
        borders = [tuple(strip[y - 2, x + 5].tolist()) for y, x in row]
        assert borders == [GIVEN_COLOUR, PREDICTED_COLOUR, PREDICTED_COLOUR]


def test_a_long_strip_goes_on_below_without_a_row_that_has_ended_and_a_short_row_leaves_places_empty() -> None:
    short = strip_image({"real": frames(5, 12)}, 4)
    long = strip_image({"real": frames(5, 12), "predicted": frames(6, 14)}, 4)
    longer = strip_image({"real": frames(5, 13), "predicted": frames(6, 14)}, 4)
    row = strip_image({"real": frames(5, 12), "predicted": frames(6, 12)}, 4).shape[0] - short.shape[0]
    assert (long.shape[0], longer.shape[0]) == (2 * short.shape[0] + row - STRIP_GAP, 2 * (short.shape[0] + row) - STRIP_GAP)
    first, last = near(long, frames(6, 14)[0], 12), near(long, frames(6, 14)[13], 12)
    assert last[0] > first[0]


@pytest.fixture(scope="module")
def token_report() -> TokenReport:
    indices = torch.randint(8, (2, 6, 2, 3), generator=torch.Generator().manual_seed(0))
    counts = TokenCounts(8, (2, 3))
    counts.update(indices)
    scores = Baselines(counts).scores(indices)
    meters = {name: TokenMeter((2, 3)) for name in ("model", *scores)}
    for name, meter in meters.items():
        meter.update(scores.get(name, scores["unigram"]), changed_tokens(indices))
    rollout = RolloutMeter((2, 3))
    rollout.update(indices[:, 2:], indices[:, 2:], indices[:, 1])
    return TokenReport(2, 2, meters, {"model": rollout})


def test_every_figure_is_a_picture_with_ink_readable_on_a_phone(token_report: TokenReport, tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "lr": 1.0}, {"step": 2, "validation_loss": None}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = [
        plot_accuracy_by_frame(token_report, tmp_path / "a.png"),
        plot_accuracy_by_horizon(token_report, tmp_path / "b.png"),
        plot_accuracy_by_position(token_report, tmp_path / "c.png"),
        plot_changes_by_horizon(token_report, tmp_path / "d.png"),
        plot_changes_by_position(token_report, tmp_path / "g.png"),
        plot_losses(tmp_path / "metrics.jsonl", tmp_path / "e.png"),
        plot_psnr_by_horizon({"prediction": [30.0, 29.0], "copy_last_frame": [28.0, 25.0]}, tmp_path / "f.png"),
    ]
    for path in made:
        picture = Image.open(path)
        assert picture.width == 1012
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_equal_data_give_equal_files(token_report: TokenReport, tmp_path: Path) -> None:
    first, second = (plot_accuracy_by_horizon(token_report, tmp_path / name) for name in ("a.png", "b.png"))
    assert first.read_bytes() == second.read_bytes()


def test_a_figure_without_points_is_refused(token_report: TokenReport, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'Nothing' got no points"):
        plot_curves(tmp_path / "a.png", [], title="Nothing", x_label="x", y_label="y")
    with pytest.raises(ValueError, match="no points"):
        plot_accuracy_by_horizon(replace(token_report, free_running={}), tmp_path / "a.png")


def test_labels_keep_their_order_do_not_overlap_and_stay_below_the_top() -> None:
    heights = [0.1] * 4
    placed = spread([0.99, 0.98, 0.2, 0.97], heights)
    assert placed[2] == 0.2
    assert placed[3] < placed[1] < placed[0] <= 0.95
    ordered = sorted(placed)
    assert all(above - below >= 0.1 - 1e-9 for below, above in zip(ordered, ordered[1:], strict=False))
