"""Training on what diagonal decoding sees: the same logits as in each of its passes."""

import pytest
import torch

from vidgpt.decoding import DecodingOptions
from vidgpt.diagonal_training import DiagonalBatch, diagonal_batch, is_diagonal_step
from vidgpt.layout import IGNORED
from vidgpt.masks import stand_in_age
from vidgpt.rollout import stream_tokens

DIGITS = [{}, {"factors": [4, 5]}, {"factors": [4, 5], "digits": "parallel"}, {"num_actions": 3}]
SIZES = {"grid_height": 3, "grid_width": 4}


def laid_out(model, input_ids: torch.Tensor, window: int, delay: int = 0) -> DiagonalBatch:
    labels = model.model.layout.labels(input_ids)
    return diagonal_batch(model.config, input_ids, labels, window, delay)


def logits_of(model, batch) -> torch.Tensor:
    return model(batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids).logits


@pytest.mark.parametrize("options", [*DIGITS, {"attention_frames": 2}], ids=str)
@pytest.mark.parametrize("has_delay", [False, True])
def test_a_window_of_a_row_is_ordinary_training(has_delay: bool, options: dict, make_model, make_ids) -> None:
    model = make_model(**SIZES, **options)
    input_ids, columns = make_ids(model), 4 * model.model.layout.slots_per_place
    labels = model.model.layout.labels(input_ids)
    expected = model(input_ids, labels=labels).loss
    for window in (columns, columns + 3):
        loss = model(**vars(laid_out(model, input_ids, window, 3 * columns if has_delay else 0))).loss
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    narrower = model(**vars(laid_out(model, input_ids, columns - 2, 2 * columns if has_delay else 0))).loss
    assert abs(float((narrower - expected).detach())) > 1e-3


@pytest.mark.parametrize("options", [*DIGITS, {"attention_frames": 2, "sink_frames": 1}], ids=str)
@pytest.mark.parametrize(("window", "delay"), [(1, 0), (2, 0), (3, 0), (1, 3), (2, 6)])
def test_training_sees_what_each_pass_of_decoding_sees(window, delay, options, make_model) -> None:
    model = make_model(**SIZES, **options)
    layout, generator = model.model.layout, torch.Generator().manual_seed(0)
    actions = torch.randint(0, 3, (2, 5), generator=generator) if layout.num_actions else None
    context = torch.randint(0, 20, (2, 1, 3, 4), generator=generator)
    plan = DecodingOptions("diagonal", window=window, delay=delay)
    frames = torch.stack(list(stream_tokens(model, context, 4, decoding=plan, actions=actions)), dim=1)
    input_ids = layout.flatten(torch.cat([context, frames], dim=1), actions)
    batch = laid_out(model, input_ids, window, delay)
    found = predicted(model, batch)
    assert sorted(found) == [place for place in range(len(input_ids[0])) if is_drawn(layout, place)]
    assert all(torch.equal(ids, input_ids[:, place]) for place, ids in found.items())
    # A stand-in that is another frame's token, and a mask without what is drawn yet, give other ids.
    batch.input_ids[:, : -input_ids.shape[1]] = input_ids[:, :1] if layout.is_parallel else 0
    assert not all(torch.equal(ids, input_ids[:, place]) for place, ids in predicted(model, batch).items())
    other = predicted(model, laid_out(model, input_ids, window + 1, delay))
    assert not all(torch.equal(ids, input_ids[:, place]) for place, ids in other.items())


def is_drawn(layout, place: int) -> bool:
    return place >= layout.tokens_per_frame and place % layout.tokens_per_frame != 0


def predicted(model, batch) -> dict[int, torch.Tensor]:
    """The likeliest id at each position behind the context frame, from the one query that predicts it."""
    layout, logits, found = model.model.layout, logits_of(model, batch), {}
    for query, label in enumerate(batch.labels[0, 1:]):
        place = int(batch.position_ids[0, query]) + 1
        if label == IGNORED or not is_drawn(layout, place):
            continue
        assert place not in found
        slot = place % layout.tokens_per_frame - 1
        digits = [scores.argmax(-1) for scores in layout.due_logits(logits[:, query], slot)]
        found[place] = layout.token(digits, slot)
    return found


def test_every_place_is_learned_once_and_row_starts_of_the_first_frame_are_not(make_model, make_ids) -> None:
    model = make_model(**SIZES)
    input_ids = make_ids(model)
    batch = laid_out(model, input_ids, 1)
    stand_ins = 4 * 2
    assert batch.input_ids.shape[1] == 5 * 13 + stand_ins
    assert batch.position_ids[0, :stand_ins].tolist() == [13 * frame + end for frame in range(1, 5) for end in (4, 8)]
    assert torch.equal(batch.input_ids[:, :stand_ins], input_ids[:, batch.position_ids[0, :stand_ins] - 13])
    assert torch.equal(batch.input_ids[:, stand_ins:], input_ids)
    targets = {}
    for query, label in enumerate(batch.labels[0, 1:].tolist()):
        if label != IGNORED:
            place = int(batch.position_ids[0, query]) + 1
            assert place not in targets and label == input_ids[0, place]
            targets[place] = query
    # The row starts of frame 0 stand at 5 and 9.
    assert sorted(targets) == [place for place in range(65) if place % 13 and place not in (5, 9)]
    assert [targets[13 + start] for start in (5, 9)] == [0, 1]


def test_a_stand_in_is_seen_by_itself_alone(make_model, make_ids) -> None:
    model = make_model(**SIZES).double()
    batch = laid_out(model, make_ids(model, batch=1), 1)
    before = logits_of(model, batch)
    batch.input_ids[:, 3] = (batch.input_ids[:, 3] + 1) % 20
    changed = (logits_of(model, batch) != before).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [3]
    batch.attention_mask[..., 3] = True
    assert not torch.equal(logits_of(model, batch)[:, 20:], before[:, 20:])


def test_the_windows_of_model_and_plan_hold_together(make_model, make_ids) -> None:
    model = make_model(**SIZES, attention_frames=2, num_hidden_layers=1)
    input_ids = make_ids(model)
    edited = input_ids.clone()
    edited[:, 1:13] = (edited[:, 1:13] + 7) % 20
    batches = [laid_out(model, ids, 1) for ids in (input_ids, edited)]
    change = (logits_of(model, batches[0]) - logits_of(model, batches[1])).abs().amax((0, 2))
    frame = batches[0].position_ids[0] // 13
    assert change[frame > 1].max() == 0
    # Frame 1 sees the edit, its stand-ins too.
    assert change[frame == 1].min() > 0


@pytest.mark.parametrize(("window", "delay", "expected"), [(1, 0, 1), (1, 3, 2), (2, 6, 1), (1, 1, 6), (7, 1, 1)])
def test_a_row_end_may_be_drawn_several_frames_ago_where_frames_overlap(window, delay, expected, make_model) -> None:
    # A row takes 7 passes, and the row below begins `window` behind it.
    layout = make_model(grid_height=3, grid_width=7).model.layout
    assert stand_in_age(layout, window, delay) == expected


def test_the_share_of_diagonal_steps_follows_from_seed_and_step() -> None:
    chosen = [is_diagonal_step(0, step, 0.3) for step in range(1000)]
    assert chosen == [is_diagonal_step(0, step, 0.3) for step in range(1000)]
    assert 250 < sum(chosen) < 350
    assert chosen != [is_diagonal_step(1, step, 0.3) for step in range(1000)]
    assert all(is_diagonal_step(0, step, 1.0) for step in range(100))
    assert not any(is_diagonal_step(0, step, 0.0) for step in range(100))
