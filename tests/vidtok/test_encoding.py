"""Rows are cut alike in every start of an encoding, or the folder is refused; none straddles two encodings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import JanusVQVAE, JanusVQVAEConfig

from tests.conftest import randomised
from vidtok import encoding
from vidtok.card import Card
from vidtok.config import VidTokConfig
from vidtok.data import build_episodes
from vidtok.encoding import encode_dataset
from vidtok.folders import save_model
from vidtok.model import VidTokModel
from vidtok.options import EncodeOptions
from vidtok.tokenizer import load_tokenizer
from vidtok.tokens import TokenDataset
from vidtok.video import to_video

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


def test_the_card_says_how_frames_came_to_their_size_and_an_encoding_of_other_ones_does_not_go_on(
    tokenizer: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "wide.npy", np.random.default_rng(0).integers(0, 256, (6, 24, 40, 3)).astype(np.uint8))
    data = {"name": "files", "root": str(tmp_path / "wide.npy"), "size": [32, 32], "cache_dir": str(tmp_path / "cache")}
    for is_stretched in (False, True):
        options = EncodeOptions(checkpoint=str(tokenizer), output=str(tmp_path / f"tokens_{is_stretched}"))
        encode_dataset(options, {**data, "stretch": is_stretched})
        assert Card.load(options.output).is_stretched is is_stretched
    with pytest.raises(ValueError, match="has is_stretched=True, but this command has is_stretched=False"):
        encode_dataset(options, data)


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


SMALL = {"width": 8, "encoder_blocks": 1, "decoder_blocks": 1}


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of four frames a latent frame whose layers look back."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("causal")
    save_model(randomised(VidTokModel(VidTokConfig(stride_t=4, **SMALL))), folder)
    return folder


def rows_of(folder: Path, split: str = "train") -> list[torch.Tensor]:
    return [row[0] for row in TokenDataset(folder, split, 2).rows()]


@pytest.mark.parametrize("chunk_frames", [1, 5, 64])
def test_a_whole_episode_is_one_row_encoded_with_the_state_carried_on(causal: Path, tmp_path: Path, chunk_frames: int) -> None:
    card = encode(causal, tmp_path, chunk_frames=chunk_frames)
    assert card.clip_frames == card.clip_hop == 1 + 1023 * 4
    tokenizer, episodes = load_tokenizer(causal), build_episodes(DATA)
    for row, episode in zip(rows_of(tmp_path), episodes.split("train"), strict=True):
        # 12 frames: the last 3 are too few for another step of time.
        assert row.shape == (3, 4, 4)
        assert torch.equal(row, tokenizer.encode(to_video(episode.frames[0:9])[None])[0])
        afresh = tokenizer.encode(to_video(episode.frames[4:9])[None])[0]
        assert not torch.equal(row[1:], afresh)


def test_no_row_straddles_two_encodings(causal: Path, tmp_path: Path) -> None:
    encode(causal, tmp_path, clip_frames=5)
    tokenizer = load_tokenizer(causal)
    episode = build_episodes(DATA).split("train")[0]
    expected = [tokenizer.encode(to_video(episode.frames[at : at + 5])[None])[0] for at in (0, 5)]
    assert all(torch.equal(row, clip) for row, clip in zip(rows_of(tmp_path), expected, strict=False))


def test_frames_that_fit_no_stride_are_padded_with_one_note(
    causal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "odd.npy", np.random.default_rng(0).integers(0, 256, (9, 20, 30, 3), dtype=np.uint8))
    data = {"name": "files", "root": str(tmp_path / "odd.npy"), "size": [20, 30], "validation": 0.0}
    encode_dataset(
        EncodeOptions(checkpoint=str(causal), output=str(tmp_path / "tokens")), {**data, "cache_dir": str(tmp_path / "c")}
    )
    assert "frames of 20x30 are padded to 24x32, which tokens of 8x8 pixels need" in capsys.readouterr().out
    card = Card.load(tmp_path / "tokens")
    assert (card.frame_height, card.frame_width, card.grid_height, card.grid_width) == (20, 30, 3, 4)
    frames = to_video(np.load(tmp_path / "odd.npy"))[None]
    assert torch.equal(rows_of(tmp_path / "tokens")[0], load_tokenizer(causal).encode(frames)[0])


@pytest.mark.parametrize("lengths", [(60, 16, 12), (60, 60)])
def test_episodes_that_give_no_row_are_counted_with_the_keys_that_lengthen_them(
    causal: Path, tmp_path: Path, lengths: tuple[int, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "films").mkdir()
    for number, frames in enumerate(lengths):
        np.save(tmp_path / "films" / f"{number}.npy", np.zeros((frames, 16, 16, 3), np.uint8))
    data = {"name": "files", "root": str(tmp_path / "films"), "size": [16, 16], "cache_dir": str(tmp_path / "c")}
    encode_dataset(EncodeOptions(checkpoint=str(causal), output=str(tmp_path / "tokens")), data)
    printed = capsys.readouterr().out
    rows = Card.load(tmp_path / "tokens").splits
    # A quarter is held out: 4 and 3 frames are too few for 1 + 4.
    assert rows == {"train": len(lengths), "validation": sum(frames // 4 >= 5 for frames in lengths)}
    sentence = (
        "2 of 3 held-out episodes have fewer than 5 frames and are left out, because a row needs two latent frames of this tokenizer: "
        "give a larger data.validation or a higher data.fps\n"
    )
    assert (sentence in printed) == ("left out" in printed) == (len(lengths) == 3)


def test_a_tokenizer_that_cannot_carry_its_state_on_gets_short_rows(
    causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "encodes_in_pieces", lambda _: False)
    assert encode(causal, tmp_path).clip_frames == 1 + 16 * 4


def test_tiles_change_no_token(causal: Path, tmp_path: Path) -> None:
    assert encode(causal, tmp_path / "whole") == encode(causal, tmp_path / "tiles", tile=8, chunk_frames=5)
    for whole, tiles in zip(rows_of(tmp_path / "whole"), rows_of(tmp_path / "tiles"), strict=True):
        assert torch.equal(whole, tiles)


def test_the_card_says_which_precision_made_the_tokens(causal: Path, tmp_path: Path) -> None:
    assert encode(causal, tmp_path / "fp32").precision == "fp32"
    assert encode(causal, tmp_path / "bf16", precision="bf16").precision == "bf16"
    with pytest.raises(ValueError, match="has precision=bf16, but this command has precision=fp32: give another output folder"):
        encode(causal, tmp_path / "bf16")
    rows = [torch.stack(rows_of(tmp_path / name)) for name in ("fp32", "bf16")]
    assert 0.5 < (rows[0] == rows[1]).float().mean() < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp16"}, "precision=fp16 is not known: give auto, fp32 or bf16"),
        ({"tile": 0}, "tile=0 is not allowed"),
        ({"chunk_frames": 0}, "chunk_frames=0 is not allowed"),
    ],
)
def test_an_impossible_key_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncodeOptions(**options)


def test_a_tokenizer_without_tiles_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    sizes = {"embed_dim": 4, "latent_channels": 4, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}
    save_model(JanusVQVAE(JanusVQVAEConfig(num_embeddings=64, **sizes)), tmp_path / "janus")
    chosen = {"tokenizer": {"name": "janus", "path": str(tmp_path / "janus")}, "output": str(tmp_path / "tokens")}
    with pytest.raises(ValueError, match="tile=8 was asked for, and this tokenizer does not work in tiles: leave tile=null"):
        encode_dataset(EncodeOptions(**chosen, tile=8), DATA)
    assert not (tmp_path / "tokens").exists()


def test_a_tile_below_a_token_is_refused_before_anything_is_written(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tile=7 .* a tile needs 8 or more"):
        encode(tokenizer, tmp_path / "tokens", tile=7)
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize(("frames", "message"), [(4, "use 1 or 5 frames"), (7, "use 5 or 9 frames")])
def test_a_row_that_ends_inside_a_latent_frame_is_refused(causal: Path, tmp_path: Path, frames: int, message: str) -> None:
    with pytest.raises(ValueError, match=rf"clip_frames={frames} does not fit .*{message}"):
        encode(causal, tmp_path, clip_frames=frames)


def test_continuous_latents_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    save_model(VidTokModel(VidTokConfig(stride_t=1, quantizer="kl", **SMALL)), tmp_path / "kl")
    with pytest.raises(ValueError, match="continuous latents and no ids"):
        encode(tmp_path / "kl", tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()
