"""Sums by clip, and bootstrap intervals against NumPy loops and the normal approximation."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import Tensor

from vidgpt import metrics
from vidgpt.calibration import BINS, Calibration, expected_calibration_error
from vidgpt.clip_sums import Bootstrap, ClipPlace, ClipSums, describe_episodes, lower_tail, number_episodes, weighted
from vidgpt.metrics import CALIBRATION, HIGH, LOW, RolloutMeter, TokenMeter, gap
from vidgpt.scores import TokenScores

GRID = (2, 3)
STUDENT = {2: 12.7062, 3: 4.30265, 4: 3.18245, 5: 2.77645, 7: 2.44691, 10: 2.26216, 40: 2.02269}  # 97.5 %, by episodes


def percentiles(episodes: int) -> list[float]:
    """Give those of an expanded interval, from a table of Student's quantiles."""
    tail = 100 * NormalDist().cdf(-STUDENT[episodes] * math.sqrt(episodes / (episodes - 1)))
    return [tail, 100 - tail]


def random_scores(seed: int, clips: int = 5, frames: int = 4) -> TokenScores:
    generator = torch.Generator().manual_seed(seed)
    # Clips differ from each other, as those of different videos do.
    level = 1 + torch.rand(clips, 1, 1, 1, generator=generator, dtype=torch.float64)
    nats, confidence = (torch.rand(clips, frames, *GRID, generator=generator, dtype=torch.float64) for _ in range(2))
    top1 = (torch.rand(clips, frames, *GRID, generator=generator) < 0.6).double()
    return TokenScores(level * nats, top1, top1, confidence=confidence)


def meter_of(scores: TokenScores, changed: Tensor | None = None, episodes: Tensor | None = None) -> TokenMeter:
    meter = TokenMeter(GRID)
    meter.update(scores, torch.rand_like(scores.nats) < 0.5 if changed is None else changed, episodes=episodes)
    return meter


def test_an_interval_is_that_of_drawing_whole_clips_again_and_again() -> None:
    scores, changed = random_scores(0), torch.rand(5, 4, *GRID, generator=torch.Generator().manual_seed(1)) < 0.3
    row = meter_of(scores, changed).summary(Bootstrap(resamples=300, seed=7))
    drawn = torch.randint(5, (300, 5), generator=torch.Generator().manual_seed(7)).numpy()
    nats, top1, moved = (part.numpy() for part in (scores.nats, scores.top1, changed))
    for name, of in (
        ("cross_entropy_nats_per_token", lambda rows: nats[rows].mean()),
        ("top1_accuracy_on_changed_tokens_fraction", lambda rows: top1[rows][moved[rows]].mean()),
    ):
        low, high = np.percentile([of(rows) for rows in drawn], percentiles(5))
        assert row[name + LOW] == pytest.approx(low, rel=1e-3)
        assert row[name + HIGH] == pytest.approx(high, rel=1e-3)
        assert low < row[name] < high


def test_an_interval_is_that_of_drawing_whole_episodes_with_all_their_clips() -> None:
    scores, episodes = random_scores(9, clips=7), torch.tensor([3, 3, 0, 8, 0, 3, 5])
    nats, of = scores.nats.numpy(), episodes.numpy()
    drawn = torch.randint(4, (300, 4), generator=torch.Generator().manual_seed(7)).numpy()
    names = np.array([3, 0, 8, 5])  # in the order they come
    # An episode's clips come as often as it was drawn.
    values = [np.concatenate([nats[of == episode] for episode in names[row]]).mean() for row in drawn]
    bounds = np.percentile(values, percentiles(4))
    row = meter_of(scores, episodes=episodes).summary(Bootstrap(300, 7))
    assert [row["cross_entropy_nats_per_token" + end] for end in (LOW, HIGH)] == pytest.approx(bounds, rel=1e-5)
    apart = meter_of(scores).summary(Bootstrap(300, 7))
    assert apart["cross_entropy_nats_per_token" + LOW] != pytest.approx(row["cross_entropy_nats_per_token" + LOW])


def test_windows_of_one_episode_that_tell_the_same_do_not_narrow_an_interval() -> None:
    few = random_scores(10, clips=10)
    nats, top1, confidence = (part.repeat_interleave(20, 0) for part in (few.nats, few.top1, few.confidence))
    many = TokenScores(nats, top1, top1, confidence=confidence)
    bootstrap, of = Bootstrap(500), torch.arange(10).repeat_interleave(20)
    names = [f"cross_entropy_nats_per_token{end}" for end in ("", LOW, HIGH)]
    once, again, apart = (
        [meter_of(scores, episodes=episodes).summary(bootstrap)[name] for name in names]
        for scores, episodes in ((few, None), (many, of), (many, None))
    )
    assert again == pytest.approx(once)
    assert again[2] - again[1] > 3 * (apart[2] - apart[1])


def test_clips_of_one_episode_have_no_interval_and_few_episodes_are_named() -> None:
    row = meter_of(random_scores(11), episodes=torch.zeros(5, dtype=torch.long)).summary(Bootstrap(10))
    assert row["cross_entropy_nats_per_token"] and not [name for name in row if "ci95" in name]
    assert describe_episodes(1, 5) == "no intervals: the 5 clips are of one episode, and depend on each other"
    assert describe_episodes(5, 64) == "intervals over 5 episodes: of fewer than 6 they are too narrow"
    assert describe_episodes(6, 64) == describe_episodes(1, 1) == ""
    places = [ClipPlace(row, 0, episode) for row, episode in ((4, "a"), (5, "b"), (6, "a"))]
    assert number_episodes(places) == [0, 1, 0] and places[2].columns() == {
        "data_row": 6,
        "first_latent_frame": 0,
        "episode": "a",
    }


def test_the_tails_are_those_of_students_distribution() -> None:
    for episodes in STUDENT:
        assert 100 * lower_tail(episodes) == pytest.approx(percentiles(episodes)[0], rel=0.12, abs=1e-4)
    assert lower_tail(10**6) == pytest.approx(0.025, rel=1e-4)


def test_intervals_over_few_episodes_cover_what_they_say() -> None:
    generator, hits, trials = torch.Generator().manual_seed(0), 0, 1500
    for seed in range(trials):
        values = torch.randn(8, generator=generator, dtype=torch.float64)
        bounds = Bootstrap(300, seed).interval(
            range(8), lambda weights, of=values: weights @ of / 8, torch.ones(8, dtype=torch.bool)
        )
        assert bounds is not None
        hits += int(bounds[0] <= 0 <= bounds[1])
    assert 0.925 < hits / trials < 0.965  # of plain percentiles 0.88


def test_a_figure_that_fewer_than_two_episodes_know_has_no_bounds_and_others_keep_theirs() -> None:
    scores, changed = random_scores(12, clips=6), torch.zeros(6, 4, *GRID, dtype=torch.bool)
    changed[:2, 1:3] = True
    changed[4:, 2] = True
    name = "top1_accuracy_on_changed_tokens_fraction"
    meter = meter_of(scores, changed, torch.tensor([0, 0, 1, 1, 2, 2]))
    rows = meter.by_frame(Bootstrap(200))
    assert [row[name] is None for row in rows] == [True, False, False, True]
    assert [row[name + LOW] is None for row in rows] == [row[name + HIGH] is None for row in rows] == [True, True, False, True]
    assert None not in [row["top1_accuracy_fraction" + LOW] for row in rows]
    # As wide as of so many episodes as know it, whatever others there are.
    alone = TokenMeter(GRID)
    part = [0, 1, 4, 5]
    kept = TokenScores(*(values[part] for values in (scores.nats, scores.top1, scores.top5)), confidence=scores.confidence[part])
    alone.update(kept, changed[part], episodes=torch.tensor([0, 0, 2, 2]))
    two = alone.by_frame(Bootstrap(200))[2]
    assert [rows[2][name + end] for end in (LOW, HIGH)] == [two[name + end] for end in (LOW, HIGH)]


def test_an_interval_is_expanded_by_the_episodes_that_know_the_figure() -> None:
    values = torch.randn(40, generator=torch.Generator().manual_seed(16), dtype=torch.float64)
    known = torch.arange(40) % 8 == 0  # 5 of them

    def mean(weights: Tensor) -> Tensor:
        return (weights @ (values * known)) / (weights @ known.double())

    drawn = torch.randint(40, (2000, 40), generator=torch.Generator().manual_seed(0))
    means = [float(values[row][known[row]].mean()) for row in drawn]
    bounds = Bootstrap(2000).interval(range(40), mean, known)
    assert bounds is not None
    assert [float(end) for end in bounds] == pytest.approx(np.nanpercentile(means, percentiles(5)), rel=1e-2)
    assert bounds[1] - bounds[0] > 1.1 * np.diff(np.nanpercentile(means, percentiles(40)))[0]


def test_a_gap_and_rollouts_are_drawn_by_episode_too() -> None:
    few, law = random_scores(13, clips=6), random_scores(14, clips=6)

    def nine_times(values: Tensor) -> Tensor:
        return values.repeat_interleave(9, 0)

    many = [
        TokenScores(*map(nine_times, (part.nats, part.top1, part.top5)), confidence=nine_times(part.confidence))
        for part in (few, law)
    ]
    of, bootstrap = torch.arange(6).repeat_interleave(9), Bootstrap(200)
    once = gap(meter_of(few), meter_of(law), bootstrap)
    assert gap(*(meter_of(scores, episodes=of) for scores in many), bootstrap) == pytest.approx(once)
    generator = torch.Generator().manual_seed(15)
    made, real = (torch.randint(3, (6, 4, *GRID), generator=generator) for _ in range(2))
    alone, together = RolloutMeter(GRID), RolloutMeter(GRID)
    alone.update(made, real, real[:, 0])
    together.update(*map(nine_times, (made, real, real[:, 0])), episodes=of)
    names = [f"top1_accuracy_fraction{end}" for end in (LOW, HIGH)]
    assert [together.summary(bootstrap)[name] for name in names] == pytest.approx(
        [alone.summary(bootstrap)[name] for name in names]
    )


def test_of_many_clips_an_interval_is_the_normal_one_of_their_means() -> None:
    scores = random_scores(2, clips=400)
    row = meter_of(scores).summary(Bootstrap(2000))
    means = scores.nats.mean((1, 2, 3))
    half = 1.96 * float(means.std()) / math.sqrt(400)
    assert row["cross_entropy_nats_per_token" + HIGH] - row["cross_entropy_nats_per_token" + LOW] == pytest.approx(
        2 * half, rel=0.08
    )


def test_every_row_of_frames_and_places_has_its_own_interval_and_a_single_clip_has_none() -> None:
    scores, bootstrap = random_scores(3), Bootstrap(100)
    meter = meter_of(scores)
    for rows, clips in (
        (meter.by_frame(bootstrap), [scores.nats[:, k].flatten(1).mean(1) for k in range(4)]),
        (meter.by_position(bootstrap), [scores.nats[:, :, y, x].mean(1) for y in range(2) for x in range(3)]),
    ):
        for row, means in zip(rows, clips, strict=True):
            value = row["cross_entropy_nats_per_token"]
            assert value == pytest.approx(float(means.mean()))
            assert means.min() <= row["cross_entropy_nats_per_token" + LOW] < value < row["cross_entropy_nats_per_token" + HIGH]
    alone = meter_of(random_scores(4, clips=1)).summary(bootstrap)
    assert not [name for name in alone if "ci95" in name]


def test_intervals_of_many_rows_are_made_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    meter, bootstrap = meter_of(random_scores(3)), Bootstrap(100)
    rows = meter.by_frame(bootstrap), meter.by_position(bootstrap)
    monkeypatch.setattr(metrics, "HELD_RESAMPLES", 250)
    for before, after in zip(rows, (meter.by_frame(bootstrap), meter.by_position(bootstrap)), strict=True):
        assert after == [pytest.approx(row) for row in before]


def test_a_paired_difference_is_narrower_than_the_figures_it_is_of() -> None:
    scores = random_scores(5, clips=40)
    nudged = TokenScores(
        scores.nats + 0.01 * random_scores(6, clips=40).nats, scores.top1, scores.top5, confidence=scores.confidence
    )
    bootstrap = Bootstrap(500)
    found = gap(meter_of(nudged), meter_of(scores), bootstrap)
    value, low, high = (found[f"gap_nats_per_token{end}"] for end in ("", LOW, HIGH))
    assert value == pytest.approx(float((nudged.nats - scores.nats).mean()))
    assert 0 < low < value < high
    figures = meter_of(scores).summary(bootstrap)
    assert high - low < 0.1 * (figures["cross_entropy_nats_per_token" + HIGH] - figures["cross_entropy_nats_per_token" + LOW])


def test_sums_of_clips_of_unlike_length_add_up_and_weights_count_clips_more_than_once() -> None:
    sums = ClipSums(["tokens"], GRID)
    for frames in (1, 3):
        sums.add(1, {"tokens": torch.ones(2, frames, *GRID)})
    assert sums.clips == 4
    assert weighted(sums.by_frame())["tokens"].tolist() == [0, 24, 12, 12]
    assert weighted(sums.total(), torch.tensor([[0.0, 2, 1, 1]], dtype=torch.float64))["tokens"].tolist() == [2 * 6 + 18 + 18]
    assert weighted(sums.by_place())["tokens"].tolist() == [8.0] * 6


def naive_error(confidence: np.ndarray, hits: np.ndarray) -> float:
    edges, total = np.linspace(0, 1, BINS + 1), 0.0
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            total += inside.mean() * abs(hits[inside].mean() - confidence[inside].mean())
    return total


def test_the_calibration_error_agrees_with_a_loop_over_bins_overall_by_frame_and_by_place() -> None:
    scores = random_scores(7, clips=30)
    meter = meter_of(scores)
    confidence, hits = scores.confidence.numpy(), scores.top1.numpy()
    assert meter.summary()[CALIBRATION] == pytest.approx(naive_error(confidence.ravel(), hits.ravel()))
    for frame, row in enumerate(meter.by_frame()):
        assert row[CALIBRATION] == pytest.approx(naive_error(confidence[:, frame].ravel(), hits[:, frame].ravel()))
    for place, row in zip(np.ndindex(*GRID), meter.by_position(), strict=True):
        assert row[CALIBRATION] == pytest.approx(naive_error(confidence[:, :, *place].ravel(), hits[:, :, *place].ravel()))


def test_a_forecaster_that_is_right_as_often_as_it_says_has_no_calibration_error_and_a_sure_one_that_errs_has() -> None:
    calibration = Calibration((1, 4))
    confidence = torch.full((1, 1, 1, 4), 0.75, dtype=torch.float64)
    calibration.add(0, confidence, torch.tensor([1.0, 1, 1, 0], dtype=torch.float64).view(1, 1, 1, 4))
    assert float(expected_calibration_error(*calibration.total().values())[0]) == pytest.approx(0)
    calibration.add(0, torch.ones_like(confidence), torch.zeros_like(confidence))
    assert float(expected_calibration_error(*weighted(calibration.total()).values())) == pytest.approx(0.5)


def test_an_unknown_confidence_leaves_the_calibration_error_out() -> None:
    scores = random_scores(8)
    unknown = TokenScores(scores.nats, scores.top1, scores.top5, confidence=torch.full_like(scores.nats, math.nan))
    meter = meter_of(unknown)
    assert meter.summary(Bootstrap(10))[CALIBRATION] is None
    assert {row[CALIBRATION] for row in meter.by_position()} == {None}
