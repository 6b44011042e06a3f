import pytest
import torch

from vidgpt.cache import SlotCache
from vidgpt.rollout import stream_tokens
from vidgpt.sampling import LayoutLogitsProcessor, SamplingOptions


def roll_out(model, context: torch.Tensor, future: int, **options) -> torch.Tensor:
    return torch.stack(list(stream_tokens(model, context, future, **options)), dim=1)


def grids(model, ids: torch.Tensor) -> torch.Tensor:
    return model.model.layout.unflatten(ids)


def random_actions(batch: int, frames: int) -> torch.Tensor:
    return torch.randint(0, 3, (batch, frames), generator=torch.Generator().manual_seed(3))


def random_grids(batch: int, frames: int) -> torch.Tensor:
    return torch.randint(0, 20, (batch, frames, 3, 2), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("with_actions", [False, True])
@pytest.mark.parametrize("context", [1, 3])
def test_greedy_decoding_equals_transformers_generate(with_actions, context, make_model) -> None:
    model = make_model(num_actions=3 if with_actions else 0)
    layout = model.model.layout
    given = random_grids(3, context)
    actions = random_actions(3, 5) if with_actions else None
    prompt = layout.flatten(given, None if actions is None else actions[:, :context])
    theirs = model.generate(
        prompt,
        max_new_tokens=(5 - context) * layout.tokens_per_frame,
        do_sample=False,
        logits_processor=[LayoutLogitsProcessor(layout, actions)],
    )
    ours = roll_out(model, given, 5 - context, actions=actions)
    assert torch.equal(ours, layout.unflatten(theirs)[:, context:])


def test_greedy_decoding_equals_decoding_without_a_cache(make_model, make_ids) -> None:
    model = make_model()
    layout = model.model.layout
    given = grids(model, make_ids(model, frames=2))
    ids = layout.flatten(given)
    for _ in range(3):
        ids = torch.cat([ids, torch.full((2, 1), layout.separator_id)], dim=1)
        for _ in range(layout.cells):
            ids = torch.cat([ids, model(ids).logits[:, -1:, : layout.codebook_size].argmax(-1)], dim=1)
    assert torch.equal(roll_out(model, given, 3), layout.unflatten(ids)[:, 2:])


def test_every_sampled_id_is_legal_even_when_the_model_wants_a_special(make_model) -> None:
    model = make_model(num_actions=3)
    with torch.no_grad():
        model.lm_head.weight[20:] *= 100
    given = random_grids(64, 1)
    sampled = roll_out(model, given, 4, options=SamplingOptions(temperature=2.0), actions=random_actions(64, 5))
    assert 0 <= int(sampled.min()) <= int(sampled.max()) < 20
    assert sampled.numel() == 64 * 4 * 6


def test_actions_are_given_exactly_where_the_model_was_trained_with_them(make_model) -> None:
    with pytest.raises(ValueError, match="trained with 3 actions, and none came"):
        roll_out(make_model(num_actions=3), random_grids(2, 2), 3)
    with pytest.raises(ValueError, match="trained without actions"):
        roll_out(make_model(), random_grids(2, 2), 3, actions=random_actions(2, 5))


def test_an_action_changes_the_frames_from_its_own_on(make_model) -> None:
    model, given, actions = make_model(num_actions=3), random_grids(4, 1), random_actions(4, 5)
    edited = actions.clone()
    edited[:, 3] = (edited[:, 3] + 1) % 3
    before, after = (roll_out(model, given, 4, actions=taken) for taken in (actions, edited))
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.equal(before[:, 2], after[:, 2])


def test_a_sample_depends_on_its_seed_and_number_alone(make_model, make_ids) -> None:
    model, options = make_model(), SamplingOptions(temperature=1.0)
    given = grids(model, make_ids(model, batch=4, frames=2))
    together = roll_out(model, given, 3, options=options, seed=7)
    alone = roll_out(model, given[2:3], 3, options=options, seed=7, first_sequence=2)
    assert torch.equal(together[2:3], alone)
    assert torch.equal(together, roll_out(model, given, 3, options=options, seed=7))
    assert not torch.equal(together, roll_out(model, given, 3, options=options, seed=8))


def test_samples_follow_the_models_distribution(make_model, make_ids) -> None:
    model = make_model(codebook_size=4, grid_height=1, grid_width=1, initializer_range=0.1)
    layout = model.model.layout
    given = grids(model, make_ids(model, batch=1, frames=1)).expand(4000, -1, -1, -1)
    sampled = roll_out(model, given, 1, options=SamplingOptions(), seed=1).flatten()
    ids = torch.cat([layout.flatten(given[:1]), torch.tensor([[layout.separator_id]])], dim=1)
    expected = model(ids).logits[0, -1, :4].softmax(-1) * 4000
    chi_square = ((torch.bincount(sampled, minlength=4) - expected).square() / expected).sum()
    assert float(chi_square.detach()) < 16.27  # 0.1 % point of 3 degrees of freedom


def test_frames_come_one_by_one_and_a_rollout_can_be_left(make_model, make_ids) -> None:
    model = make_model()
    given = grids(model, make_ids(model, frames=2))
    stream = stream_tokens(model, given, 3)
    first = next(stream)
    stream.close()
    assert torch.equal(first, roll_out(model, given, 3)[:, 0])


def test_a_frame_takes_one_forward_pass_a_token(make_model, make_ids, monkeypatch) -> None:
    model, passes = make_model(), []
    given = grids(model, make_ids(model, frames=2))
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: passes.append(1) or forward(*a, **k))
    roll_out(model, given, 3)
    assert len(passes) == 3 * 6


def test_generate_runs_on_our_cache(make_model, make_ids) -> None:
    model = make_model()
    prompt = make_ids(model, frames=2)
    with_ours = model.generate(prompt, max_new_tokens=9, do_sample=False, past_key_values=SlotCache(2, 35))
    assert torch.equal(with_ours, model.generate(prompt, max_new_tokens=9, do_sample=False, use_cache=False))


def test_generate_past_the_window_is_one_sentence(make_model, make_ids) -> None:
    model = make_model()
    prompt = make_ids(model, frames=4)
    # The last token needs no position of its own: it is never read.
    assert model.generate(prompt, max_new_tokens=8, do_sample=False).shape[1] == 36
    with pytest.raises(ValueError, match="position_ids from 35 to 35 do not fit the window of 5 frames"):
        model.generate(prompt, max_new_tokens=9, do_sample=False)


@pytest.mark.parametrize(("context", "future"), [(2, 4), (5, 1), (1, 0)])
def test_more_frames_than_the_window_are_refused(context, future, make_model, make_ids) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"window of 5 frames|1 or more"):
        roll_out(model, grids(model, make_ids(model, frames=context)), future)


def test_an_unknown_plan_is_refused(make_model, make_ids) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="'rasta' is not one of raster"):
        roll_out(model, grids(model, make_ids(model, frames=1)), 1, decoding="rasta")
