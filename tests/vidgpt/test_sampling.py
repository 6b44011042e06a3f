"""The sampler against arithmetic, and its laws: legality, independence of the batch, inputs left alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from vidgpt import sampling
from vidgpt.layout import TokenLayout
from vidgpt.noise import exponential_noise, sequence_keys
from vidgpt.sampling import Sampler, SamplingOptions, accept_or_resample, filter_logits, sample

ODDS = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).log()
INFINITY = float("inf")


def distribution(options: SamplingOptions, legal: Tensor | None = None) -> list[float]:
    return filter_logits(ODDS[None], options, legal).softmax(-1)[0].tolist()


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def noise_for(logits: Tensor, seed: int = 0, first: int = 0) -> Tensor:
    """Give noise for logits (B, V) or (B, n, V): row by row that of one sequence."""
    shape = logits.shape if logits.ndim == 3 else (len(logits), 1, logits.shape[-1])
    positions = torch.arange(shape[1]).expand(shape[:2])
    return exponential_noise(sequence_keys(seed, shape[0], first=first), positions, shape[2]).view(logits.shape)


def chi_square(ids: Tensor, odds: Tensor) -> float:
    """Give the statistic of ids against the probabilities `odds` (V,), infinite where an impossible id came."""
    counts, expected = torch.bincount(ids.flatten(), minlength=len(odds)), odds.double() * ids.numel()
    if len(counts) > len(odds) or bool((counts[odds == 0] > 0).any()):
        return INFINITY
    return float(((counts - expected) ** 2 / expected)[odds > 0].sum())


# 99.9 % quantiles by degrees of freedom.
QUANTILES = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52}


def test_the_defaults_leave_the_distribution_as_it_is() -> None:
    assert distribution(SamplingOptions()) == pytest.approx([0.4, 0.3, 0.15, 0.1, 0.05])


def test_temperature_raises_probabilities_to_its_inverse() -> None:
    powers = np.array([0.4, 0.3, 0.15, 0.1, 0.05]) ** 2
    assert distribution(SamplingOptions(temperature=0.5)) == pytest.approx((powers / powers.sum()).tolist())


def test_top_k_keeps_k_ids_and_renormalises() -> None:
    assert distribution(SamplingOptions(top_k=2)) == pytest.approx([4 / 7, 3 / 7, 0, 0, 0])


def test_top_p_keeps_the_id_that_crosses_the_threshold() -> None:
    assert distribution(SamplingOptions(top_p=0.75)) == pytest.approx([0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0])
    assert distribution(SamplingOptions(top_p=0.01)) == [1, 0, 0, 0, 0]


def test_min_p_is_relative_to_the_likeliest_id() -> None:
    assert distribution(SamplingOptions(min_p=0.3)) == pytest.approx([0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0])


def test_illegal_ids_are_gone_before_top_k_and_top_p_look() -> None:
    legal = torch.tensor([False, True, True, True, True])
    assert distribution(SamplingOptions(top_k=1), legal) == [0, 1, 0, 0, 0]
    assert distribution(SamplingOptions(top_p=0.6), legal) == pytest.approx([0, 2 / 3, 1 / 3, 0, 0])


def test_temperature_acts_before_top_p() -> None:
    sharp = SamplingOptions(temperature=0.25, top_p=0.7)
    assert distribution(sharp)[0] == 1.0


def test_temperature_zero_is_argmax_and_needs_no_noise() -> None:
    logits = random_logits(6, 50)
    assert torch.equal(sample(logits, SamplingOptions(temperature=0)), logits.argmax(-1))
    assert filter_logits(logits, SamplingOptions(temperature=0)).softmax(-1).max(-1).values.tolist() == [1.0] * 6


def test_temperature_zero_takes_the_likeliest_legal_id() -> None:
    legal = torch.tensor([False, True, True, True, True])
    assert sample(ODDS, SamplingOptions(temperature=0), legal=legal) == 1
    assert distribution(SamplingOptions(temperature=0), legal) == [0, 1, 0, 0, 0]


def test_filters_agree_with_those_of_transformers() -> None:
    logits = random_logits(8, 64)
    ids = torch.zeros(8, 1, dtype=torch.long)
    ours = filter_logits(logits, SamplingOptions(temperature=0.7, top_k=20, top_p=0.9, min_p=0.02))
    theirs = TopKLogitsWarper(20)(ids, logits / 0.7)
    theirs = MinPLogitsWarper(0.02)(ids, TopPLogitsWarper(0.9)(ids, theirs))
    torch.testing.assert_close(ours, theirs)


def test_inputs_are_never_changed() -> None:
    logits = random_logits(3, 20)
    before = logits.clone()
    legal = torch.arange(20) < 15
    for options in (SamplingOptions(0.5, 5, 0.8, 0.1), SamplingOptions(0.0)):
        sample(logits, options, noise_for(logits), legal)
        assert torch.equal(logits, before)
        assert legal.sum() == 15


def test_half_precision_logits_are_filtered_in_fp32() -> None:
    assert filter_logits(random_logits(2, 9).bfloat16(), SamplingOptions(top_p=0.5)).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (SamplingOptions(), 5),
        (SamplingOptions(temperature=1.3, top_p=0.9), 4),
        (SamplingOptions(temperature=0.6, top_k=3), 3),
        (SamplingOptions(temperature=2.0, min_p=0.5), 4),
    ],
    ids=str,
)
def test_samples_follow_the_filtered_distribution(options: SamplingOptions, kept: int) -> None:
    odds = filter_logits(ODDS, options).softmax(-1)
    assert int((odds > 0).sum()) == kept
    logits = ODDS.repeat(1, 20_000, 1)
    assert chi_square(sample(logits, options, noise_for(logits, seed=3)), odds) < QUANTILES[kept - 1]
    # The same draws of the unfiltered distribution, or with uniform noise in the race, are told apart.
    assert options == SamplingOptions() or chi_square(sample(logits, SamplingOptions(), noise_for(logits, seed=3)), odds) > 100
    assert chi_square(sample(logits, options, (-noise_for(logits, seed=3)).exp()), odds) > 100


def test_ten_thousand_samples_of_random_logits_are_all_legal() -> None:
    legal = torch.arange(70) < 64
    logits = random_logits(10, 1000, 70)
    logits[..., 64:] += 20
    assert int(sample(logits, SamplingOptions(top_k=30), noise_for(logits)).max()) >= 64
    ids = sample(logits, SamplingOptions(top_k=30), noise_for(logits), legal)
    assert ids.shape == (10, 1000)
    assert int(ids.max()) < 64


def test_a_row_is_sampled_as_if_it_were_alone() -> None:
    logits = random_logits(5, 40)
    options = SamplingOptions(top_k=30)
    whole = sample(logits, options, noise_for(logits, 7))
    alone = torch.cat([sample(logits[i : i + 1], options, noise_for(logits[:1], 7, first=i)) for i in range(5)])
    assert torch.equal(whole, alone)


def test_a_rounding_of_logits_moves_few_draws_and_only_near_ties() -> None:
    logits = random_logits(4, 500, 40)
    before, after = (sample(moved, SamplingOptions(), noise_for(logits)) for moved in (logits, logits * (1 + 1e-6)))
    assert int((before != after).sum()) <= 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("frame_factor", 0.0),
        ("frame_factor", math.nan),
    ],
)
def test_options_outside_their_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"got {name} {value}"):
        SamplingOptions(**{name: value})


def test_missing_noise_is_refused() -> None:
    with pytest.raises(ValueError, match=r"logits of shape \(2, 5\) need a number for every id, and none came"):
        sample(random_logits(2, 5), SamplingOptions())
    with pytest.raises(ValueError, match=r"and noise of shape \(1, 5\) came"):
        sample(random_logits(2, 5), SamplingOptions(), torch.ones(1, 5))


LAYOUTS = {
    "plain": TokenLayout(6, 2, 3, num_actions=4),
    "slots": TokenLayout(12, 2, 3, num_actions=4, factors=(4, 3)),
    "parallel": TokenLayout(12, 2, 3, num_actions=4, factors=(4, 3), digits="parallel"),
}


def picture_positions(layout: TokenLayout, rows: int, frames: int) -> Tensor:
    positions = torch.arange(frames * layout.tokens_per_frame)
    return positions[~layout.is_lead(positions)].expand(rows, -1)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("options", [SamplingOptions(), SamplingOptions(0.0), SamplingOptions(2.0, 3, 0.9, 0.01)], ids=str)
def test_the_sampler_draws_legal_ids_even_when_the_model_wants_others(layout: TokenLayout, options: SamplingOptions) -> None:
    positions = picture_positions(layout, rows=3, frames=40)
    logits = random_logits(*positions.shape, layout.num_logits)
    if not layout.is_parallel:
        logits[..., layout.bos_id :] += 30
    ids = Sampler(layout, options, sequence_keys(0, 3)).draw(logits, positions)
    frames = torch.cat([layout.leads(40, 3, torch.zeros(3, 40)).unsqueeze(-1), ids.view(3, 40, -1)], dim=-1)
    indices = layout.unflatten(frames.flatten(1))
    assert set(indices.unique().tolist()) == set(range(layout.codebook_size))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_draw_depends_on_its_logits_sequence_and_position_alone(layout: TokenLayout) -> None:
    positions = picture_positions(layout, rows=5, frames=4)
    logits, options = random_logits(*positions.shape, layout.num_logits), SamplingOptions(1.5, top_p=0.95)
    sampler = Sampler(layout, options, sequence_keys(3, 5))
    whole = sampler.draw(logits, positions)
    # One by one, in a shuffled order, each row alone and together with other rows.
    order = torch.randperm(positions.shape[1], generator=torch.Generator().manual_seed(1))
    shuffled = sampler.draw(logits[:, order], positions[:, order])
    assert torch.equal(shuffled, whole[:, order])
    for row in range(5):
        alone = Sampler(layout, options, sequence_keys(3, 1, first=row))
        for column in order[:5].tolist():
            cut = (slice(row, row + 1), slice(column, column + 1))
            assert torch.equal(alone.draw(logits[cut], positions[cut]), whole[cut])
    assert not torch.equal(whole, sampler.draw(logits, positions + layout.tokens_per_frame))
    assert not torch.equal(whole, Sampler(layout, options, sequence_keys(4, 5)).draw(logits, positions))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_sampler_follows_the_distribution_of_every_digit(layout: TokenLayout) -> None:
    positions = torch.arange(12_000)[None] * layout.tokens_per_frame + 1
    logits = random_logits(layout.num_logits, seed=2).expand(1, 12_000, -1)
    ids = Sampler(layout, SamplingOptions(temperature=2.0), sequence_keys(0, 1)).draw(logits, positions)
    digits = layout.split(ids) if layout.is_parallel else ids[..., None]
    for digit, values in zip(layout.due_digits(0), digits.unbind(-1), strict=True):
        odds = (logits[0, 0, slice(*layout.spans[digit])] / 2).softmax(-1)
        assert chi_square(values, odds) < QUANTILES[len(odds) - 1]
    if layout.is_parallel:
        # The digits of a place are drawn with noise of their own.
        joint = torch.outer((logits[0, 0, 4:] / 2).softmax(-1), (logits[0, 0, :4] / 2).softmax(-1)).flatten()
        assert chi_square(ids, joint) < 31.3  # 11 degrees of freedom


TARGET = torch.tensor([0.45, 0.3, 0.2, 0.05, 0.0])
DRAFTERS = {
    "its own": TARGET,
    "uniform": torch.full((5,), 0.2),
    "opposite": TARGET.flip(0),
    "zeros where mass is": torch.tensor([0.0, 0.7, 0.0, 0.2, 0.1]),
    "certain and likely": torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0]),
    "certain and impossible": torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]),
    "nearly its own": torch.tensor([0.4500001, 0.2999999, 0.2, 0.05, 0.0]),
}
Rule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def accept_always(drafts: Tensor, wanted: Tensor, drawn_from: Tensor, uniform: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    return drafts, torch.ones_like(drafts, dtype=torch.bool)


def resample_all(drafts: Tensor, wanted: Tensor, drawn_from: Tensor, uniform: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Accept as the rule does, but draw again from the whole of `wanted`."""
    _, is_kept = accept_or_resample(drafts, wanted, drawn_from, uniform, noise)
    return torch.where(is_kept, drafts, (wanted / noise).argmax(-1)), is_kept


def speculate(rule: Rule, drawn_from: Tensor, count: int = 20_000) -> tuple[float, float]:
    """Give chi-square of the ids that come out against TARGET, and the share of drafts kept."""
    generator = torch.Generator().manual_seed(0)
    drafts = torch.multinomial(drawn_from, count, replacement=True, generator=generator)
    uniform, noise = torch.rand(count, generator=generator), torch.empty(count, 5).exponential_(generator=generator)
    ids, is_kept = rule(drafts, TARGET.expand(count, -1), drawn_from.expand(count, -1), uniform, noise)
    assert torch.equal(ids[is_kept], drafts[is_kept])
    return chi_square(ids, TARGET), float(is_kept.float().mean())


@pytest.mark.parametrize("drawn_from", DRAFTERS.values(), ids=DRAFTERS.keys())
def test_accepted_and_resampled_drafts_follow_the_wanted_distribution(drawn_from: Tensor) -> None:
    statistic, kept = speculate(accept_or_resample, drawn_from)
    assert statistic < QUANTILES[3]
    assert kept == pytest.approx(float(torch.minimum(TARGET, drawn_from).sum()), abs=0.015)


@pytest.mark.parametrize("broken", [accept_always, resample_all])
def test_a_broken_rule_fails_the_same_test(broken: Rule) -> None:
    for name in ("uniform", "opposite", "zeros where mass is", "certain and likely"):
        assert speculate(broken, DRAFTERS[name])[0] > 100


def test_a_certain_draft_is_kept_as_often_by_the_rule_as_by_equal_noise() -> None:
    draws = sample(TARGET.log().repeat(1, 20_000, 1), SamplingOptions(), noise_for(torch.empty(1, 20_000, 5)))
    by_noise = float((draws == 0).float().mean())
    assert by_noise == pytest.approx(speculate(accept_or_resample, DRAFTERS["certain and likely"])[1], abs=0.015)


def test_the_temperature_follows_the_frames_drawn() -> None:
    layout = TokenLayout(20, 1, 2)
    logits, keys = torch.randn(2, 6, 20), sequence_keys(0, 2)
    positions = torch.tensor([[4, 5, 7, 8, 301, 302]]).expand(2, -1)
    first = torch.tensor([[1], [2]])
    drawn = Sampler(layout, SamplingOptions(temperature=0.9, frame_factor=0.5), keys, first_frames=first).draw(logits, positions)
    for row, start in enumerate((1, 2)):
        for column, position in enumerate(positions[row].tolist()):
            temperature = 0.9 * min(max(0.5 ** (position // 3 - start), 0.01), 100)
            alone = Sampler(layout, SamplingOptions(temperature=temperature), keys[row : row + 1])
            at = slice(column, column + 1)
            assert torch.equal(drawn[row : row + 1, at], alone.draw(logits[row : row + 1, at], positions[row : row + 1, at]))
    steady = Sampler(layout, SamplingOptions(temperature=0.9), keys).draw(logits, positions)
    assert not torch.equal(drawn, steady)


@pytest.mark.parametrize("factors", [(), (20, 30)], ids=["whole", "digits"])
@pytest.mark.parametrize("digits", ["slots", "parallel"])
@pytest.mark.parametrize(
    "options", [SamplingOptions(), SamplingOptions(2.0, top_k=9), SamplingOptions(top_p=0.7, min_p=0.01)], ids=str
)
def test_a_large_vocabulary_draws_what_a_small_one_would(factors, digits: str, options: SamplingOptions, monkeypatch) -> None:
    layout = TokenLayout(600, 2, 3, factors=factors, digits=digits)
    positions = torch.arange(1, 6).expand(3, -1)
    logits = torch.randn(3, 5, layout.num_logits, generator=torch.Generator().manual_seed(0)) * 2
    sampler, found, races = Sampler(layout, options, sequence_keys(1, 3)), [], []
    race = sampling.race
    monkeypatch.setattr(sampling, "race", lambda *arguments: races.append(race(*arguments)) or races[-1])
    for large in (1 << 20, 1):
        monkeypatch.setattr(sampling, "LARGE", large)
        found.append(sampler.draw(logits, positions))
    assert races and torch.equal(*found)
