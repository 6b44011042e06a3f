"""Token metrics and baselines against NumPy loops and worlds with known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from vidgpt.metrics import Baselines, RolloutMeter, TokenCounts, TokenMeter, changed_tokens
from vidgpt.scores import TokenScores, score_logits

GRID = (2, 3)
SIZE = 7


def random_clips(seed: int, clips: int = 4, frames: int = 5, size: int = SIZE) -> Tensor:
    return torch.randint(size, (clips, frames, *GRID), generator=torch.Generator().manual_seed(seed))


def counts_of(*clips: Tensor, size: int = SIZE) -> TokenCounts:
    counts = TokenCounts(size, GRID)
    for batch in clips:
        counts.update(batch)
    return counts


def meter_of(scores: TokenScores, indices: Tensor) -> TokenMeter:
    meter = TokenMeter(GRID)
    meter.update(scores, changed_tokens(indices))
    return meter


def test_scores_agree_with_a_direct_softmax_and_sort_in_numpy() -> None:
    targets = random_clips(0)
    logits = torch.randn(*targets.shape, SIZE, generator=torch.Generator().manual_seed(1))
    scores = score_logits(logits, targets)
    for place in np.ndindex(*targets.shape):
        row = logits[place].double().numpy()
        probabilities = np.exp(row) / np.exp(row).sum()
        target = int(targets[place])
        assert scores.nats[place].item() == pytest.approx(-math.log(probabilities[target]), abs=1e-5)
        assert scores.top1[place].item() == float(probabilities.argmax() == target)
        assert scores.top5[place].item() == float(target in np.argsort(-row)[:5])


def test_equal_logits_cost_ln_v_and_rank_the_lower_id_first_as_argmax_does() -> None:
    targets = random_clips(2)
    scores = score_logits(torch.zeros(*targets.shape, SIZE), targets)
    torch.testing.assert_close(scores.nats, torch.full(targets.shape, math.log(SIZE), dtype=torch.float64))
    assert torch.equal(scores.top1.bool(), targets == 0)
    assert torch.equal(scores.top5.bool(), targets < 5)


def test_summary_names_units_and_converts_them() -> None:
    indices = random_clips(3, frames=3)
    shape = (4, 2, *GRID)
    half = torch.full(shape, math.log(2), dtype=torch.float64)
    top1 = torch.zeros(shape, dtype=torch.float64)
    top1[:, 0] = 1
    figures = meter_of(TokenScores(half, top1, torch.ones_like(top1), confidence=top1), indices).summary()
    assert figures["tokens_count"] == 48
    assert figures["cross_entropy_nats_per_token"] == pytest.approx(math.log(2))
    assert figures["cross_entropy_bits_per_token"] == pytest.approx(1)
    assert figures["cross_entropy_bits_per_frame"] == pytest.approx(6)
    assert figures["perplexity_tokens"] == pytest.approx(2)
    assert figures["top1_accuracy_fraction"] == 0.5
    assert figures["top5_accuracy_fraction"] == 1


def test_a_pixel_takes_its_share_of_what_the_latent_frame_costs_that_stands_for_it() -> None:
    indices = random_clips(3, frames=3)
    shape = (4, 2, *GRID)
    ones = torch.ones(shape, dtype=torch.float64)
    meter = TokenMeter(GRID, pixels_per_frame=4 * 16 * 24)  # four frames of 16x24 pixels
    meter.update(TokenScores(ones * math.log(2), ones, ones, confidence=ones), changed_tokens(indices))
    figures = meter.summary()
    assert figures["cross_entropy_bits_per_frame"] == pytest.approx(6)
    assert figures["cross_entropy_nats_per_frame"] == pytest.approx(6 * math.log(2))
    assert figures["cross_entropy_bits_per_pixel"] == pytest.approx(6 / 1536)
    assert figures["cross_entropy_nats_per_pixel"] == pytest.approx(6 * math.log(2) / 1536)
    assert "cross_entropy_bits_per_pixel" not in TokenMeter(GRID).summary()


def test_baselines_are_as_sure_as_the_probability_of_what_they_take_for_likeliest() -> None:
    counts, indices = counts_of(random_clips(20)), random_clips(21, clips=1, frames=2)
    scores = Baselines(counts).scores(indices)
    law = counts.unigram()
    assert float(scores["uniform"].confidence.mean()) == pytest.approx(1 / SIZE)
    assert float(scores["unigram"].confidence.mean()) == pytest.approx(float(law.max()))
    assert float(scores["copy_last_frame_smoothed"].confidence.mean()) == pytest.approx(counts.same_probability())
    for y, x in np.ndindex(*GRID):
        numbers = torch.bincount(random_clips(20)[:, :, y, x].flatten(), minlength=SIZE).double()
        distinct = (numbers > 0).sum()
        here = (numbers + distinct * law) / (numbers.sum() + distinct)
        assert float(scores["unigram_by_position"].confidence[0, 0, y, x]) == pytest.approx(float(here.max()))


def test_batches_weigh_by_their_tokens_however_they_are_cut() -> None:
    indices = random_clips(4, clips=5)
    logits = torch.randn(5, 4, *GRID, SIZE, generator=torch.Generator().manual_seed(5))
    whole, cut = TokenMeter(GRID), TokenMeter(GRID)
    whole.update(score_logits(logits, indices[:, 1:]), changed_tokens(indices))
    for part in (slice(0, 3), slice(3, 4), slice(4, 5)):
        cut.update(score_logits(logits[part], indices[part, 1:]), changed_tokens(indices[part]))
    assert cut.summary() == pytest.approx(whole.summary())


def test_clips_of_unlike_length_meet_at_their_frame_index() -> None:
    meter = TokenMeter(GRID)
    for frames in (3, 5):
        clips = torch.zeros(2, frames, *GRID, dtype=torch.long)
        ones = torch.ones(2, frames - 1, *GRID, dtype=torch.float64)
        meter.update(TokenScores(ones, ones, ones, confidence=ones), changed_tokens(clips))
    assert [(row["frame_index"], row["tokens_count"]) for row in meter.by_frame()] == [(1, 24), (2, 24), (3, 12), (4, 12)]


def test_rows_by_position_land_at_their_place() -> None:
    indices = torch.zeros(1, 2, *GRID, dtype=torch.long)
    zeros = torch.zeros(1, 1, *GRID, dtype=torch.float64)
    nats = zeros.clone()
    nats[0, 0, 1, 2] = 3.0
    rows = meter_of(TokenScores(nats, zeros, zeros, confidence=zeros), indices).by_position()
    assert [(row["row"], row["column"]) for row in rows] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert [row["cross_entropy_nats_per_token"] for row in rows] == [0, 0, 0, 0, 0, 3.0]


def test_accuracy_on_changed_tokens_counts_only_these() -> None:
    indices = torch.zeros(1, 3, *GRID, dtype=torch.long)
    indices[0, 1:, 0, 0] = 1
    indices[0, 2, 1, :2] = 2
    top1 = torch.ones(1, 2, *GRID, dtype=torch.float64)
    top1[0, 1, 1, 0] = 0
    figures = meter_of(TokenScores(top1, top1, top1, confidence=top1), indices).summary()
    assert figures["changed_tokens_fraction"] == pytest.approx(3 / 12)
    assert figures["top1_accuracy_on_changed_tokens_fraction"] == pytest.approx(2 / 3)
    assert figures["top1_accuracy_fraction"] == pytest.approx(11 / 12)


def test_a_figure_without_anything_counted_is_none() -> None:
    still = torch.zeros(1, 2, *GRID, dtype=torch.long)
    ones = torch.ones(1, 1, *GRID, dtype=torch.float64)
    assert (
        meter_of(TokenScores(ones, ones, ones, confidence=ones), still).summary()["top1_accuracy_on_changed_tokens_fraction"]
        is None
    )
    assert TokenMeter(GRID).summary()["cross_entropy_bits_per_frame"] is None


def test_unigram_is_add_one_smoothed_and_copying_is_estimated_on_pairs_of_frames() -> None:
    clip = torch.zeros(1, 2, *GRID, dtype=torch.long)
    clip[0, 1, 0, 0] = 3
    counts = counts_of(clip)
    expected = torch.ones(SIZE, dtype=torch.float64)
    expected[0] += 11
    expected[3] += 1
    torch.testing.assert_close(counts.unigram(), expected / 19)
    assert counts.same_probability() == pytest.approx((5 + 1) / (6 + 2))


def test_counting_in_parts_equals_counting_at_once() -> None:
    clips = random_clips(6)
    parts, whole = counts_of(clips[:1], clips[1:]), counts_of(clips)
    assert torch.equal(parts.by_position.table, whole.by_position.table)
    assert (parts.pairs, parts.same) == (whole.pairs, whole.same)


def test_every_baseline_is_a_distribution_over_all_ids() -> None:
    baselines = Baselines(counts_of(random_clips(7)))
    past = random_clips(8, clips=1, frames=1)
    totals = dict.fromkeys(Baselines.names, torch.zeros(GRID, dtype=torch.float64))
    hits = dict.fromkeys(Baselines.names, torch.zeros(GRID, dtype=torch.float64))
    for target in range(SIZE):
        scores = baselines.scores(torch.cat([past, torch.full_like(past, target)], dim=1))
        for name in Baselines.names:
            totals[name] = totals[name] + torch.exp(-scores[name].nats[0, 0])
            hits[name] = hits[name] + scores[name].top5[0, 0]
    for name in Baselines.names:
        torch.testing.assert_close(totals[name], torch.ones(GRID, dtype=torch.float64))
        torch.testing.assert_close(hits[name], torch.full(GRID, 5.0, dtype=torch.float64))


def test_the_uniform_baseline_costs_exactly_ln_v() -> None:
    indices = random_clips(9)
    figures = meter_of(Baselines(counts_of(indices)).scores(indices)["uniform"], indices).summary()
    assert figures["cross_entropy_nats_per_token"] == pytest.approx(math.log(SIZE), rel=1e-12)
    assert figures["top1_accuracy_fraction"] == pytest.approx(1 / SIZE)


def test_unigram_by_position_backs_off_as_witten_and_bell_say() -> None:
    train = random_clips(10, clips=3)
    test = random_clips(11, clips=1, frames=2)
    counts = counts_of(train)
    nats = Baselines(counts).scores(test)["unigram_by_position"].nats
    overall = counts.unigram().numpy()
    for y, x in np.ndindex(*GRID):
        seen = train[:, :, y, x].flatten().numpy()
        target = int(test[0, 1, y, x])
        distinct = len(set(seen.tolist()))
        probability = ((seen == target).sum() + distinct * overall[target]) / (len(seen) + distinct)
        assert nats[0, 0, y, x].item() == pytest.approx(-math.log(probability))


def test_a_place_with_its_own_id_is_known_to_the_baseline_by_position_alone() -> None:
    places = torch.arange(6).reshape(1, 1, *GRID).expand(2, 4, *GRID)
    scores = Baselines(counts_of(places)).scores(places)
    assert scores["unigram_by_position"].top1.mean() == 1
    assert scores["unigram"].top1.mean() == pytest.approx(1 / 6)
    assert scores["unigram_by_position"].nats.mean() < scores["unigram"].nats.mean()


def test_in_a_world_that_only_copies_the_copy_baseline_is_always_right() -> None:
    still = random_clips(12, frames=1).expand(4, 6, *GRID)
    figures = meter_of(Baselines(counts_of(still)).scores(still)["copy_last_frame_smoothed"], still).summary()
    assert figures["top1_accuracy_fraction"] == 1
    assert figures["cross_entropy_nats_per_token"] == pytest.approx(-math.log(121 / 122))


def test_copying_scores_the_share_of_tokens_that_stay() -> None:
    indices = random_clips(13)
    figures = meter_of(Baselines(counts_of(indices)).scores(indices)["copy_last_frame_smoothed"], indices).summary()
    changed = (indices[:, 1:] != indices[:, :-1]).double().mean().item()
    assert figures["top1_accuracy_fraction"] == pytest.approx(1 - changed)
    assert figures["changed_tokens_fraction"] == pytest.approx(changed)
    assert figures["top1_accuracy_on_changed_tokens_fraction"] == 0


def test_the_rollout_meter_compares_by_horizon_with_copying_and_with_the_real_share_of_change() -> None:
    last = torch.zeros(1, *GRID, dtype=torch.long)
    real = torch.zeros(1, 2, *GRID, dtype=torch.long)
    real[0, 0, 0, 0] = real[0, 1, 0, 0] = 1
    real[0, 1, 1, :] = 2
    generated = real.clone()
    generated[0, 1, 1, 0] = 5
    generated[0, 1, 0, 1] = 5
    meter = RolloutMeter(GRID)
    meter.update(generated, real, last)
    first, second = meter.by_frame()
    assert (first["horizon_frames"], second["horizon_frames"]) == (1, 2)
    assert (first["top1_accuracy_fraction"], second["top1_accuracy_fraction"]) == (1, pytest.approx(4 / 6))
    assert second["copy_last_given_frame_accuracy_fraction"] == pytest.approx(2 / 6)
    assert second["changed_tokens_real_fraction"] == pytest.approx(3 / 6)
    assert second["changed_tokens_generated_fraction"] == pytest.approx(4 / 6)
    assert second["top1_accuracy_on_changed_tokens_fraction"] == pytest.approx(2 / 3)
    assert meter.summary()["top1_accuracy_fraction"] == pytest.approx(10 / 12)


def test_counts_refuse_another_grid_and_ids_outside_the_codebook() -> None:
    with pytest.raises(ValueError, match=r"\(B, t, 2, 3\)"):
        counts_of(torch.zeros(1, 2, 3, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="0 to 7; the codebook has 0 to 6"):
        counts_of(torch.tensor([0, 7]).repeat(3).reshape(1, 1, *GRID))
    with pytest.raises(ValueError, match="at least 2"):
        TokenCounts(1, GRID)
