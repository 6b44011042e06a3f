"""What a cache of one byte a number loses and saves."""

import torch
from torch import Tensor

from vidgpt.cache import SlotCache
from vidgpt.int8 import Int8Layer


def random_states() -> Tensor:
    """Make states whose tokens and heads differ a thousandfold in size."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 50, 32, generator=generator) * 10 ** (3 * torch.rand(2, 3, 50, 1, generator=generator))


def worst(states: Tensor, read: Tensor, axes: tuple[int, ...]) -> float:
    """Give the largest error in steps of a 127th of the largest number along `axes`."""
    return float(((read - states).abs() / (states.abs().amax(axes, keepdim=True) / 127)).max())


def test_a_number_is_off_by_half_a_step_of_its_own_token_and_head() -> None:
    states, cache = random_states(), SlotCache(1, 60, layer_class=Int8Layer)
    for begin, end in ((0, 40), (40, 50)):
        keys, values = cache.update(states[:, :, begin:end], -states[:, :, begin:end], 0)
    assert keys.dtype == states.dtype
    assert torch.equal(keys, -values)
    assert 0.4 < worst(states, keys, axes=(3,)) < 0.51
    # One step for all tokens of a head would be too coarse for the small ones.
    shared = states.abs().amax((2, 3), keepdim=True) / 127
    assert worst(states, (states / shared).round() * shared, axes=(3,)) > 10


def test_rows_written_by_position_are_stored_alike() -> None:
    states, positions = random_states()[:, :, :3], torch.tensor([[4, 0, 2], [1, 5, 3]])
    plain, small = SlotCache(1, 6), SlotCache(1, 6, layer_class=Int8Layer)
    for cache in (plain, small):
        with cache.writing(positions, 6):
            cache.update(states, states, 0)
    for rows in (positions, positions[:1]):
        with plain.writing(rows[:, :1], 6), small.writing(rows[:, :1], 6):
            (exact, _), (read, _) = (cache.update(-states[:, :, :1], states[:, :, :1], 0) for cache in (plain, small))
        # Slots never written are 0 in both.
        assert float((read - exact).abs().max() / exact.abs().max()) < 0.5 / 126
        assert torch.equal(read == 0, read.round(decimals=30) == 0)
        assert torch.equal((exact == 0).all(-1), (read == 0).all(-1))


def test_it_takes_half_the_memory_of_bf16() -> None:
    states, caches = random_states().bfloat16(), [SlotCache(1, 60), SlotCache(1, 60, layer_class=Int8Layer)]
    for cache in caches:
        cache.update(states, states, 0)
    assert caches[1].num_bytes == 2 * 2 * 3 * 60 * (32 + 2)
    assert caches[1].num_bytes < 0.54 * caches[0].num_bytes


def test_zero_and_huge_states_survive() -> None:
    states = torch.zeros(1, 1, 3, 8)
    states[0, 0, 1], states[0, 0, 2] = 1e30, 1e-37
    read, _ = SlotCache(1, 3, layer_class=Int8Layer).update(states, states, 0)
    assert torch.isfinite(read).all()
    assert read[0, 0, 0].tolist() == [0.0] * 8
    torch.testing.assert_close(read[0, 0, 1], states[0, 0, 1], rtol=0.01, atol=0)


def test_logits_move_little(make_model, make_ids) -> None:
    model = make_model()
    ids, cache = make_ids(model), SlotCache(2, 35, layer_class=Int8Layer)
    parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([20, 1, 14], dim=1)]
    whole = model(ids).logits
    moved = float(((torch.cat(parts, dim=1) - whole).abs().max() / whole.std()).detach())
    assert 0 < moved < 0.1
