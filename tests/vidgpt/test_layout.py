import math

import pytest
import torch

from vidgpt.layout import IGNORED, TokenLayout
from vidtok.digits import join_digits, split_digits

LAYOUT = TokenLayout(codebook_size=10, height=2, width=3)
WITH_ACTIONS = TokenLayout(codebook_size=10, height=2, width=3, num_actions=4)
ACTIONS = torch.tensor([[0, 3, 1], [2, 2, 0]])
MODES = [(digits, factors) for digits in ("slots", "parallel") for factors in ([5], [4, 3], [8, 8, 8])]


def indices(frames: int = 3) -> torch.Tensor:
    return torch.randint(0, 10, (2, frames, 2, 3), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("layout", "actions"), [(LAYOUT, None), (WITH_ACTIONS, ACTIONS)])
def test_a_grid_survives_the_way_into_a_sequence_and_back(layout: TokenLayout, actions: torch.Tensor | None) -> None:
    input_ids = layout.flatten(indices(), actions)
    assert input_ids.shape == (2, 3 * 7)
    assert torch.equal(layout.unflatten(input_ids), indices())


def test_a_frame_is_its_lead_and_then_its_rows() -> None:
    input_ids = WITH_ACTIONS.flatten(indices(), ACTIONS)
    assert input_ids[0, ::7].tolist() == [10, 12 + 3, 12 + 1]
    assert input_ids[0, 8:14].tolist() == indices()[0, 1].flatten().tolist()
    assert LAYOUT.flatten(indices())[0, ::7].tolist() == [10, 11, 11]
    assert (LAYOUT.vocab_size, WITH_ACTIONS.vocab_size) == (12, 16)


def test_coordinates_follow_the_raster() -> None:
    t, h, w = LAYOUT.coordinates(torch.arange(14))
    assert t.tolist() == [0] * 7 + [1] * 7
    assert h.tolist() == [0, 0, 0, 0, 1, 1, 1] * 2
    assert w.tolist() == [-1, 0, 1, 2, 0, 1, 2] * 2


def test_leads_are_not_learned() -> None:
    input_ids = LAYOUT.flatten(indices())
    labels = LAYOUT.labels(input_ids)
    assert (labels == IGNORED).nonzero()[:, 1].unique().tolist() == [0, 7, 14]
    assert torch.equal(labels[labels != IGNORED], input_ids[labels != IGNORED])


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (indices() + 5, "id 1[0-4] lies outside the codebook of 10"),
        (indices() - 1, "id -1 lies outside"),
        (indices()[..., :2], "do not fit \\(B, t, 2, 3\\)"),
    ],
)
def test_wrong_indices_are_refused(wrong: torch.Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        LAYOUT.flatten(wrong)


def test_wrong_actions_are_refused() -> None:
    with pytest.raises(ValueError, match="allowed is \\[0, 4\\)"):
        WITH_ACTIONS.flatten(indices(), torch.full((2, 3), 4))
    with pytest.raises(ValueError, match="one action a frame"):
        WITH_ACTIONS.flatten(indices(), torch.zeros(2, 2, dtype=torch.long))


def test_actions_come_exactly_where_the_model_was_trained_with_them() -> None:
    for refuse in (lambda: WITH_ACTIONS.flatten(indices()), lambda: WITH_ACTIONS.leads(3, 2)):
        with pytest.raises(ValueError, match="trained with 4 actions, and none came"):
            refuse()
    for refuse in (lambda: LAYOUT.flatten(indices(), ACTIONS), lambda: LAYOUT.leads(3, 2, ACTIONS)):
        with pytest.raises(ValueError, match="trained without actions"):
            refuse()


def test_a_special_id_in_a_picture_slot_is_refused_not_clamped() -> None:
    input_ids = LAYOUT.flatten(indices())
    input_ids[0, 3] = LAYOUT.separator_id
    with pytest.raises(ValueError, match="id 11 lies outside"):
        LAYOUT.unflatten(input_ids)
    with pytest.raises(ValueError, match="complete frames"):
        LAYOUT.unflatten(input_ids[:, :-1])


def layout_of(digits: str, factors: list[int], num_actions: int = 0) -> TokenLayout:
    return TokenLayout(math.prod(factors), 2, 3, num_actions, tuple(factors), digits)


def random_indices(layout: TokenLayout, batch: int = 2, frames: int = 4, seed: int = 0) -> torch.Tensor:
    shape = (batch, frames, layout.height, layout.width)
    return torch.randint(0, layout.codebook_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("digits", "factors"), MODES, ids=str)
@pytest.mark.parametrize("num_actions", [0, 3])
def test_ids_of_several_digits_survive_the_way_into_a_sequence_and_back(digits, factors, num_actions) -> None:
    layout = layout_of(digits, factors, num_actions)
    actions = torch.tensor([[0, 2, 1, 1], [1, 1, 0, 2]]) if num_actions else None
    input_ids = layout.flatten(random_indices(layout), actions)
    slots = 6 * (len(factors) if digits == "slots" else 1)
    assert input_ids.shape == (2, 4 * (slots + 1))
    assert torch.equal(layout.unflatten(input_ids), random_indices(layout))
    labels = layout.labels(input_ids)
    assert (labels == IGNORED).nonzero()[:, 1].unique().tolist() == [frame * (slots + 1) for frame in range(4)]
    assert torch.equal(labels[labels != IGNORED], input_ids[labels != IGNORED])
    specials = input_ids[:, :: slots + 1]
    assert int(specials.min()) > int(labels.max())
    assert actions is None or (specials[:, 1:] - layout.separator_id - 1).tolist() == actions[:, 1:].tolist()


@pytest.mark.parametrize("factors", [[5], [4, 3], [8, 8, 8], [2, 3, 5, 7], [1 << 20, 1 << 20, 1 << 21]], ids=str)
def test_digits_are_those_of_the_tokenizer(factors) -> None:
    layout = layout_of("parallel", factors)
    indices = random_indices(layout)
    assert torch.equal(layout.split(indices), split_digits(indices, factors))
    assert torch.equal(layout.join(layout.split(indices)), join_digits(split_digits(indices, factors), factors))
    assert torch.equal(layout.unflatten(layout.flatten(indices)), indices)


def test_digits_of_a_place_stand_side_by_side_coarsest_first_and_share_its_coordinates() -> None:
    layout = layout_of("slots", [4, 3])
    indices = random_indices(layout, frames=2)
    frame = layout.flatten(indices)[0, 13:]
    assert frame[0] == layout.separator_id == 8
    assert frame[1::2].tolist() == (indices[0, 1].flatten() % 4).tolist()
    assert frame[2::2].tolist() == (4 + indices[0, 1].flatten() // 4).tolist()
    t, h, w = layout.coordinates(torch.arange(26))
    assert t.tolist() == [0] * 13 + [1] * 13
    assert h.tolist() == [0, *[0] * 6, *[1] * 6] * 2
    assert w.tolist() == [-1, 0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2] * 2
    assert [layout.positions_of(slot, 1).tolist() for slot in (0, 1)] == [[1, 3, 5, 7, 9, 11], [2, 4, 6, 8, 10, 12]]


def test_one_digit_is_laid_out_as_ever_in_both_modes() -> None:
    plain, *others = TokenLayout(20, 2, 3, 2), layout_of("slots", [20], 2), layout_of("parallel", [20], 2)
    actions = torch.tensor([[0, 1, 1, 0]] * 2)
    for layout in others:
        assert torch.equal(layout.flatten(random_indices(layout), actions), plain.flatten(random_indices(plain), actions))
        assert (layout.vocab_size, layout.num_logits, layout.bos_id) == (24, 24, 20)


def test_ids_in_the_slot_of_another_digit_are_refused() -> None:
    layout = layout_of("slots", [4, 3])
    input_ids = layout.flatten(random_indices(layout))
    input_ids[0, 3] = 5
    with pytest.raises(ValueError, match="id 5 stands in a slot of digit 0, whose ids are 0 to 3"):
        layout.unflatten(input_ids)
    with pytest.raises(ValueError, match="id 12 lies outside the codebook of 12"):
        layout.flatten(torch.full((1, 1, 2, 3), 12))
    layout = layout_of("parallel", [4, 3])
    input_ids = layout.flatten(random_indices(layout))
    input_ids[0, 3] = layout.separator_id
    with pytest.raises(ValueError, match="id 13 lies outside the codebook of 12"):
        layout.unflatten(input_ids)


@pytest.mark.parametrize("factors", [[12], [4, 3], [2, 3, 2]], ids=str)
def test_legal_ids_are_those_that_stand_in_a_slot_and_no_others(factors) -> None:
    layout = layout_of("slots", factors, num_actions=3)
    # All values of the codebook at every place, one clip each.
    every = torch.arange(12)[:, None, None, None].expand(12, 2, 2, 3)
    input_ids = layout.flatten(every, torch.zeros(12, 2, dtype=torch.long))
    positions = torch.arange(input_ids.shape[1])
    stands = torch.zeros(len(positions), layout.vocab_size, dtype=torch.bool)
    stands[positions.expand(12, -1), input_ids] = True
    is_picture = ~layout.is_lead(positions)
    assert torch.equal(layout.legal_ids(positions[is_picture]), stands[is_picture])
    assert torch.equal(layout.legal_ids(positions[is_picture][None, 3:5]), stands[is_picture][None, 3:5])


@pytest.mark.parametrize(("digits", "factors"), MODES, ids=str)
def test_a_frame_is_read_back_from_its_picture_slots_alone(digits, factors) -> None:
    layout = layout_of(digits, factors)
    indices = random_indices(layout)
    frames = layout.flatten(indices).view(2, 4, layout.tokens_per_frame)
    for number in range(4):
        assert torch.equal(layout.frame(frames[:, number, 1:]), indices[:, number])
    with pytest.raises(RuntimeError, match=r"shape|size"):
        layout.frame(frames[:, 0])
