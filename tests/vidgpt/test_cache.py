import pytest
import torch

from vidgpt.cache import SlotCache


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
