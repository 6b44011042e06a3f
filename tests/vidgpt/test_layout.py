import pytest
import torch

from vidgpt.layout import IGNORED, TokenLayout

LAYOUT = TokenLayout(codebook_size=10, height=2, width=3)
WITH_ACTIONS = TokenLayout(codebook_size=10, height=2, width=3, num_actions=4)
ACTIONS = torch.tensor([[0, 3, 1], [2, 2, 0]])


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
