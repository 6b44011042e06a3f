"""What vidgpt-predict prints and writes: as it is drawn, and refused where a key would change nothing."""

import json
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tests.vidgpt.conftest import contents, prediction_options, save_predictor, write_pictures
from vidgpt import prediction
from vidgpt.options import BenchOptions, DiagonalKeys, LongKeys, SamplingKeys
from vidgpt.predict import main
from vidgpt.prediction import predict_file
from vidgpt.rollout import Predictor
from vidtok.video import probe, read_frames, to_frames, write_video


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_predictor(tmp_path_factory.mktemp("checkpoint"))


def predict(checkpoint: Path, folder: Path, **keys: object) -> dict:
    """Predict from folder/in, by default four pictures, into folder/out, or another `output`."""
    if not (folder / "in").exists():
        write_pictures(folder / "in")
    return predict_file(prediction_options(checkpoint, folder / "in", folder / str(keys.pop("output", "out")), **keys))


def test_the_strip_shows_the_given_frames_as_they_came_and_as_the_model_knows_them(checkpoint, tmp_path, monkeypatch) -> None:
    drawn: list[tuple[dict[str, np.ndarray], int]] = []
    strip_image = prediction.strip_image
    monkeypatch.setattr(prediction, "strip_image", lambda rows, given: drawn.append((rows, given)) or strip_image(rows, given))
    monkeypatch.setattr(prediction, "SHOWN_FRAMES", 2)
    pictures = np.stack([np.full((16, 16, 3), 60 * index, np.uint8) for index in range(4)])
    write_video(tmp_path / "in", pictures, 10, is_lossless=True)
    predict(checkpoint, tmp_path, samples=2, start=0.0)
    (rows, given), predictor = drawn[0], Predictor.from_pretrained(checkpoint, device="cpu")
    assert list(rows) == ["real", "sample 0", "sample 1"] and given == 2
    np.testing.assert_array_equal(rows["real"], pictures)
    with safe_open(tmp_path / "out" / "tokens.safetensors", "pt") as kept:
        shown = predictor.decode(torch.cat([kept.get_tensor("context"), kept.get_tensor("future")], dim=1))
    for row, clip in zip(["sample 0", "sample 1"], shown, strict=True):
        np.testing.assert_allclose(rows[row], to_frames(clip)[:4], atol=1)
    # The tokenizer is untrained, so what it gives back is nothing like what came.
    assert np.abs(rows["sample 0"][:2].astype(int) - pictures[:2]).max() > 30
    frames = [read_frames(tmp_path / "out" / "frames" / f"frame_{index:04d}.png")[0] for index in range(3)]
    np.testing.assert_allclose(np.stack(frames), to_frames(shown[0])[2:], atol=1)
    # The film begins with what came; H.264 stores it with loss.
    film = read_frames(tmp_path / "out" / "prediction_01.mp4")
    assert len(film) == 5 and np.abs(film[:2].astype(int) - pictures[:2]).max() < 10


@pytest.mark.parametrize("stride_t", [1, 2])
def test_how_it_was_decoded_is_printed_and_recorded_in_latent_frames(stride_t: int, tmp_path, capsys) -> None:
    checkpoint = save_predictor(tmp_path / "checkpoint", stride_t)
    keys = {"context": 3, "future": 3 * stride_t, "seed": 7}
    record = predict(checkpoint, tmp_path, sampling=SamplingKeys(0.5, top_k=9), **keys)
    assert (record["latent_frames"], record["forward_passes_per_frame"]) == (3, 4.0)
    assert json.loads((tmp_path / "out" / "prediction.json").read_text()) == record
    speed = f"4.0 forward passes a latent frame, {record['frames_per_second']:.1f} frames/s\n"
    drawn = "temperature 0.5, seed 7"
    assert f"\ndecoding=raster, sampling.top_k=9, {drawn}: {speed}" in capsys.readouterr().out
    keys |= {"decoding": "diagonal", "diagonal": DiagonalKeys(delay=2), "sampling": SamplingKeys(0.0)}
    assert predict(checkpoint, tmp_path, **keys)["forward_passes_per_frame"] == (2 * 2 + 3) / 3
    assert "\ndecoding=diagonal, diagonal.delay=2, greedy: 2.3 forward passes a latent frame, " in capsys.readouterr().out


def watched(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[str]:
    """Note when a latent frame is drawn and when a picture is written; a Ctrl-C comes after so many latent frames."""
    events: list[str] = []
    stream, write = Predictor.stream, prediction.write_png

    def drawn(self: Predictor, *arguments: object, **keys: object) -> Iterator[torch.Tensor]:
        for number, frame in enumerate(stream(self, *arguments, **keys)):  # type: ignore[arg-type]
            if number == stop_after:
                raise KeyboardInterrupt
            events.append(f"drawn {number}")
            yield frame

    def written(path: Path, frame: np.ndarray) -> None:
        events.append(path.stem)
        write(path, frame)

    monkeypatch.setattr(Predictor, "stream", drawn)
    monkeypatch.setattr(prediction, "write_png", written)
    return events


def test_a_long_future_is_written_as_it_is_drawn_and_tells_how_far_it_is(checkpoint, tmp_path, monkeypatch, capsys) -> None:
    events = watched(monkeypatch)
    monkeypatch.setattr(prediction, "PROGRESS_SECONDS", 0)
    monkeypatch.setattr(prediction, "SHOWN_FRAMES", 5)
    predict(checkpoint, tmp_path, future=9, long=LongKeys("reprefill", 2))
    pairs = [(f"drawn {index}", f"frame_{index:04d}") for index in range(9)]
    assert events == [*chain.from_iterable(pairs), "strip"]
    said = capsys.readouterr().out
    assert re.findall(r"^(\d) of 9 latent frames, about \d+\.\d minutes to go$", said, re.MULTILINE) == list("12345678")
    assert "strip.png (its first 5 frames) and" in said
    assert probe(tmp_path / "out" / "prediction.mp4").frames == 11
    assert not list((tmp_path / "out").glob("unfinished-*"))


def test_an_interrupted_prediction_leaves_the_former_one_whole(checkpoint, tmp_path, monkeypatch, capsys) -> None:
    predict(checkpoint, tmp_path, seed=1)
    before = contents(tmp_path)
    events = watched(monkeypatch, stop_after=2)
    for output in ("out", "new"):
        with pytest.raises(KeyboardInterrupt):
            predict(checkpoint, tmp_path, output=output)
    assert "frame_0001" in events and contents(tmp_path) == before
    assert list((tmp_path / "out").glob("unfinished-*")) == list((tmp_path / "new").iterdir()) == []
    assert capsys.readouterr().out.count("stopped after 2 of 3 latent frames: none of them is kept") == 2


def test_compiling_is_announced(checkpoint, tmp_path, monkeypatch, capsys) -> None:
    def compiled(function: Callable) -> Callable:
        return lambda *arguments, **keys: print("compiled") or function(*arguments, **keys)

    monkeypatch.setattr(torch, "compile", compiled)
    predict(checkpoint, tmp_path, compile=True)
    said = capsys.readouterr().out
    assert said.index("compiling the transformer: about a minute") < said.index("compiled")
    assert "frames/s, compiling included\n" in said
    predict(checkpoint, tmp_path)
    assert "compiling" not in capsys.readouterr().out.replace(str(tmp_path), "")


def test_a_stream_that_is_left_open_needs_no_torch_to_end(checkpoint, monkeypatch) -> None:
    predictor, clip = Predictor.from_pretrained(checkpoint, device="cpu"), torch.zeros(1, 3, 2, 16, 16)
    streams = [predictor.stream_frames(clip, 3), predictor.stream(predictor.encode(clip), 3)]
    for stream in streams:
        assert not next(stream).requires_grad and torch.is_grad_enabled()

    def gone(*_: object) -> None:
        raise AttributeError("torch is gone, as when the interpreter ends")

    monkeypatch.setattr(torch.no_grad, "__init__", gone)
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("diagonal.window=2", "diagonal.window=2 is for decoding=diagonal, and decoding=raster came: choose that, or leave the"),
        ("decoding=speculative diagonal.delay=1", "diagonal.delay=1 is for decoding=diagonal, and decoding=speculative came"),
        ("decoding=diagonal speculative.draft=previous", "speculative.draft=previous is for decoding=speculative, and"),
        ("decoding=diagonal speculative.draft_length=3", "speculative.draft_length=3 is for decoding=speculative, and"),
        ("decoding=diagonal diagonal.window=0", "diagonal.window=0 is not allowed: give 1 or more"),
        (
            "sampling.temperature=0 sampling.frame_factor=0.9",
            "sampling.frame_factor=0.9 changes nothing at sampling.temperature=0",
        ),
        ("sampling.temperature=0 sampling.top_k=5", "sampling.top_k=5 changes nothing"),
        ("sampling.temperature=0 sampling.top_p=0.5", "sampling.top_p=0.5 changes nothing"),
        ("sampling.temperature=0 sampling.min_p=0.1", "sampling.min_p=0.1 changes nothing"),
        ("long.drop=2", "long.drop=2 is for long.mode=reprefill, and long.mode=stop came"),
    ],
)
def test_a_key_that_would_change_nothing_is_refused(given: str, sentence: str, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main([f"checkpoint={tmp_path}/no", f"input={tmp_path}/no", f"output={tmp_path}/out", *given.split()])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith(f"vidgpt-predict: {sentence}") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_key_at_its_default_and_a_key_of_the_plan_are_taken(tmp_path, capsys) -> None:
    for keys in ("decoding=raster diagonal.window=1 long.drop=0", "decoding=diagonal diagonal.window=2", "sampling.top_k=5"):
        with pytest.raises(SystemExit):
            main([f"checkpoint={tmp_path}/no", f"input={tmp_path}/no", f"output={tmp_path}/out", *keys.split()])
        assert "no does not exist" in capsys.readouterr().err


def test_a_bench_takes_the_keys_of_any_of_its_plans() -> None:
    BenchOptions(model={}, decoding=["raster", "diagonal"], diagonal=DiagonalKeys(window=2))
    with pytest.raises(ValueError, match=r"diagonal\.window=2 is for decoding=diagonal, and decoding=raster,speculative came"):
        BenchOptions(model={}, decoding=["raster", "speculative"], diagonal=DiagonalKeys(window=2))
