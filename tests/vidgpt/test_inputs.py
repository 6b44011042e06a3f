import json
from collections.abc import Iterator
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
import pytest
import torch

from vidgpt import inputs
from vidgpt.inputs import read_actions, read_context
from vidtok.card import Card
from vidtok.video import resize_frames, stretch_frames, to_frames


def card(**options: object) -> Card:
    values = {
        "tokenizer_fingerprint": "f",
        "codebook_size": 9,
        "grid_height": 2,
        "grid_width": 2,
        "stride_t": 1,
        "stride_s": 8,
        "fps": 25.0,
    }
    values |= {"frame_height": 16, "frame_width": 16, "num_actions": 0, "data_name": "files", "manifest_hash": "m"}
    return Card(**{**values, **options})


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    frames = np.zeros((20, 16, 16, 3), np.uint8) + np.arange(20, dtype=np.uint8)[:, None, None, None] * 10
    path = tmp_path / "a film=1, (2).npy"
    np.save(path, frames)
    return path


def brightness(video: torch.Tensor) -> list[int]:
    return [int(frame[0, 0, 0]) // 10 for frame in to_frames(video[0])]


def test_the_last_frames_are_the_context_by_default(numbered) -> None:
    context = read_context(numbered, card(), context=5, future=3)
    assert brightness(context.video) == [15, 16, 17, 18, 19]
    assert context.truth is None
    assert "frames 15..19" in context.note


def test_a_start_gives_the_truth_that_follows(numbered) -> None:
    context = read_context(numbered, card(), context=3, future=4, start=0.4)
    assert brightness(context.video) == [10, 11, 12]
    assert context.truth is not None
    assert brightness(context.truth) == [13, 14, 15, 16]


def test_the_truth_ends_where_the_future_asked_for_does(numbered) -> None:
    context = read_context(numbered, card(stride_t=4), context=8, future=8, start=0.0)
    assert brightness(context.video) == [0, 1, 2, 3, 4]
    assert context.truth is not None
    assert brightness(context.truth) == [5, 6, 7, 8, 9, 10, 11, 12]


def test_another_rate_is_resampled_and_said(numbered) -> None:
    context = read_context(numbered, card(fps=12.5), context=4, future=1)
    assert brightness(context.video) == [12, 14, 16, 18]
    assert "resampled from 25 to 12.5 fps" in context.note


def test_another_size_is_scaled_and_said(tmp_path) -> None:
    np.save(tmp_path / "wide.npy", np.zeros((3, 31, 57, 3), np.uint8))
    context = read_context(tmp_path / "wide.npy", card(), context=2, future=1)
    assert context.video.shape == (1, 3, 2, 16, 16)
    assert "from 31x57 to 16x16" in context.note


def test_a_model_of_stretched_frames_gets_its_input_stretched_and_says_so(tmp_path) -> None:
    wide = np.random.default_rng(0).integers(0, 256, (4, 31, 57, 3)).astype(np.uint8)
    np.save(tmp_path / "wide.npy", wide)
    for start in (None, 0.0):
        contexts = [
            read_context(tmp_path / "wide.npy", card(is_stretched=stretched), context=4, future=1, start=start)
            for stretched in (True, False)
        ]
        for context, fitted in zip(contexts, (stretch_frames, resize_frames), strict=True):
            np.testing.assert_array_equal(to_frames(context.video[0]), fitted(wide, (16, 16)))
        assert not torch.equal(contexts[0].video, contexts[1].video)
        assert "stretched from 31x57 to 16x16" in contexts[0].note and "cropped" not in contexts[0].note
        assert "scaled and centre-cropped from 31x57 to 16x16" in contexts[1].note


def test_a_temporal_stride_shortens_the_context_and_keeps_the_newest(numbered) -> None:
    context = read_context(numbered, card(stride_t=4), context=8, future=4)
    assert brightness(context.video) == [15, 16, 17, 18, 19]
    assert "5 of the 8 asked for" in context.note


def test_a_short_input_gives_what_it_has(tmp_path) -> None:
    np.save(tmp_path / "short.npy", np.zeros((3, 16, 16, 3), np.uint8))
    context = read_context(tmp_path / "short.npy", card(), context=8, future=4)
    assert context.video.shape[2] == 3
    assert "3 of the 8 asked for" in context.note


def test_bad_requests_are_refused(numbered) -> None:
    with pytest.raises(ValueError, match="context=0"):
        read_context(numbered, card(), context=0, future=1)
    with pytest.raises(ValueError, match=r"start|past|end"):
        read_context(numbered, card(), context=2, future=1, start=99.0)


def test_actions_are_read_from_several_formats_and_checked(tmp_path) -> None:
    np.save(tmp_path / "a.npy", np.array([0, 2, 1]))
    (tmp_path / "a.json").write_text(json.dumps([0, 2, 1]))
    (tmp_path / "a.csv").write_text("0,2\n1\n")
    for name in ("a.npy", "a.json", "a.csv"):
        assert read_actions(tmp_path / name, 3).tolist() == [[0, 2, 1]]
    with pytest.raises(ValueError, match="the model knows \\[0, 2\\)"):
        read_actions(tmp_path / "a.npy", 2)
    (tmp_path / "a.txt").write_text("jump")
    with pytest.raises(ValueError, match="not whole numbers"):
        read_actions(tmp_path / "a.txt", 2)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_actions(tmp_path / "none.npy", 2)


def test_a_first_latent_frame_of_several_frames_sets_where_a_context_may_end(numbered) -> None:
    context = read_context(numbered, card(stride_t=4, first_frames=4), context=11, future=4)
    assert brightness(context.video) == [12, 13, 14, 15, 16, 17, 18, 19]
    assert "8 of the 11 asked for (the tokenizer takes 4 + k * 4)" in context.note


@pytest.mark.parametrize(("start", "shown", "follows"), [(None, [16, 17, 18, 19], None), (0.4, [8, 9, 10, 11], [12, 13, 14])])
@pytest.mark.parametrize("history", [0, 4])
def test_a_context_below_the_first_latent_frame_takes_frames_in_front(numbered, start, shown, follows, history) -> None:
    context = read_context(numbered, card(stride_t=4, first_frames=4), context=2, future=3, start=start, history=history)
    assert brightness(context.video) == shown
    assert follows is None or brightness(context.truth) == follows
    assert context.first_frame == shown[0]
    assert f"context is frames {shown[0]}..{shown[-1]} " in context.note
    assert "2 more than asked for (the tokenizer takes 4 frames or more)" in context.note
    assert brightness(context.history) == list(range(shown[0] - history, shown[0]))
    assert ("encoded with the 4 frames in front" in context.note) == (history > 0)


@pytest.mark.parametrize(("start", "shown"), [(0.0, [0, 0, 0, 1]), (0.04, [0, 0, 1, 2])])
def test_where_none_are_in_front_the_first_frame_is_repeated(numbered, start, shown) -> None:
    context = read_context(numbered, card(stride_t=4, first_frames=4), context=2, future=3, start=start, history=4)
    assert brightness(context.video) == shown and not context.history.shape[2]
    assert brightness(context.truth) == [shown[-1] + 1, shown[-1] + 2, shown[-1] + 3]
    assert context.first_frame == 0 and f"frame 0 {shown.count(0) - 1} times more in front" in context.note


@pytest.mark.parametrize("start", [None, 0.4])
def test_frames_wait_at_the_size_of_the_card(numbered, start, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: WeakValueDictionary[int, np.ndarray] = WeakValueDictionary()
    most = 0

    def large(*_: object, **__: object) -> Iterator[np.ndarray]:
        nonlocal most
        for number in range(20):
            alive[number] = frame = np.zeros((64, 64, 3), np.uint8)
            yield frame
            del frame
            most = max(most, len(alive))

    monkeypatch.setattr(inputs, "iter_frames", large)
    assert read_context(numbered, card(), context=8, future=4, start=start).video.shape == (1, 3, 8, 16, 16)
    assert most <= 1
