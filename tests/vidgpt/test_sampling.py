"""The sampler against arithmetic, and its laws: legality, independence of the batch, inputs left alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from vidgpt.config import VidGPTConfig
from vidgpt.layout import TokenLayout
from vidgpt.model import VidGPTForCausalLM
from vidgpt.sampling import LayoutLogitsProcessor, SamplingOptions, filter_logits, generators, sample

ODDS = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).log()
INFINITY = float("inf")


def distribution(options: SamplingOptions, legal: Tensor | None = None) -> list[float]:
    return filter_logits(ODDS[None], options, legal).softmax(-1)[0].tolist()


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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


def test_temperature_zero_is_argmax_and_draws_nothing() -> None:
    logits = random_logits(6, 50)
    assert torch.equal(sample(logits, SamplingOptions(temperature=0), []), logits.argmax(-1))
    assert filter_logits(logits, SamplingOptions(temperature=0)).softmax(-1).max(-1).values.tolist() == [1.0] * 6


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
        sample(logits, options, generators(0, 3), legal)
        assert torch.equal(logits, before)
        assert legal.sum() == 15


def test_half_precision_logits_are_filtered_in_fp32() -> None:
    assert filter_logits(random_logits(2, 9).bfloat16(), SamplingOptions(top_p=0.5)).dtype == torch.float32


def test_samples_follow_the_filtered_distribution() -> None:
    options = SamplingOptions(temperature=1.3, top_p=0.9)
    draws = 20_000
    ids = sample(ODDS.repeat(1, draws, 1), options, generators(3, 1))[0]
    expected = np.array(distribution(options))
    counts = np.bincount(ids.numpy(), minlength=5)
    kept = expected > 0
    chi_square = ((counts[kept] - draws * expected[kept]) ** 2 / (draws * expected[kept])).sum()
    assert kept.sum() == 4
    assert counts[~kept].sum() == 0
    assert chi_square < 16.27  # the 99.9 % quantile for 3 degrees of freedom


def test_ten_thousand_samples_of_random_logits_are_all_legal() -> None:
    legal = torch.arange(70) < 64
    logits = random_logits(10, 1000, 70)
    logits[..., 64:] += 20
    ids = sample(logits, SamplingOptions(top_k=30), generators(0, 10), legal)
    assert ids.shape == (10, 1000)
    assert int(ids.max()) < 64


def test_a_row_is_sampled_as_if_it_were_alone() -> None:
    logits = random_logits(5, 40)
    options = SamplingOptions(top_k=30)
    whole = sample(logits, options, generators(7, 5))
    alone = torch.cat([sample(logits[i : i + 1], options, generators(7, 1, first=i)) for i in range(5)])
    assert torch.equal(whole, alone)


def test_generators_differ_by_sequence_and_by_seed_and_repeat_exactly() -> None:
    draws = [torch.rand(4, generator=g) for g in generators(0, 3) + generators(1, 3)]
    again = [torch.rand(4, generator=g) for g in generators(0, 3) + generators(1, 3)]
    assert all(torch.equal(a, b) for a, b in zip(draws, again, strict=True))
    assert len({tuple(draw.tolist()) for draw in draws}) == 6


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
    ],
)
def test_options_outside_their_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"got {name} {value}"):
        SamplingOptions(**{name: value})


def test_a_missing_generator_is_refused() -> None:
    with pytest.raises(ValueError, match="1 generators for 2 sequences"):
        sample(random_logits(2, 5), SamplingOptions(), generators(0, 1))


def grow(layout: TokenLayout, actions: Tensor | None, frames: int, rows: int) -> Tensor:
    """Write sequences slot by slot from random scores, as generate would."""
    processor = LayoutLogitsProcessor(layout, actions)
    draws = generators(1, rows)
    ids = layout.leads(1, rows, None if actions is None else actions[:, :1])
    while ids.shape[1] < frames * layout.tokens_per_frame:
        scores = processor(ids, random_logits(rows, layout.vocab_size + 3, seed=ids.shape[1]))
        ids = torch.cat([ids, sample(scores, SamplingOptions(), draws)[:, None]], dim=1)
    return ids


def test_the_layout_processor_lets_only_legal_sequences_be_written() -> None:
    layout = TokenLayout(codebook_size=6, height=2, width=3, num_actions=4)
    actions = torch.tensor([[0, 3, 1], [0, 2, 2]])
    ids = grow(layout, actions, frames=3, rows=2)
    assert torch.equal(layout.flatten(layout.unflatten(ids), actions), ids)


def test_the_layout_processor_forces_separators_where_there_are_no_actions() -> None:
    layout = TokenLayout(codebook_size=6, height=2, width=3)
    ids = grow(layout, None, frames=3, rows=2)
    assert ids[:, :: layout.tokens_per_frame].tolist() == [[layout.bos_id, layout.separator_id, layout.separator_id]] * 2


def test_a_forced_lead_survives_any_score() -> None:
    layout = TokenLayout(codebook_size=6, height=2, width=3)
    ids = layout.flatten(torch.zeros(1, 1, 2, 3, dtype=torch.long))
    scores = LayoutLogitsProcessor(layout)(ids, torch.full((1, layout.vocab_size), -INFINITY))
    assert torch.isfinite(scores[0]).nonzero().flatten().tolist() == [layout.separator_id]


def test_samples_of_one_prompt_share_its_actions_and_missing_actions_are_refused() -> None:
    layout = TokenLayout(codebook_size=6, height=1, width=1, num_actions=4)
    actions = torch.tensor([[0, 3], [0, 2]])
    ids = layout.flatten(torch.zeros(4, 1, 1, 1, dtype=torch.long), torch.zeros(4, 1, dtype=torch.long))
    scores = LayoutLogitsProcessor(layout, actions)(ids, torch.zeros(4, layout.vocab_size))
    assert (scores.argmax(-1) - layout.codebook_size - 2).tolist() == [3, 3, 2, 2]
    with pytest.raises(ValueError, match="for frame 1 of 4 sequences"):
        LayoutLogitsProcessor(layout, actions[:, :1])(ids, scores)


def test_generate_of_transformers_writes_legal_sequences_with_the_given_actions() -> None:
    torch.manual_seed(0)
    config = VidGPTConfig(
        codebook_size=6,
        grid_height=2,
        grid_width=2,
        num_actions=3,
        window=4,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    model, layout = VidGPTForCausalLM(config).eval(), TokenLayout.from_config(config)
    actions = torch.tensor([[0, 2, 1, 0], [0, 1, 1, 2]])
    context = torch.randint(6, (2, 1, 2, 2))
    ids = model.generate(
        layout.flatten(context, actions[:, :1]),
        max_new_tokens=3 * layout.tokens_per_frame,
        do_sample=True,
        top_k=0,
        logits_processor=[LayoutLogitsProcessor(layout, actions)],
        pad_token_id=layout.separator_id,
        eos_token_id=None,
    )
    assert torch.equal(layout.flatten(layout.unflatten(ids), actions), ids)
    assert torch.equal(layout.unflatten(ids)[:, :1], context)
