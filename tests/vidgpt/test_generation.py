"""What transformers' generate may write: legal sequences alone, with the given leads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vidgpt.config import VidGPTConfig
from vidgpt.generation import LayoutLogitsProcessor
from vidgpt.layout import TokenLayout
from vidgpt.model import VidGPTForCausalLM


def grow(layout: TokenLayout, actions: Tensor | None, frames: int, rows: int) -> Tensor:
    """Write sequences slot by slot from random scores, as generate would."""
    processor, generator = LayoutLogitsProcessor(layout, actions), torch.Generator().manual_seed(0)
    ids = layout.leads(1, rows, None if actions is None else actions[:, :1])
    while ids.shape[1] < frames * layout.tokens_per_frame:
        scores = processor(ids, 3 * torch.randn(rows, layout.vocab_size + 3, generator=generator))
        ids = torch.cat([ids, torch.multinomial(scores.softmax(-1), 1, generator=generator)], dim=1)
    return ids


def test_the_layout_processor_lets_only_legal_sequences_be_written() -> None:
    layout = TokenLayout(codebook_size=6, height=2, width=3, num_actions=4)
    actions = torch.tensor([[0, 3, 1], [0, 2, 2]])
    ids = grow(layout, actions, frames=3, rows=2)
    assert torch.equal(layout.flatten(layout.unflatten(ids), actions), ids)


def test_the_layout_processor_allows_what_the_layout_says_may_stand_in_a_slot() -> None:
    layout = TokenLayout(codebook_size=12, height=2, width=3, num_actions=2, factors=(4, 3))
    positions = torch.arange(3 * layout.tokens_per_frame)
    ids = torch.zeros(1, len(positions), dtype=torch.long)
    pictures = positions[~layout.is_lead(positions)]
    scores = [LayoutLogitsProcessor(layout)(ids[:, :slot], torch.zeros(1, layout.vocab_size))[0] for slot in pictures.tolist()]
    assert torch.equal(torch.isfinite(torch.stack(scores)), layout.legal_ids(pictures))


def test_the_layout_processor_forces_separators_where_there_are_no_actions() -> None:
    layout = TokenLayout(codebook_size=6, height=2, width=3)
    ids = grow(layout, None, frames=3, rows=2)
    assert ids[:, :: layout.tokens_per_frame].tolist() == [[layout.bos_id, layout.separator_id, layout.separator_id]] * 2


def test_a_forced_lead_survives_any_score() -> None:
    layout = TokenLayout(codebook_size=6, height=2, width=3)
    ids = layout.flatten(torch.zeros(1, 1, 2, 3, dtype=torch.long))
    scores = LayoutLogitsProcessor(layout)(ids, torch.full((1, layout.vocab_size), float("-inf")))
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
