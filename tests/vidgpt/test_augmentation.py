"""What training does to the tokens that are read."""

import pytest
import torch

from vidgpt.augmentation import corrupt_tokens, drop_actions

DIGITS = [{}, {"factors": [4, 5]}, {"factors": [4, 5], "digits": "parallel"}]


@pytest.mark.parametrize("options", DIGITS, ids=str)
def test_corrupted_tokens_are_legal_and_as_many_as_asked_for(options: dict, make_model, make_ids) -> None:
    model = make_model(num_actions=3, **options)
    layout, input_ids = model.model.layout, make_ids(model, batch=200)
    torch.manual_seed(0)
    corrupted = corrupt_tokens(layout, input_ids, 1.0)
    is_lead = layout.is_lead(torch.arange(input_ids.shape[1]))
    assert torch.equal(corrupted[:, is_lead], input_ids[:, is_lead])
    # Raises for an id of another digit's slot; every id comes.
    found = layout.unflatten(corrupted)
    assert set(found.unique().tolist()) == set(range(20))
    some = corrupt_tokens(layout, input_ids, 0.25)
    values = 20 if layout.slots_per_place == 1 else 4.5
    share = (some != input_ids)[:, ~is_lead].float().mean()
    assert float(share) == pytest.approx(0.25 * (1 - 1 / values), abs=0.01)
    assert torch.equal(corrupt_tokens(layout, input_ids, 0.0), input_ids)


@pytest.mark.parametrize("options", DIGITS, ids=str)
def test_an_action_is_left_out_for_a_whole_clip_or_not_at_all(options: dict, make_model, make_ids) -> None:
    model = make_model(num_actions=3, **options)
    layout, input_ids = model.model.layout, make_ids(model, batch=400)
    torch.manual_seed(0)
    dropped = drop_actions(layout, input_ids, 0.25)
    is_lead = layout.is_lead(torch.arange(input_ids.shape[1]))
    assert torch.equal(dropped[:, ~is_lead], input_ids[:, ~is_lead])
    leads, before = dropped[:, is_lead], input_ids[:, is_lead]
    assert (leads[:, 0] == layout.bos_id).all()
    is_dropped = (leads[:, 1:] == layout.separator_id).all(dim=1)
    assert torch.equal(leads[~is_dropped], before[~is_dropped])
    assert float(is_dropped.float().mean()) == pytest.approx(0.25, abs=0.06)
    # No action has the separator's id, and its embedding is one of its own.
    assert not (before == layout.separator_id).any()
    assert not torch.equal(model.model.embed(dropped[is_dropped]), model.model.embed(input_ids[is_dropped]))


@pytest.mark.parametrize("change", [corrupt_tokens, drop_actions])
def test_draws_follow_from_the_seed_and_differ_from_step_to_step(change, make_model, make_ids) -> None:
    model = make_model(num_actions=3)
    layout, input_ids = model.model.layout, make_ids(model, batch=20)
    torch.manual_seed(1)
    first, second = change(layout, input_ids, 0.5), change(layout, input_ids, 0.5)
    torch.manual_seed(1)
    assert torch.equal(change(layout, input_ids, 0.5), first)
    assert not torch.equal(first, second)
