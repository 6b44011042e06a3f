"""A context out of the middle of a video is encoded with the frames in front of it, as the rows that were trained on are."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import randomised
from vidgpt import showcase
from vidgpt.config import VidGPTConfig
from vidgpt.model import VidGPTForCausalLM
from vidgpt.options import PredictOptions
from vidgpt.pixels import evaluate_pixels
from vidgpt.prediction import predict_file
from vidgpt.rollout import Predictor
from vidgpt.sampling import SamplingOptions
from vidtok.card import Card
from vidtok.config import VidTokConfig
from vidtok.folders import save_model
from vidtok.model import VidTokModel
from vidtok.run.processes import in_precision
from vidtok.video import to_frames, to_video

FRAMES = np.random.default_rng(0).integers(0, 256, (31, 16, 16, 3), dtype=np.uint8)
CASES = [{"stride_t": 2}, {"stride_t": 2, "temporal_encoder": False}, {"stride_t": 1, "temporal_encoder": True}]


def checkpoint(folder: Path, options: dict, **card: Any) -> VidTokModel:
    """Write a model folder with its card, of one long row, and tokenizer, all untrained; give the tokenizer."""
    torch.manual_seed(0)
    tokenizer = randomised(VidTokModel(VidTokConfig(**options, width=8, encoder_blocks=1, decoder_blocks=1)))
    save_model(tokenizer, folder / "tokenizer")
    sizes = {"codebook_size": tokenizer.codebook_size, "grid_height": 2, "grid_width": 2}
    gpt = VidGPTConfig(**sizes, window=9, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    save_model(VidGPTForCausalLM(gpt), folder)
    frame = {"stride_t": tokenizer.stride_t, "stride_s": 8, "fps": 25.0, "frame_height": 16, "frame_width": 16, "num_actions": 0}
    names = {"data_name": "files", "manifest_hash": "m", "encoder_fingerprint": tokenizer.encoder_fingerprint()}
    Card(tokenizer.fingerprint(), **{**sizes, **frame, **names, "rows": 1, "frames": 31, **card}).save(folder)
    return tokenizer


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize(("start", "first"), [(None, 26), (0.72, 18), (0.08, 2), (0.0, 0)])
def test_a_context_has_the_tokens_of_its_place_in_the_whole_video(options: dict, start, first: int, tmp_path) -> None:
    tokenizer = checkpoint(tmp_path / "model", options)
    np.save(tmp_path / "film.npy", FRAMES)
    given: dict = {"checkpoint": str(tmp_path / "model"), "input": str(tmp_path / "film.npy"), "output": str(tmp_path / "out")}
    record = predict_file(PredictOptions(**given, context=5, future=4, start=start))
    assert record["context_first_frame"] == first
    tokens, stride = load_file(tmp_path / "out" / "tokens.safetensors"), tokenizer.stride_t
    video = to_video(FRAMES)[None]
    begin, end = first // stride, (first + 4) // stride + 1
    assert torch.equal(tokens["context"], tokenizer.encode(video)[:, begin:end])
    afresh = tokenizer.encode(video[:, :, first : first + 5])
    assert torch.equal(tokens["context"], afresh) == (first == 0)
    history = min(first, tokenizer.history_frames)
    assert record["history_frames"] == history
    assert (f"encoded with the {history} frames in front" in str(record["input_note"])) == (history > 0)
    assert ("history" in tokens) == (history > 0)
    written = torch.cat([tokens[name] for name in ("history", "context", "future") if name in tokens], dim=1)
    expected = to_frames(tokenizer.decode(written)[0])[history + 5 : history + 9]
    shown = np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / "out" / "frames").glob("*.png"))])
    assert np.abs(shown.astype(int) - expected).max() <= 1
    predictor, part = Predictor.from_pretrained(tmp_path / "model"), video[:, :, first - history : first + 5]
    predicted = predictor.predict(part, 4, options=SamplingOptions(), history=history)
    assert np.abs(to_frames(predicted[0]).astype(int) - shown).max() <= 1


@pytest.mark.parametrize("options", CASES, ids=str)
def test_the_pictures_are_those_of_the_whole_video_where_the_history_begins_with_it(options: dict, tmp_path) -> None:
    tokenizer, video, first = checkpoint(tmp_path, options), to_video(FRAMES)[None], 2
    predictor = Predictor.from_pretrained(tmp_path)
    predicted = predictor.predict(video[:, :, : first + 5], 4, history=first)
    given = tokenizer.encode(video[:, :, : first + 5])
    future = torch.stack(list(predictor.stream(given[:, first // tokenizer.stride_t :], predictor.latent_frames(4))), dim=1)
    whole = tokenizer.decode(torch.cat([given, future], dim=1))[:, :, first + 5 : first + 9]
    torch.testing.assert_close(predicted, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_a_model_of_row_starts_alone_gets_a_context_encoded_afresh(options: dict, tmp_path) -> None:
    window = 1 + 8 * options["stride_t"]
    tokenizer = checkpoint(tmp_path / "model", options, rows=2, frames=2 * window)
    np.save(tmp_path / "film.npy", FRAMES)
    given: dict = {"checkpoint": str(tmp_path / "model"), "input": str(tmp_path / "film.npy"), "output": str(tmp_path / "out")}
    assert predict_file(PredictOptions(**given, context=5, future=4))["history_frames"] == 0
    tokens = load_file(tmp_path / "out" / "tokens.safetensors")
    assert set(tokens) == {"context", "future"}
    assert torch.equal(tokens["context"], tokenizer.encode(to_video(FRAMES[26:])[None]))


def test_clips_with_a_history_are_predicted_and_measured_without_it(tmp_path) -> None:
    tokenizer, video = checkpoint(tmp_path, CASES[0]), to_video(FRAMES)[None, :, 10:]
    predictor, history = Predictor.from_pretrained(tmp_path), 4
    report = evaluate_pixels(predictor, video[:, :, : history + 9], 5, history=history)
    assert torch.equal(report.real, video[:, :, history : history + 9])
    predicted = predictor.predict(video[:, :, : history + 5], 4, history=history)
    torch.testing.assert_close(report.predicted[:, :, 5:], predicted.cpu(), atol=1e-5, rtol=0)
    ceiling = tokenizer.reconstruct(video[:, :, : history + 9])[:, :, history:]
    torch.testing.assert_close(report.ceiling, ceiling, atol=1e-5, rtol=0)
    assert len(report.psnr_db["prediction"]) == 4


@pytest.mark.parametrize(("frames", "history"), [(40, 4), (12, 2), (9, 0)])
def test_held_out_clips_bring_the_history_that_every_episode_has(frames: int, history: int, monkeypatch) -> None:
    def episode(length: int) -> SimpleNamespace:
        return SimpleNamespace(
            frames=np.arange(length, dtype=np.uint8).repeat(12).reshape(length, 2, 2, 3), actions=np.arange(length)
        )

    monkeypatch.setattr(showcase, "_held_out_episodes", lambda _: [episode(40), episode(frames)])
    asked: Any = SimpleNamespace(context=5, future=4, pixel_clips=6)
    video, actions = showcase.held_out_clips(asked, 4, 2)
    assert video.shape == (6, 3, history + 9, 2, 2) and actions.shape == (6, 9)
    for clip, taken in zip(video, actions, strict=True):
        assert to_frames(clip)[history:, 0, 0, 0].tolist() == taken.tolist()
        assert to_frames(clip)[:, 0, 0, 0].tolist() == list(range(int(taken[0]) - history, int(taken[-1]) + 1))


@pytest.mark.parametrize("history", [-2, 1, 8])
def test_an_impossible_history_is_refused(history: int, tmp_path) -> None:
    checkpoint(tmp_path, CASES[0])
    with pytest.raises(ValueError, match=f"history={history} of 7 frames: give fewer, 0 or a multiple of 2"):
        Predictor.from_pretrained(tmp_path).predict(to_video(FRAMES[:7])[None], 2, history=history)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_context_is_encoded_in_the_precision_of_the_card(precision: str, tmp_path) -> None:
    tokenizer, video = checkpoint(tmp_path, CASES[0], precision=precision), to_video(FRAMES)[None]
    predictor = Predictor.from_pretrained(tmp_path)
    tokenizer.to(predictor.device)
    with in_precision(precision, predictor.device):
        expected = tokenizer.encode(video.to(predictor.device))
    assert torch.equal(predictor.encode(video), expected)
    assert torch.equal(expected, tokenizer.encode(video.to(predictor.device))) == (precision == "fp32")


def test_a_framewise_tokenizer_reads_no_more_than_the_context(tmp_path) -> None:
    assert checkpoint(tmp_path, {"stride_t": 1}).history_frames == 0
