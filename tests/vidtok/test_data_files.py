"""Laws of data=files: every readable video is found, decoded once, split without overlap; the rest is named."""

from __future__ import annotations

import csv
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vidtok.data import ClipDataset, Episode, EpisodeSet, Reject, build_episodes, files, write_rejects
from vidtok.data.cache import FrameWriter, cache_key
from vidtok.data.episodes import hash_manifest
from vidtok.data.options import FilesOptions
from vidtok.video import resize_frames, write_png, write_video


def shades(count: int, height: int = 16, width: int = 16) -> np.ndarray:
    """Frames (count, height, width, 3) whose grey is 5 times their number."""
    return np.broadcast_to((np.arange(count) * 5).astype(np.uint8)[:, None, None, None], (count, height, width, 3)).copy()


def shade_numbers(frames: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 5) for frame in frames]


def build(root: Path, cache: Path, **options: Any) -> EpisodeSet:
    settings = {"name": "files", "root": str(root), "size": [16, 16], "cache_dir": str(cache)}
    return build_episodes(settings | options)


def by_source(episodes: list[Episode]) -> dict[str, Episode]:
    return {episode.source: episode for episode in episodes}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "my videos"
    folder.mkdir()
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_files_arrays_and_folders_of_images_are_found_at_any_depth(root: Path, cache: Path) -> None:
    write_video(root / "a=b c.mp4", shades(10), 25)
    (root / "deep" / "er").mkdir(parents=True)
    np.save(root / "deep" / "er" / "array.npy", shades(10))
    for name in ("left", "right"):
        for number, frame in enumerate(shades(10)):
            write_png(root / "shots" / name / f"{number}.png", frame)
    (root / "notes.txt").write_text("not a video")
    (root / ".hidden.mp4").write_text("not a video")
    found = build(root, cache, validation=0)
    assert [episode.source for episode in found.episodes] == ["a=b c.mp4", "deep/er/array.npy", "shots/left", "shots/right"]
    assert all(shade_numbers(episode.frames[0:10]) == list(range(10)) for episode in found.episodes)
    assert (found.height, found.width, found.fps, found.num_actions, found.rejects) == (16, 16, 25, 0, [])


@pytest.mark.parametrize("kind", ["file", "folder of images"])
def test_the_root_may_be_one_video(root: Path, cache: Path, kind: str) -> None:
    path = root / "clip.mp4" if kind == "file" else root / "clip"
    if kind == "file":
        write_video(path, shades(20), 25)
    else:
        for number, frame in enumerate(shades(20)):
            write_png(path / f"{number}.png", frame)
    found = build(path, cache)
    assert {episode.source for episode in found.episodes} == {path.name}
    assert [len(found.split(name)[0].frames) for name in ("train", "validation")] == [15, 5]


def test_few_files_give_their_ends_to_validation(root: Path, cache: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_video(root / name, shades(40), 20)
    found = build(root, cache, validation=0.25)
    train, validation = by_source(found.split("train")), by_source(found.split("validation"))
    assert set(train) == set(validation) == {"a.mp4", "b.mp4"}
    assert shade_numbers(train["a.mp4"].frames[0:99]) == list(range(30))
    assert shade_numbers(validation["a.mp4"].frames[0:99]) == list(range(30, 40))
    assert (train["a.mp4"].start, validation["a.mp4"].start) == (0, 1.5)


def test_many_files_are_held_out_whole_and_stay_on_their_side(root: Path, cache: Path) -> None:
    for number in range(12):
        np.save(root / f"clip{number}.npy", shades(4))
    before = build(root, cache, validation=0.2)
    train, validation = set(by_source(before.split("train"))), set(by_source(before.split("validation")))
    assert train and validation and not train & validation and len(train | validation) == 12
    np.save(root / "one more.npy", shades(4))
    after = build(root, cache, validation=0.2)
    assert train <= set(by_source(after.split("train"))) and validation <= set(by_source(after.split("validation")))
    assert before.manifest_hash != after.manifest_hash
    assert build(root, cache, validation=0).split("validation") == []


@pytest.mark.parametrize("validation", [1e-9, 0.999999])
def test_neither_side_of_a_split_is_ever_empty(root: Path, cache: Path, validation: float) -> None:
    for number in range(10):
        np.save(root / f"clip{number}.npy", shades(2))
    found = build(root, cache, validation=validation)
    assert found.split("train") and found.split("validation")


def test_the_rate_is_that_of_the_first_video_and_is_said(root: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(root / "a.mp4", shades(20), 10)
    write_video(root / "b.mp4", shades(40), 20)
    found = build(root, cache, validation=0)
    assert found.fps == 10
    assert shade_numbers(found.episodes[1].frames[0:99]) == list(range(0, 40, 2))
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "10 frames a second, the rate of a.mp4" in said
    assert shade_numbers(build(root, cache, validation=0, fps=5).episodes[0].frames[0:99]) == list(range(0, 20, 2))
    assert capsys.readouterr().out == ""


def test_the_rate_is_said_once_for_the_same_data_and_counts_the_files_whose_frames_it_repeats(
    root: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, fps in (("a.mp4", 20), ("b.mp4", 10), ("c.mp4", 30), ("d.mp4", 19.99)):
        write_video(root / name, shades(20), fps)
    for _ in range(3):
        found = build(root, cache, validation=0)
    assert shade_numbers(found.episodes[1].frames[0:6]) == [0, 0, 1, 1, 2, 2]
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "the rate of a.mp4" in said and said.endswith("; frames of 1 slower file are repeated\n")
    for _ in range(2):
        build(root, cache, validation=0, fps=25)
    assert capsys.readouterr().out == "data: frames of 3 slower files are repeated to make 25 a second, as data.fps says\n"
    write_video(tmp_path / "others" / "a.mp4", shades(5), 20)
    build(tmp_path / "others", cache, validation=0)
    assert capsys.readouterr().out.endswith("a.mp4, is used for all: data.fps sets another\n")


def test_stretched_frames_show_the_whole_picture_and_are_other_data_than_cropped_ones(root: Path, cache: Path) -> None:
    wide = np.random.default_rng(0).integers(0, 256, (3, 24, 40, 3)).astype(np.uint8)
    np.save(root / "a.npy", wide)
    cropped, stretched = (build(root, cache, validation=0, fps=25, stretch=stretch) for stretch in (False, True))
    assert (cropped.is_stretched, stretched.is_stretched) == (False, True)
    ours, theirs = (found.episodes[0].frames[0:3] for found in (stretched, cropped))
    pictures = [Image.fromarray(frame).resize((16, 16), Image.Resampling.BILINEAR) for frame in wide]
    assert np.abs(ours.astype(int) - np.stack([np.asarray(picture) for picture in pictures])).max() <= 1
    assert np.abs(ours.astype(int) - theirs).max() > 20
    np.testing.assert_array_equal(theirs, resize_frames(wide, (16, 16)))
    assert cropped.manifest_hash != stretched.manifest_hash
    assert build(root, cache, validation=0, fps=25).manifest_hash == cropped.manifest_hash


def test_cropped_frames_of_an_older_cache_are_found(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(root / "a.npy", shades(3))
    found = build(root, cache, validation=0, fps=25)
    source = files.find_sources(root.resolve(), None)[0]
    key = cache_key([str(source.path), source.state, 25, 16, 16])
    assert [path.name for path in cache.glob("files-*")] == [f"files-{key}.npy"]
    content = files._content(source, cache)
    assert found.manifest_hash == hash_manifest([[["a.npy", 0.0, 3, "train"]], 25, [16, 16], [content]])


def test_a_pattern_chooses(root: Path, cache: Path) -> None:
    for name in ("day 1.npy", "day 2.npy", "night.npy"):
        np.save(root / name, shades(3))
    found = build(root, cache, pattern="day*", validation=0)
    assert [episode.source for episode in found.episodes] == ["day 1.npy", "day 2.npy"]


def test_a_bad_file_becomes_a_reject_while_the_others_load(root: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.mp4", "b.mp4", "c.mp4", "d.mp4"):
        write_video(root / name, shades(10), 25)
    (root / "text.mp4").write_text("I am not a video\n" * 40)
    (root / "empty.avi").touch()
    (root / "gone.mp4").symlink_to(root / "nowhere.mp4")
    found = build(root, cache)
    assert {episode.source for episode in found.episodes} == {"a.mp4", "b.mp4", "c.mp4", "d.mp4"}
    assert [reject.source for reject in found.rejects] == ["empty.avi", "gone.mp4", "text.mp4"]
    assert "is empty (0 bytes)" in found.rejects[0].reason
    assert "3 of 7 files rejected: see rejects.csv\n" in capsys.readouterr().out


def test_a_file_that_breaks_midway_is_rejected_whole(root: Path, cache: Path) -> None:
    for name in ("a.mp4", "broken.avi"):
        write_video(root / name, np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3), np.uint8), 25)
    content = bytearray((root / "broken.avi").read_bytes())
    middle = content.index(b"mdat") + 2000
    content[middle : middle + 3000] = bytes(3000)
    (root / "broken.avi").write_bytes(content)
    found = build(root, cache)
    assert [reject.source for reject in found.rejects] == ["broken.avi"]
    assert sorted(path.suffix for path in cache.iterdir() if path.name.startswith("files-")) == [".npy"]


def test_too_many_bad_files_are_an_error(root: Path, cache: Path) -> None:
    np.save(root / "good.npy", shades(3))
    for number in range(3):
        (root / f"bad{number}.mp4").write_text("no")
    with pytest.raises(ValueError, match=r"3 of 4 files cannot be used, more than data\.max_rejected=0\.5 .*bad0\.mp4 cannot be"):
        build(root, cache)
    assert len(build(root, cache, max_rejected=0.8).rejects) == 3
    (root / "good.npy").unlink()
    with pytest.raises(ValueError, match=r"None of the 3 files can be used; the first: .*bad0\.mp4"):
        build(root, cache, max_rejected=1)


def test_a_folder_without_videos_says_what_is_there(root: Path, cache: Path) -> None:
    with pytest.raises(ValueError, match=r"my videos is empty"):
        build(root, cache)
    for number in range(12):
        (root / f"page{number:02d}.txt").touch()
    with pytest.raises(ValueError, match=r"No video found in .*: tried \.mp4, .* first ten of 12 .* page00\.txt, .* page09"):
        build(root, cache)
    with pytest.raises(ValueError, match=r"data\.root is .*nowhere, which does not exist"):
        build(root / "nowhere", cache)
    with pytest.raises(ValueError, match=r"data\.root is not given"):
        build_episodes({"name": "files"})


def test_a_second_build_does_not_decode(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(root / "a.mp4", shades(10), 25)
    first = build(root, cache)
    decoded: list[str] = []
    monkeypatch.setattr(files, "iter_frames", lambda path, **_: decoded.append(str(path)) or iter([]))
    monkeypatch.setattr(files, "probe", lambda path: decoded.append(str(path)))
    second = build(root, cache)
    assert decoded == []
    assert second == first


def test_a_changed_file_is_decoded_again(root: Path, cache: Path) -> None:
    np.save(root / "a.npy", shades(10))
    assert shade_numbers(build(root, cache, validation=0).episodes[0].frames[0:10]) == list(range(10))
    np.save(root / "a.npy", shades(12)[::-1])
    assert shade_numbers(build(root, cache, validation=0).episodes[0].frames[0:2]) == [11, 10]


def test_a_half_written_cache_entry_is_never_seen(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), FrameWriter(tmp_path / "entry.npy", (2, 2)) as writer:
        writer.append(np.zeros((2, 2, 3), np.uint8))
        assert not (tmp_path / "entry.npy").exists()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_the_cache_writer_agrees_with_numpy(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (123, 3, 5, 3), np.uint8)
    with FrameWriter(tmp_path / "entry.npy", (3, 5)) as writer:
        for frame in frames:
            writer.append(frame)
    assert np.array_equal(np.load(tmp_path / "entry.npy"), frames)


def test_a_cache_that_would_grow_too_large_is_refused(root: Path, cache: Path) -> None:
    np.save(root / "a.npy", shades(100))
    with pytest.raises(ValueError, match=r"about 7\.68e-05 GB and data\.cache_gb allows 1e-05: lower data\.size or"):
        build(root, cache, cache_gb=1e-5)


def test_clips_are_all_windows_in_range_with_their_frames(root: Path, cache: Path) -> None:
    np.save(root / "a.npy", shades(10))
    np.save(root / "b.npy", shades(3))
    np.save(root / "c.npy", shades(5) + 100)
    clips = ClipDataset(build(root, cache, validation=0).episodes, 4)
    assert len(clips) == (10 - 4 + 1) + (5 - 4 + 1)
    item = clips[6]
    assert item["video"].shape == (3, 4, 16, 16) and item["video"].dtype == torch.float32
    assert torch.equal(item["video"][0, :, 0, 0], torch.tensor([30, 35, 40, 45]) / 127.5 - 1)
    assert torch.equal(clips[7]["video"][0, :, 0, 0], torch.tensor([100, 105, 110, 115]) / 127.5 - 1)
    assert torch.equal(item["actions"], torch.zeros(4, dtype=torch.int64))
    assert torch.equal(clips[-1]["video"], clips[8]["video"])
    with pytest.raises(IndexError, match="Clip 9 was asked for: there are 9"):
        clips[9]


def test_clips_longer_than_every_episode_are_refused(root: Path, cache: Path) -> None:
    np.save(root / "a.npy", shades(10))
    episodes = build(root, cache, validation=0).episodes
    with pytest.raises(ValueError, match="needs 11 frames and the longest of 1 episodes has 10: ask for shorter clips"):
        ClipDataset(episodes, 11)
    with pytest.raises(ValueError, match="A clip of 0 frames"):
        ClipDataset(episodes, 0)


def test_a_pickled_dataset_is_small_and_equal(root: Path, cache: Path) -> None:
    np.save(root / "a.npy", shades(200))
    clips = ClipDataset(build(root, cache).split("train"), 4)
    pickled = pickle.dumps(clips)
    assert len(pickled) < 4000
    assert torch.equal(pickle.loads(pickled)[100]["video"], clips[100]["video"])


def test_rejects_are_written_as_csv(tmp_path: Path) -> None:
    rejects = [Reject("a, b.mp4", 'it says "no"'), Reject("c.mp4", "é")]
    write_rejects(tmp_path / "rejects.csv", rejects)
    with (tmp_path / "rejects.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows == [["source", "reason"], *([reject.source, reject.reason] for reject in rejects)]
    assert [path.name for path in tmp_path.iterdir()] == ["rejects.csv"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"size": [64]}, r"data\.size is \[64\]"),
        ({"size": [64, 0]}, r"data\.size is \[64, 0\]"),
        ({"fps": 0}, r"data\.fps is 0"),
        ({"validation": 1.0}, r"data\.validation is 1\.0"),
        ({"max_rejected": 2}, r"data\.max_rejected is 2"),
        ({"cache_gb": 0}, r"data\.cache_gb is 0"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        FilesOptions(root="x", **options)


def test_unknown_sources_options_and_splits_are_named(root: Path, cache: Path) -> None:
    with pytest.raises(ValueError, match="data source is 'film': it must be files, atari or digits"):
        build_episodes({"name": "film"})
    with pytest.raises(ValueError, match="data=files has no option 'rot': did you mean root"):
        build_episodes({"name": "files", "rot": "x"})
    np.save(root / "a.npy", shades(4))
    with pytest.raises(ValueError, match="split is 'test': it must be train or validation"):
        build(root, cache).split("test")


@pytest.mark.parametrize("kind", ["file", "folder of images"])
def test_the_manifest_follows_the_content_not_the_date(root: Path, cache: Path, kind: str) -> None:
    def write(shift: int) -> str:
        frames = np.random.default_rng(0).integers(0, 200, (8, 16, 16, 3), np.uint8) + np.uint8(shift)
        if kind == "file":
            np.save(root / "a.npy", frames)
        else:
            for number, frame in enumerate(frames):
                write_png(root / "a" / f"{number}.png", frame)
        return build(root, cache, validation=0, fps=5).manifest_hash

    first = write(0)
    for path in root.rglob("*.*"):
        os.utime(path, (1, 1))
    assert build(root, cache, validation=0, fps=5).manifest_hash == first
    assert write(1) != first
    assert write(0) == first


@pytest.mark.parametrize("place", [0, -1])
def test_a_large_file_is_known_by_both_its_ends(root: Path, cache: Path, place: int) -> None:
    frames = np.zeros((3, 700, 700, 3), np.uint8)  # more than both ends that are hashed
    np.save(root / "a.npy", frames)
    first = build(root, cache, validation=0, fps=5).manifest_hash
    frames[place, 0 if place == 0 else -1] = 9
    np.save(root / "a.npy", frames)
    assert build(root, cache, validation=0, fps=5).manifest_hash != first


def test_held_out_videos_of_a_folder_of_their_own_are_the_validation_split(root: Path, cache: Path, tmp_path: Path) -> None:
    other = tmp_path / "test"
    (root / "a").mkdir()
    other.mkdir()
    for path, count in ((root / "a" / "one.npy", 8), (root / "two.npy", 9), (other / "two.npy", 10), (other / "three.npy", 11)):
        np.save(path, shades(count))
    found = build(root, cache, validation_root=str(other))
    lengths = {split: sorted(len(episode.frames) for episode in found.split(split)) for split in ("train", "validation")}
    assert lengths == {"train": [8, 9], "validation": [10, 11]}
    assert len({episode.source for episode in found.episodes}) == 4
    assert build(root, cache).manifest_hash != found.manifest_hash
    for folder in (root / "a", root, tmp_path):
        with pytest.raises(ValueError, match="one lies in the other"):
            build(root, cache, validation_root=str(folder))
    with pytest.raises(ValueError, match=r"data.validation_root is .*nowhere, which does not exist"):
        build(root, cache, validation_root=str(tmp_path / "nowhere"))
    for path in other.iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"No file of one of data\.root and data\.validation_root can be used"):
        build(root, cache, validation_root=str(other))
