"""The card: older ones still say what they said, newer ones what several codebooks and long first latent frames need."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from vidtok.card import Card, check_cards


def card(**changes: Any) -> Card:
    values: dict[str, Any] = {"tokenizer_fingerprint": "f", "codebook_size": 64, "grid_height": 2, "grid_width": 3}
    values |= {"stride_t": 4, "stride_s": 8, "fps": 10.0, "frame_height": 15, "frame_width": 22, "num_actions": 0}
    return Card(**{**values, "data_name": "toy", "manifest_hash": "abcd", **changes})


def rewrite(folder: Path, left_out: tuple[str, ...] = (), **changes: Any) -> None:
    values = json.loads((folder / "card.json").read_text())
    values = {key: value for key, value in {**values, **changes}.items() if key not in left_out}
    (folder / "card.json").write_text(json.dumps(values))


def test_an_old_card_is_read_as_one_codebook_whose_first_latent_frame_is_one_frame(tmp_path: Path) -> None:
    card().save(tmp_path)
    rewrite(tmp_path, ("first_frames", "codebook_factors", "clip_frames", "clip_hop", "encoder_fingerprint", "is_stretched"))
    old = Card.load(tmp_path)
    assert (old.first_frames, old.codebook_factors, old.is_stretched) == (1, [64], False)
    check_cards(old, "the old one", card(codebook_factors=[64]), "the new one")


@pytest.mark.parametrize(("change", "value"), [("first_frames", 4), ("codebook_factors", [8, 8]), ("is_stretched", True)])
def test_cards_that_differ_in_a_new_field_are_refused(change: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"one has {change}=.*, but other has {change}="):
        check_cards(card(), "one", card(**{change: value}), "other")


@pytest.mark.parametrize("first_frames", [1, 4])
@pytest.mark.parametrize("latent_frames", [1, 2, 7])
def test_frames_and_latent_frames_are_each_others_inverse(first_frames: int, latent_frames: int) -> None:
    sizes = card(first_frames=first_frames)
    frames = sizes.frames_of(latent_frames)
    assert frames == first_frames + 4 * (latent_frames - 1)
    assert [sizes.latent_frames_in(frames + more) for more in (-1, 0, 3, 4)] == [
        latent_frames - 1, latent_frames, latent_frames, latent_frames + 1
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook_factors": [8, 9]}, r"codebook_factors=\[8, 9\] do not multiply to codebook_size=64"),
        ({"codebook_factors": [8, True]}, "not of type"),
        ({"codebook_factors": [-8, -8]}, r"codebook_factors=\[-8, -8\] do not multiply to codebook_size=64"),
        ({"codebook_size": 0, "codebook_factors": [0]}, "codebook_size=0 must be 1 or more"),
        ({"codebook_factors": None}, "codebook_factors=None, which is not of type"),
        ({"first_frames": 0}, "first_frames=0 must be 1 or more"),
        ({"stride_s": 0}, "stride_s=0 must be 1 or more"),
        ({"num_actions": -1}, "num_actions=-1 must be 0 or more"),
        ({"rows": -3}, "rows=-3 must be 0 or more"),
        ({"splits": {"train": -3}}, r"splits={'train': -3} must count 0 rows or more"),
        ({"precision": "fp8"}, "precision=fp8 is none"),
        ({"is_stretched": 1}, "is_stretched=1, which is not of type bool"),
        ({"fps": 0}, "fps=0 is no number of frames a second above 0"),
        ({"fps": math.nan}, "fps=nan is no number"),
        ({"fps": math.inf}, "fps=inf is no number"),
        ({"grid_height": 3}, "grid_height=3 does not cover frame_height=15 in tokens of stride_s=8 pixels"),
        ({"frame_width": 25}, "grid_width=3 does not cover frame_width=25"),
    ],
)
def test_a_damaged_card_is_refused_with_its_path(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    card().save(tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"card\.json.* {message}"):
        Card.load(tmp_path)


def test_cards_of_two_decoders_for_the_same_tokens_agree() -> None:
    one = card(tokenizer_fingerprint="a", encoder_fingerprint="e")
    check_cards(one, "one", card(tokenizer_fingerprint="b", encoder_fingerprint="e"), "other")
    with pytest.raises(ValueError, match="encoder_fingerprint=e, but other has encoder_fingerprint=x"):
        check_cards(one, "one", card(tokenizer_fingerprint="b", encoder_fingerprint="x"), "other")
    # A card from before says nothing of the encoder: then the whole tokenizer must be the same.
    with pytest.raises(ValueError, match="tokenizer_fingerprint=a, but old has tokenizer_fingerprint=b"):
        check_cards(one, "one", card(tokenizer_fingerprint="b"), "old")
