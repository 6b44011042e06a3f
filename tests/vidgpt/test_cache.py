"""A cache that is appended to, with the network that reads it, and transformers' contract; test_cache_positions has the rest."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from vidgpt.cache import SlotCache
from vidgpt.masks import build_mask, causal


def test_reads_give_filled_slots_only() -> None:
    cache = SlotCache(num_layers=1, num_slots=8)
    first, second = torch.randn(2, 3, 3, 4), torch.randn(2, 3, 2, 4)
    cache.update(first, first, 0)
    keys, values = cache.update(second, -second, 0)
    assert torch.equal(keys, torch.cat([first, second], dim=2))
    assert torch.equal(values, torch.cat([first, -second], dim=2))
    assert cache.get_seq_length() == 5


def test_a_rewound_cache_forgets_what_came_after() -> None:
    cache = SlotCache(1, 8)
    states = torch.randn(1, 1, 6, 2)
    cache.update(states, states, 0)
    cache.rewind(2)
    keys, _ = cache.update(states[:, :, :1], states[:, :, :1], 0)
    assert torch.equal(keys, torch.cat([states[:, :, :2], states[:, :, :1]], dim=2))


def test_a_reset_cache_gives_what_a_new_one_gives(make_model, make_ids) -> None:
    model = make_model()
    used, other = SlotCache(2, 35), make_ids(model, seed=5)
    model(make_ids(model), past_key_values=used, use_cache=True)
    used.reset()
    fresh = model(other, past_key_values=SlotCache(2, 35), use_cache=True).logits
    assert torch.equal(model(other, past_key_values=used, use_cache=True).logits, fresh)


def test_slots_never_written_have_no_influence(make_model, make_ids) -> None:
    model, cache = make_model(), SlotCache(2, 35)
    input_ids = make_ids(model)
    model(input_ids[:, :7], past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        layer.keys[:, :, 7:] = float("nan")
        layer.values[:, :, 7:] = float("nan")
    logits = model(input_ids[:, 7:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(logits, model(input_ids).logits[:, 7:], atol=1e-5, rtol=0)


def test_a_full_cache_says_so() -> None:
    cache = SlotCache(1, 4)
    with pytest.raises(ValueError, match="4 slots and 5 are needed"):
        cache.update(torch.randn(1, 1, 5, 2), torch.randn(1, 1, 5, 2), 0)
    with pytest.raises(ValueError, match="cannot rewind to 3"):
        cache.rewind(3)


def test_memory_is_counted() -> None:
    cache = SlotCache(2, 10)
    for layer in range(2):
        cache.update(torch.zeros(1, 3, 1, 4), torch.zeros(1, 3, 1, 4), layer)
    assert cache.num_bytes == 2 * 2 * 10 * 3 * 4 * 4


def random_states(rows: int, count: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 3, count, 4, generator=torch.Generator().manual_seed(seed))


def fill(cache, states: Tensor) -> tuple[Tensor, Tensor]:
    """Append states to every layer; gives what the last one reads."""
    return [cache.update(states, -states, layer) for layer in range(len(cache.layers) or 2)][-1]


def test_an_appended_pass_that_fails_between_layers_did_not_happen() -> None:
    cache, states = SlotCache(3, 8), random_states(2, 6)
    fill(cache, states[:, :, :3])
    cache.update(states[:, :, 3:5], states[:, :, 3:5], 0)
    assert cache.get_seq_length() == 3
    assert [cache.get_mask_sizes(1, layer) for layer in range(3)] == [(4, 0)] * 3
    # The next pass begins where the failed one did, in every layer.
    for layer in range(3):
        keys, values = cache.update(states[:, :, 5:], -states[:, :, 5:], layer)
        assert torch.equal(keys, states[:, :, [0, 1, 2, 5]])
        assert torch.equal(values, -keys)


def test_what_was_appended_stays_when_positions_are_told_and_appending_is_over() -> None:
    cache, states = SlotCache(1, 8), random_states(2, 6)
    fill(cache, states[:, :, :4])
    cache.rewind(3)
    with cache.writing(torch.tensor([[5], [3]]), end=6) as in_slots:
        keys, _ = cache.update(states[:, :, 5:], states[:, :, 5:], 0)
    assert in_slots.tolist() == [[0, 1, 2, -1, -1, 5], [0, 1, 2, 3, -1, -1]]
    assert torch.equal(keys[0, :, [0, 1, 2, 5]], states[0, :, [0, 1, 2, 5]])
    assert torch.equal(keys[1, :, [0, 1, 2, 3]], states[1, :, [0, 1, 2, 5]])
    with pytest.raises(ValueError, match="told which positions it holds"):
        cache.update(states, states, 0)
    cache.reset()
    assert torch.equal(fill(cache, states)[0], states)


def test_a_pass_or_a_batch_that_does_not_fit_is_refused() -> None:
    cache = SlotCache(1, 4)
    with pytest.raises(ValueError, match="5 tokens in one pass exceed the 4 slots"), cache.writing(torch.arange(5)[None], 5):
        pass
    fill(cache, random_states(3, 2))
    with pytest.raises(ValueError, match="has 3 rows and 1 came"):
        fill(cache, random_states(1, 1))


def test_a_clip_leaves_nothing_behind_not_even_nan() -> None:
    query, clip, positions = random_states(2, 1, seed=1), random_states(2, 5), torch.tensor([[0, 1, 2, 5, 6], [2, 3, 4, 0, 7]])

    def attend(cache: SlotCache) -> Tensor:
        with cache.writing(positions, end=8) as in_slots:
            keys, values = cache.update(clip, -clip, 0)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=(in_slots >= 0)[:, None, None])

    used = SlotCache(1, 8)
    fill(used, torch.full((2, 3, 8, 4), float("nan")))
    used.reset()
    assert torch.equal(attend(used), attend(SlotCache(1, 8)))
    # Why the memory is cleared: a masked NaN is one still.
    used.layers[0].values[:, :, 4] = float("nan")
    assert attend(used).isnan().any()


def read_at(model, ids: Tensor, positions: Tensor, cache: SlotCache, end: int) -> Tensor:
    """Read ids (B, n) at positions (B, n), each seeing what stands at or before it."""
    with cache.writing(positions, end) as in_slots:
        mask = build_mask(causal, positions, in_slots) & (in_slots >= 0)[:, None, None]
        return model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("is_reset", [False, True])
def test_rows_that_read_at_different_places_give_what_reading_at_once_gives(is_reset, make_model, make_ids) -> None:
    model, cache = make_model(), SlotCache(2, 35)
    ids = make_ids(model, batch=3)
    whole = model(ids).logits
    generator = torch.Generator().manual_seed(0)
    model(make_ids(model, batch=3, seed=9), past_key_values=cache, use_cache=True)
    # Without it, tokens of another clip stand behind what is read, where causality hides them.
    if is_reset:
        cache.reset()
    done, logits = torch.tensor([0, 3, 5]), torch.zeros_like(whole)
    read_at(model, ids[:, :5], torch.arange(5)[None].expand(3, -1), cache, 5)
    for row, length in enumerate(done.tolist()):
        logits[row, :length] = whole[row, :length]
    while int(done.min()) < 35:
        start = done.clamp(max=32)[:, None]
        positions = start + torch.arange(3)
        # Guesses first, then the ids themselves over them: what is overwritten leaves no trace.
        guesses = torch.randint(0, 20, (3, 3), generator=generator)
        read_at(model, guesses, positions, cache, 35)
        found = read_at(model, ids.gather(1, positions), positions, cache, 35)
        logits.scatter_(1, positions[..., None].expand_as(found), found)
        done = torch.minimum(done + 1 + torch.arange(3), torch.tensor(35))
    torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_told", [False, True])
@pytest.mark.parametrize("first_in_bf16", [False, True])
def test_a_cache_may_be_allocated_under_autocast_and_written_without(first_in_bf16, is_told, make_model, make_ids) -> None:
    model, cache = make_model(initializer_range=0.05), SlotCache(2, 35)
    ids, logits = make_ids(model), []
    for number, (begin, end) in enumerate([(0, 14), (14, 15), (15, 35)]):
        is_bf16 = (number == 0) == first_in_bf16
        with torch.autocast("cpu", torch.bfloat16) if is_bf16 else nullcontext(), torch.no_grad():
            if is_told:
                positions = torch.arange(begin, end).expand(2 if number else 1, -1)
                logits.append(read_at(model, ids[:, begin:end], positions, cache, end))
            else:
                logits.append(model(ids[:, begin:end], past_key_values=cache, use_cache=True).logits)
    assert cache.layers[1].keys.dtype == (torch.bfloat16 if first_in_bf16 else torch.float32)
    assert cache.num_bytes == 2 * 2 * 2 * 35 * 48 * (2 if first_in_bf16 else 4)
    whole = model(ids).logits.detach()
    assert float((torch.cat([part.float() for part in logits], dim=1) - whole).abs().max()) < 0.05 * float(whole.std())


def test_rows_are_repeated_and_selected_as_transformers_does() -> None:
    states, more, rows = random_states(3, 4), random_states(6, 2, seed=1), torch.tensor([2, 0, 0, 1])
    ours, theirs = SlotCache(2, 9), DynamicCache()
    for cache in (ours, theirs):
        fill(cache, states)
        cache.batch_repeat_interleave(2)
    for ours_read, theirs_read in zip(fill(ours, more), fill(theirs, more), strict=True):
        assert torch.equal(ours_read, theirs_read)
    for select in ("reorder_cache", "batch_select_indices"):
        for cache in (ours, theirs):
            getattr(cache, select)(rows)
            cache.crop(-1)
        for ours_read, theirs_read in zip(fill(ours, more[:4, :, :1]), fill(theirs, more[:4, :, :1]), strict=True):
            assert torch.equal(ours_read, theirs_read)
        assert ours.get_seq_length() == theirs.get_seq_length() == 6
        assert ours.get_mask_sizes(3, 1) == theirs.get_mask_sizes(3, 1) == (9, 0)
    assert ours.is_croppable
    ours.crop(-2)
    assert ours.get_seq_length() == 4


@pytest.mark.parametrize(
    "search", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str
)
def test_generate_gives_on_our_cache_what_it_gives_on_its_own(search, make_model, make_ids) -> None:
    model = make_model()
    prompt = make_ids(model, frames=2, batch=1)
    found = []
    for cache in (SlotCache(2, 35), DynamicCache()):
        torch.manual_seed(0)
        found.append(model.generate(prompt, max_new_tokens=12, past_key_values=cache, **{"do_sample": False, **search}))
    assert torch.equal(*found)
    assert found[0].shape[1] == 26
