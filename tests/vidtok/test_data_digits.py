"""Laws of data=digits: a pure function of (seed, split, index) that obeys the bounce."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vidtok.data import ClipDataset, build_episodes, digits
from vidtok.data.options import DigitsOptions

SMALL = {"name": "digits", "episodes": 5, "validation_episodes": 2}


def test_the_set_is_described() -> None:
    found = build_episodes(SMALL)
    assert (found.name, found.height, found.width, found.num_actions, found.rejects) == ("digits", 64, 64, 0, [])
    assert [len(found.split(name)) for name in ("train", "validation")] == [5, 2]
    frames = found.episodes[0].frames[0:20]
    assert frames.shape == (20, 64, 64, 3) and frames.dtype == np.uint8
    assert np.array_equal(frames[..., 0], frames[..., 1]) and np.array_equal(frames[..., 0], frames[..., 2])
    assert frames.max() > 200 and (frames == 0).mean() > 0.5


def test_an_episode_depends_on_seed_split_and_index_alone() -> None:
    few, many = build_episodes(SMALL), build_episodes(SMALL | {"episodes": 9, "validation_episodes": 4})
    other = build_episodes(SMALL | {"seed": 1})
    for mine, same in zip(few.split("train"), many.split("train"), strict=False):
        assert np.array_equal(mine.frames[0:20], same.frames[0:20])
    for mine, same in zip(few.split("validation"), many.split("validation"), strict=False):
        assert np.array_equal(mine.frames[0:20], same.frames[0:20])
    assert not np.array_equal(few.episodes[0].frames[0:20], other.episodes[0].frames[0:20])
    assert not np.array_equal(few.episodes[0].frames[0:20], few.episodes[1].frames[0:20])
    assert len({few.manifest_hash, many.manifest_hash, other.manifest_hash}) == 3
    assert few.manifest_hash == build_episodes(SMALL).manifest_hash


def test_a_window_is_cut_from_the_whole() -> None:
    frames = build_episodes(SMALL).episodes[3].frames
    assert len(frames) == 20
    assert np.array_equal(frames[7:13], frames[0:20][7:13])


@pytest.mark.parametrize("index", range(6))
def test_digits_keep_their_speed_until_a_wall_and_turn_back_there(index: int) -> None:
    options = DigitsOptions(frames=60, num_digits=3)
    places = digits.positions(options, "train", index)
    way = options.size - digits.DIGIT
    assert places.shape == (60, 3, 2) and places.min() >= 0 and places.max() <= way
    now, then = places[:-1], places[1:]
    speed = np.abs(then - now).max(0)
    assert np.allclose(np.hypot(speed[:, 0], speed[:, 1]), digits.SPEED * way)
    is_straight = np.isclose(np.abs(then - now), speed)
    # A mirrored step goes to the wall and back: the two distances from the wall add up to one step.
    is_mirrored = np.isclose(now + then, speed) | np.isclose(2 * way - now - then, speed)
    assert (is_straight | is_mirrored).all() and is_straight.mean() > 0.7
    turns = (np.sign(then - now)[1:] != np.sign(then - now)[:-1]) & is_straight[1:] & is_straight[:-1]
    at_wall = np.isclose(then[:-1], 0) | np.isclose(then[:-1], way)
    assert (at_wall | ~turns).all()


def test_one_digit_is_drawn_where_it_should_be() -> None:
    options = DigitsOptions(num_digits=1, episodes=1, validation_episodes=0)
    frames = digits.build(options).episodes[0].frames[0:20]
    corners = np.rint(digits.positions(options, "train", 0)[:, 0]).astype(int)
    crops = [frame[top : top + 28, left : left + 28] for frame, (top, left) in zip(frames, corners, strict=True)]
    assert all(np.array_equal(crop, crops[0]) for crop in crops)
    assert all(int(frame.sum()) == int(crops[0].sum()) for frame in frames)


def test_overlapping_digits_show_the_brighter_one() -> None:
    options = DigitsOptions(num_digits=2, size=28, frames=2)
    images = np.zeros((1, 28, 28), np.uint8)
    images[0, 3, 3] = 200
    frames = digits.DigitFrames(images, options, "train", 0)[0:2]
    assert frames.shape == (2, 28, 28, 3) and frames[0, 3, 3, 0] == 200 and frames.sum() == 2 * 3 * 200


def test_validation_draws_from_other_images() -> None:
    found = build_episodes(SMALL)
    banks = [found.split(name)[0].frames.images for name in ("train", "validation")]
    assert len(banks[0]) == 6400 and len(banks[1]) == 1600
    drawn = [{image.tobytes() for image in bank} for bank in banks]
    assert not drawn[0] & drawn[1]


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-images-idx3-ubyte.gz"])
def test_the_official_file_is_read(tmp_path: Path, name: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (10, 28, 28), np.uint8)
    content = b"".join(number.to_bytes(4, "big") for number in (2051, 10, 28, 28)) + images.tobytes()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert np.array_equal(digits.load_digits(tmp_path / name), images)
    found = build_episodes(SMALL | {"file": str(tmp_path / name)})
    assert found.episodes[0].frames[0:20].shape == (20, 64, 64, 3)


def test_ready_made_sequences_are_used_as_they_are(tmp_path: Path) -> None:
    sequences = np.random.default_rng(0).integers(0, 256, (20, 8, 64, 64), np.uint8)
    path = tmp_path / "mnist_test_seq.npy"
    np.save(path, sequences)
    found = build_episodes(SMALL | {"file": str(path)})
    assert np.array_equal(found.split("validation")[1].frames[3:9][..., 1], sequences[3:9, 6])
    with pytest.raises(ValueError, match=r"holds 8 sequences of 20 frames 64x64, and data asks for 9 of 20 frames"):
        build_episodes(SMALL | {"file": str(path), "episodes": 7})


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("digits.idx", b"\0" * 100, "is not a file of digits .*starts with 0 instead of 2051"),
        ("digits.gz", b"no", "is not a file of digits"),
        ("digits.npz", b"no", "is not a file of digits"),
        ("digits.npy", b"no", "cannot be read as sequences"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        build_episodes(SMALL | {"file": str(tmp_path / name)})
    with pytest.raises(ValueError, match="does not exist"):
        build_episodes(SMALL | {"file": str(tmp_path / "gone.npz")})


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"size": 20}, r"data\.size is 20: it must be 28 or more"), ({"num_digits": 0}, "num_digits"), ({"seed": -3}, "seed")],
)
def test_wrong_options_are_named(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        DigitsOptions(**options)


def test_clips_survive_pickling() -> None:
    clips = ClipDataset(build_episodes(SMALL).split("train"), 16)
    assert len(clips) == 5 * 5
    again = pickle.loads(pickle.dumps(clips))
    assert torch.equal(again[7]["video"], clips[7]["video"])
    assert clips[7]["video"].min() == -1 and clips[7]["video"].max() <= 1
