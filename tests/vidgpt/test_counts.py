"""Counts of ids really seen against a table of all ids, and baselines over ids that no table could hold."""

import math

import pytest
import torch
from torch import Tensor

from vidgpt import counts as counting
from vidgpt.counts import SeenIds, Table, TokenCounts
from vidgpt.metrics import Baselines, TokenMeter, changed_tokens

GRID = (2, 3)


def random_clips(seed: int, size: int = 12, clips: int = 4, frames: int = 5) -> Tensor:
    return torch.randint(size, (clips, frames, *GRID), generator=torch.Generator().manual_seed(seed))


def counts_of(clips: Tensor, size: int, factors: tuple[int, ...] = ()) -> TokenCounts:
    counts = TokenCounts(size, GRID, factors)
    for clip in clips:
        counts.update(clip[None])
    return counts


def far_apart(indices: Tensor) -> Tensor:
    """Send ids 0 .. 11 to ids that lie far apart, in the same order."""
    return indices * (1 << 56) + 3


@pytest.mark.parametrize("pending", [1, 40, 10**6], ids=str)
def test_ids_seen_are_counted_as_in_a_table(pending, monkeypatch) -> None:
    monkeypatch.setattr(counting, "PENDING_IDS", pending)
    table, seen = Table(12, GRID), SeenIds(GRID)
    for seed in range(4):
        # Of each clip other ids are known, so that ids are renumbered.
        clip = random_clips(seed, clips=1) // (4 - seed)
        table.add(clip)
        seen.add(far_apart(clip))
    for ours, theirs in zip(seen.totals(), table.totals(), strict=True):
        assert torch.equal(ours, theirs)
    wanted = random_clips(9)
    assert torch.equal(seen.at(far_apart(wanted)), table.at(wanted))
    assert not seen.at(far_apart(wanted) + 1).any()
    index, is_known = seen.find(far_apart(torch.arange(12)))
    assert torch.equal(is_known, table.overall() > 0)
    assert torch.equal(seen.overall()[index] * is_known, table.overall())
    assert not seen.find(far_apart(torch.arange(12)) - 1)[1].any()


def test_likeliest_ids_of_a_place_are_those_of_a_table() -> None:
    clips = random_clips(0, clips=1)
    table, seen = Table(12, GRID), SeenIds(GRID)
    for places in (table, seen):
        places.add(clips)
    prior = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(GRID, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = seen.likeliest(prior[seen.ids()], weights, 5)
    assert torch.equal(ours, table.likeliest(prior.where(torch.isin(torch.arange(12), seen.ids()), 0), weights, 5))


@pytest.mark.parametrize("factors", [(12,), (4, 3)], ids=str)
def test_baselines_are_the_same_with_and_without_a_table(factors, monkeypatch) -> None:
    train, test = random_clips(0, size=7), random_clips(1)
    with_table = Baselines(counts_of(train, 12, factors)).scores(test)
    monkeypatch.setattr(counting, "TABLE_ENTRIES", 1)
    without = Baselines(counts_of(train, 12, factors)).scores(test)
    for name in Baselines.names:
        torch.testing.assert_close(without[name].nats, with_table[name].nats)
        assert torch.equal(without[name].top1, with_table[name].top1)


@pytest.mark.parametrize("entries", [1, 1 << 20], ids=str)
def test_baselines_of_digits_are_distributions_over_all_ids(entries, monkeypatch) -> None:
    monkeypatch.setattr(counting, "TABLE_ENTRIES", entries)
    baselines = Baselines(counts_of(random_clips(2, size=7), 12, (4, 3)))
    past = random_clips(3, clips=1, frames=1)
    totals = dict.fromkeys(Baselines.names, torch.zeros(GRID, dtype=torch.float64))
    for target in range(12):
        scores = baselines.scores(torch.cat([past, torch.full_like(past, target)], dim=1))
        totals = {name: totals[name] + torch.exp(-scores[name].nats[0, 0]) for name in totals}
    for total in totals.values():
        torch.testing.assert_close(total, torch.ones(GRID, dtype=torch.float64))


def test_an_id_of_digits_that_was_never_seen_is_as_likely_as_its_digits() -> None:
    clips = torch.zeros(1, 1, *GRID, dtype=torch.long)
    clips[..., 1:] = 5  # digits (1, 1)
    counts = counts_of(clips, 12, (4, 3))
    # Two of six tokens are id 0; two different ids give the product of the digits' frequencies the weight of two tokens.
    share = {0: (2 + 1) / (6 + 4) * (2 + 1) / (6 + 3), 1: (4 + 1) / (6 + 4) * (2 + 1) / (6 + 3)}
    assert counts.unigram()[0].item() == pytest.approx((2 + 2 * share[0]) / (6 + 2))
    assert counts.unseen(torch.tensor(1)).item() == pytest.approx(2 * share[1] / (6 + 2))


def test_ids_beyond_any_table_have_baselines_that_use_what_repeats() -> None:
    factors = (1 << 15,) * 4
    still = torch.randint(1 << 60, (1, 1, *GRID), generator=torch.Generator().manual_seed(0)).expand(3, 6, *GRID)
    counts = counts_of(still, 1 << 60, factors)
    meters = {name: TokenMeter(GRID, 4) for name in Baselines.names}
    for name, scores in Baselines(counts).scores(still).items():
        meters[name].update(scores, changed_tokens(still))
    figures = {name: meter.summary() for name, meter in meters.items()}
    assert figures["uniform"]["cross_entropy_nats_per_token"] == pytest.approx(60 * math.log(2))
    assert figures["uniform"]["digit_3_cross_entropy_nats_per_token"] == pytest.approx(15 * math.log(2))
    assert figures["unigram"]["cross_entropy_nats_per_token"] < 2.5
    assert figures["unigram_by_position"]["cross_entropy_nats_per_token"] < 0.1
    assert figures["unigram_by_position"]["top1_accuracy_fraction"] == 1
    assert figures["copy_last_frame_smoothed"]["digit_0_top1_accuracy_fraction"] is None


def test_counts_without_any_clip_give_baselines_over_a_large_codebook() -> None:
    scores = Baselines(TokenCounts(1 << 40, GRID, (1 << 20, 1 << 20))).scores(random_clips(0))
    torch.testing.assert_close(scores["unigram"].nats, scores["uniform"].nats)
