"""A model that sees the newest frames alone, on sequences longer than its window."""

import itertools

import pytest
import torch
from transformers import DynamicCache

from vidgpt.attention import rotate
from vidgpt.cache import SlotCache

WINDOWS = [{"attention_frames": 2}, {"attention_frames": 2, "sink_frames": 1}, {"attention_frames": 1}]
# Frames of 7 tokens, windows of 5 frames: 8 frames are past it.
SPLITS = [[56], [55, 1], [1, 55], [7] * 8, [14, 14, 28], [5, 1, 1, 20, 29], [1] * 56]


def with_other_frames(input_ids: torch.Tensor, frames: range) -> torch.Tensor:
    edited = input_ids.clone().unflatten(1, (-1, 7))
    edited[:, list(frames), 1:] = (edited[:, list(frames), 1:] + 7) % 20
    return edited.flatten(1)


def frames_that_change(model, input_ids: torch.Tensor, edited: torch.Tensor) -> list[int]:
    change = (model(input_ids).logits - model(edited).logits).abs().amax((0, 2)).unflatten(0, (-1, 7)).amax(1)
    return (change > 1e-5).nonzero().flatten().tolist()


@pytest.mark.parametrize("options", WINDOWS)
@pytest.mark.parametrize("split", SPLITS, ids=lambda split: str(split[:6]))
def test_cached_logits_equal_uncached_ones(options, split, make_model, make_ids) -> None:
    model = make_model(**options)
    input_ids = make_ids(model, frames=8)
    for cache in (SlotCache(2, 56), DynamicCache()):
        parts = [model(piece, past_key_values=cache, use_cache=True).logits for piece in input_ids.split(split, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(input_ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_in_one_layer_a_frame_outside_the_window_has_no_influence(frames: int, make_model, make_ids) -> None:
    model = make_model(num_hidden_layers=1, attention_frames=frames)
    input_ids = make_ids(model, frames=8)
    edited = with_other_frames(input_ids, range(3, 4))
    before, after = model(input_ids).logits, model(edited).logits
    # A query at the end of a frame is of that frame.
    assert torch.equal(before[:, (3 + frames) * 7 :], after[:, (3 + frames) * 7 :])
    assert frames_that_change(model, input_ids, edited) == list(range(3, 3 + frames))
    # The same weights without a window show what a lost mask would do.
    model.config.attention_frames = 0
    short, cut = input_ids[:, :35], edited[:, :35]
    assert frames_that_change(model, short, cut) == [3, 4]
    model.config.attention_frames, model.config.sink_frames = frames, 4
    assert frames_that_change(model, input_ids, edited) == [3, 4, 5, 6, 7]


@pytest.mark.parametrize(("depth", "frames"), [(2, 2), (3, 2), (2, 3)])
def test_what_a_frame_can_know_ends_with_depth_times_the_window(depth: int, frames: int, make_model, make_ids) -> None:
    model = make_model(num_hidden_layers=depth, attention_frames=frames)
    input_ids, newest, reach = make_ids(model, frames=8), 7, depth * (frames - 1)
    assert newest not in frames_that_change(model, input_ids, with_other_frames(input_ids, range(newest - reach)))
    assert newest in frames_that_change(model, input_ids, with_other_frames(input_ids, range(newest - reach + 1)))


@pytest.mark.parametrize("options", WINDOWS)
def test_a_left_padded_row_equals_the_row_alone(options, make_model, make_ids) -> None:
    model = make_model(**options)
    input_ids = make_ids(model, batch=2, frames=8)
    padded = torch.stack(
        [torch.cat([torch.zeros(5, dtype=torch.long), input_ids[0]]), torch.cat([input_ids[1], input_ids[1, 7:12]])]
    )
    mask, positions = torch.ones_like(padded), torch.arange(61).repeat(2, 1)
    mask[0, :5], positions[0] = 0, (positions[0] - 5).clamp(min=0)
    alone = torch.stack([model(input_ids[:1]).logits[0], model(padded[1:]).logits[0, :56]])
    for split in ([61], [3, 58], [20, 1, 40], [33] + [1] * 28):
        cache, logits, end = DynamicCache(), [], 0
        for ids, place in zip(padded.split(split, dim=1), positions.split(split, dim=1), strict=True):
            end += ids.shape[1]
            logits.append(
                model(ids, attention_mask=mask[:, :end], position_ids=place, past_key_values=cache, use_cache=True).logits
            )
        found = torch.cat(logits, dim=1)
        torch.testing.assert_close(torch.stack([found[0, 5:], found[1, :56]]), alone, atol=1e-5, rtol=0)


def test_a_sequence_is_read_alike_wherever_it_stands(make_model, make_ids) -> None:
    model = make_model(attention_frames=2).double()
    input_ids = make_ids(model, frames=4)
    near = model(input_ids).logits
    far = model(input_ids, position_ids=torch.arange(28) + 7 * 2**21).logits
    torch.testing.assert_close(near, far, atol=1e-5, rtol=0)


def test_phases_behind_the_table_go_on_as_it_does(make_model) -> None:
    rotary, generator = make_model().model.rotary, torch.Generator().manual_seed(0)
    for ours, theirs in zip(rotary(torch.arange(36)[None], is_beyond=True), rotary(torch.arange(36)[None]), strict=True):
        assert torch.equal(ours, theirs)
    query, key = torch.randn(2, 1, 1, 1, 12, generator=generator)

    def score(shift: int) -> torch.Tensor:
        phases = rotary(torch.tensor([[20, 9]]) + shift * 7, is_beyond=True)
        (at, other) = ([part[:, :, [i]] for part in phases] for i in range(2))
        return (rotate(query, at) * rotate(key, other)).sum()

    # A day of frames later, where angles in fp32 would be off by a quarter.
    for frames in (1, 1000, 2_592_000):
        torch.testing.assert_close(score(0), score(frames), atol=1e-5, rtol=0)


def test_generate_goes_on_past_the_window(make_model, make_ids) -> None:
    model = make_model(attention_frames=2)
    prompt = make_ids(model, batch=1, frames=4)
    expected = prompt
    while expected.shape[1] < 56:
        likeliest = model(expected).logits[:, -1, :20].argmax(-1, keepdim=True)
        is_lead = expected.shape[1] % 7 == 0
        expected = torch.cat([expected, torch.tensor([[model.model.layout.separator_id]]) if is_lead else likeliest], dim=1)
    assert torch.equal(model.generate(prompt, max_new_tokens=28, do_sample=False), expected)


def test_every_split_of_two_passes_sees_the_same(make_model, make_ids) -> None:
    model = make_model(attention_frames=2, sink_frames=1)
    input_ids = make_ids(model, batch=1, frames=6)
    whole = model(input_ids).logits
    for first, second in itertools.product(range(13, 17), range(1, 3)):
        cache = DynamicCache()
        model(input_ids[:, :first], past_key_values=cache, use_cache=True)
        logits = model(input_ids[:, first : first + second], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(logits, whole[:, first : first + second], atol=1e-5, rtol=0)
