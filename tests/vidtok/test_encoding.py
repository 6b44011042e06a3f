"""Rows are cut alike in every start of an encoding, or the folder is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vidtok.card import Card
from vidtok.config import VidTokConfig
from vidtok.encoding import encode_dataset
from vidtok.folders import save_model
from vidtok.model import VidTokModel
from vidtok.options import EncodeOptions

DATA = {"name": "digits", "episodes": 3, "validation_episodes": 1, "frames": 12, "size": 32}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_model(VidTokModel(VidTokConfig(stride_t=1, width=8, encoder_blocks=1, decoder_blocks=1)), folder)
    return folder


def encode(tokenizer: Path, output: Path, **options: Any) -> Card:
    encode_dataset(EncodeOptions(checkpoint=str(tokenizer), output=str(output), **options), DATA)
    return Card.load(output)


@pytest.mark.parametrize(
    ("options", "expected"), [({}, (1024, 1024)), ({"clip_frames": 6}, (6, 6)), ({"clip_frames": 6, "clip_hop": 3}, (6, 3))]
)
def test_the_card_says_how_rows_were_cut(
    tokenizer: Path, tmp_path: Path, options: dict[str, int], expected: tuple[int, int]
) -> None:
    found = encode(tokenizer, tmp_path, **options)
    assert (found.clip_frames, found.clip_hop) == expected


@pytest.mark.parametrize("is_complete", [True, False])
@pytest.mark.parametrize(("change", "message"), [({"clip_frames": 4}, "clip_frames=6"), ({"clip_hop": 2}, "clip_hop=6")])
def test_an_encoding_goes_on_with_the_same_rows_only(
    tokenizer: Path, tmp_path: Path, is_complete: bool, change: dict[str, int], message: str
) -> None:
    found = encode(tokenizer, tmp_path, clip_frames=6)
    if not is_complete:
        found.begun().save(tmp_path)
    with pytest.raises(ValueError, match=rf"has {message}, but this command has .*: give another output folder"):
        encode(tokenizer, tmp_path, **{"clip_frames": 6, **change})
    assert encode(tokenizer, tmp_path, clip_frames=6, clip_hop=6) == found
