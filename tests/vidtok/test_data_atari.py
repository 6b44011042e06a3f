"""Laws of data=atari: a pure function of its options, with actions that reproduce the frames."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("ale_py")

from vidtok.data import ClipDataset, EpisodeSet, atari, build_episodes
from vidtok.data.options import AtariOptions

SMALL = {"name": "atari", "episodes": 2, "validation_episodes": 1, "max_frames": 12, "size": [24, 20]}


def build(cache: Path, **options: Any) -> EpisodeSet:
    return build_episodes(SMALL | {"cache_dir": str(cache)} | options)


def frames_of(found: EpisodeSet) -> list[np.ndarray]:
    return [episode.frames[0:1000] for episode in found.episodes]


def test_the_set_is_described(tmp_path: Path) -> None:
    found = build(tmp_path)
    assert (found.name, found.height, found.width, found.fps, found.num_actions) == ("atari", 24, 20, 15.0, 3)
    assert [episode.source for episode in found.episodes] == [
        "freeway/episode-000", "freeway/episode-001", "freeway/validation-000"
    ]  # fmt: skip
    assert len(found.split("train")) == 2 and len(found.split("validation")) == 1
    for episode in found.episodes:
        assert episode.frames[0:1000].shape == (12, 24, 20, 3)
        assert episode.actions is not None
        assert episode.actions.dtype == np.int64 and episode.actions.shape == (12,)
        assert episode.actions[0] == 0 and 0 <= episode.actions.min() <= episode.actions.max() < 3


@pytest.mark.parametrize("game", ["freeway", "breakout"])
def test_the_same_seed_gives_the_same_and_another_seed_another(tmp_path: Path, game: str) -> None:
    first, again = build(tmp_path / "a", game=game), build(tmp_path / "b", game=game)
    other = build(tmp_path / "c", game=game, seed=1)
    for mine, same in zip(first.episodes, again.episodes, strict=True):
        assert np.array_equal(mine.frames[0:1000], same.frames[0:1000]) and np.array_equal(mine.actions, same.actions)
    assert first.manifest_hash == again.manifest_hash != other.manifest_hash
    assert not np.array_equal(first.episodes[0].actions, other.episodes[0].actions)
    assert not np.array_equal(frames_of(first)[0], frames_of(first)[1])


@pytest.mark.parametrize("game", ["freeway", "space_invaders"])
def test_replaying_the_recorded_actions_in_a_fresh_emulator_gives_the_same_frames(tmp_path: Path, game: str) -> None:
    from ale_py import ALEInterface, roms

    options = AtariOptions(game=game, episodes=3, validation_episodes=0, max_frames=40, size=[210, 160], cache_dir=str(tmp_path))
    episode = atari.build(options).episodes[2]
    assert episode.actions is not None
    idle = atari.choose_actions(options, "train", 2, 6)[1]
    emulator = ALEInterface()
    emulator.setFloat("repeat_action_probability", 0.0)
    emulator.setInt("random_seed", 0)
    emulator.loadROM(str(roms.get_rom_path(game)))
    for _ in range(idle):
        emulator.act(0)
    recorded = episode.frames[0:40]
    assert np.array_equal(recorded[0], emulator.getScreenRGB())
    for number, action in enumerate(episode.actions[1:], start=1):
        screens = []
        for _ in range(4):
            emulator.act(emulator.getMinimalActionSet()[action])
            screens.append(emulator.getScreenRGB())
        assert np.array_equal(recorded[number], np.maximum(screens[2], screens[3])), number


def test_actions_are_held_for_one_to_action_repeat_frames() -> None:
    options = AtariOptions(max_frames=2000, action_repeat=3)
    actions, idle = atari.choose_actions(options, "train", 0, 1000)
    runs = np.diff(np.flatnonzero(np.diff(actions, prepend=-1, append=-1)))
    assert actions.shape == (2000,) and 0 <= idle <= 30
    # Of 1000 actions, two equal ones in a row are rare; the first run is the still frame.
    assert np.quantile(runs[1:-1], 0.99) <= 3 and set(runs[1:-1]) >= {1, 2, 3}


def test_an_episode_ends_with_the_game(tmp_path: Path) -> None:
    found = build(tmp_path, game="breakout", max_frames=3000, episodes=1, validation_episodes=0, size=[8, 8])
    episode = found.episodes[0]
    assert episode.actions is not None
    assert 50 < len(episode.frames) < 3000 and len(episode.actions) == len(episode.frames)


def test_a_crop_is_the_part_of_the_screen(tmp_path: Path) -> None:
    whole = build(tmp_path, size=[210, 160])
    part = build(tmp_path, size=[100, 80], crop=[50, 150, 40, 120])
    assert np.array_equal(frames_of(part)[0], frames_of(whole)[0][:, 50:150, 40:120])
    with pytest.raises(ValueError, match=r"data\.crop is \[0, 400, 0, 160\], and the screen of freeway is 210x160"):
        build(tmp_path, crop=[0, 400, 0, 160])


def test_the_whole_screen_fits_the_frame_without_a_crop(tmp_path: Path) -> None:
    whole, small = build(tmp_path, size=[210, 160]), build(tmp_path, size=[42, 32])
    means = frames_of(whole)[0][0].reshape(42, 5, 32, 5, 3).mean((1, 3))
    assert np.abs(frames_of(small)[0][0] - means).mean() < 6


def test_more_episodes_keep_the_old_ones_and_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = build(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    more = build(tmp_path, episodes=3)
    assert len(list(tmp_path.iterdir())) == len(before) + 1
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert np.array_equal(frames_of(few)[2], frames_of(more)[3])
    monkeypatch.setattr(atari, "play", lambda *_: pytest.fail("played again"))
    assert [len(episode.frames) for episode in build(tmp_path).episodes] == [12, 12, 12]


def test_clips_carry_the_actions_of_their_frames_through_pickling(tmp_path: Path) -> None:
    found = build(tmp_path)
    clips = pickle.loads(pickle.dumps(ClipDataset(found.split("train"), 5)))
    assert len(clips) == 2 * (12 - 5 + 1)
    actions = found.episodes[1].actions
    assert actions is not None
    assert torch.equal(clips[8 + 3]["actions"], torch.from_numpy(actions[3:8]))


def test_the_emulator_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    build(tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"game": "brekout"}, "'brekout', which is not a game of ale-py: did you mean breakout"),
        ({"game": "zzzzzz"}, r"one of 10\d names"),
        ({"episodes": 0}, r"data\.episodes is 0: it must be 1 or more"),
        ({"frame_skip": 0}, r"data\.frame_skip is 0"),
        ({"seed": -1}, r"data\.seed is -1"),
        ({"crop": [5, 5, 0, 10]}, r"data\.crop is \[5, 5, 0, 10\]"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        AtariOptions(**options)


def test_a_game_that_cannot_be_played_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'combat', which ale-py holds but cannot play alone"):
        build(tmp_path, game="combat")


def test_a_missing_emulator_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ale_py" else find_spec(name))
    with pytest.raises(ValueError, match=r"data=atari needs ale-py, .*vidtok-vidgpt\[atari\]"):
        build(tmp_path)


def test_held_out_episodes_can_begin_after_the_training_ones() -> None:
    early, late = (AtariOptions(noop_max=5, validation_start=start) for start in (0, 2600))
    assert atari.choose_actions(late, "train", 1, 3)[1] == atari.choose_actions(early, "train", 1, 3)[1] <= 5
    assert atari.choose_actions(late, "validation", 1, 3)[1] == atari.choose_actions(early, "validation", 1, 3)[1] + 2600
