"""A context out of the middle of a video is encoded with the frames in front of it, as the rows that were trained on are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import randomised
from vidgpt.config import VidGPTConfig
from vidgpt.model import VidGPTForCausalLM
from vidgpt.options import PredictOptions
from vidgpt.prediction import predict_file
from vidtok.card import Card
from vidtok.config import VidTokConfig
from vidtok.folders import save_model
from vidtok.model import VidTokModel
from vidtok.video import to_frames, to_video

FRAMES = np.random.default_rng(0).integers(0, 256, (31, 16, 16, 3), dtype=np.uint8)
CASES = [{"stride_t": 2}, {"stride_t": 2, "temporal_encoder": False}, {"stride_t": 1, "temporal_encoder": True}]


def checkpoint(folder: Path, options: dict) -> VidTokModel:
    """Write a model folder with its card and tokenizer, all untrained; give the tokenizer."""
    torch.manual_seed(0)
    tokenizer = randomised(VidTokModel(VidTokConfig(**options, width=8, encoder_blocks=1, decoder_blocks=1)))
    save_model(tokenizer, folder / "tokenizer")
    sizes = {"codebook_size": tokenizer.codebook_size, "grid_height": 2, "grid_width": 2}
    gpt = VidGPTConfig(**sizes, window=9, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    save_model(VidGPTForCausalLM(gpt), folder)
    frame = {"stride_t": tokenizer.stride_t, "stride_s": 8, "fps": 25.0, "frame_height": 16, "frame_width": 16, "num_actions": 0}
    names = {"data_name": "files", "manifest_hash": "m", "encoder_fingerprint": tokenizer.encoder_fingerprint()}
    Card(tokenizer.fingerprint(), **sizes, **frame, **names).save(folder)
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
    whole = tokenizer.decode(torch.cat([tokenizer.encode(video)[:, :end], tokens["future"]], dim=1))[0]
    expected = to_frames(whole)[first + 5 : first + 9]
    shown = np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / "out" / "frames").glob("*.png"))])
    # The tokens in front are those of the whole video where they begin with it.
    assert np.abs(shown.astype(int) - expected).max() <= 1 or first > tokenizer.history_frames


def test_a_framewise_tokenizer_reads_no_more_than_the_context(tmp_path) -> None:
    assert checkpoint(tmp_path, {"stride_t": 1}).history_frames == 0
