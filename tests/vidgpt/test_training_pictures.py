"""The picture of a training transformer shows what it would have drawn, and the training command keeps it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vidgpt.config import VidGPTConfig
from vidgpt.model import VidGPTForCausalLM
from vidgpt.regimes import teacher_forced_scores
from vidgpt.train import main as train_gpt
from vidgpt.training_pictures import MOST_FRAMES, drawing, likeliest_tokens, load_decoder
from vidtok.card import Card
from vidtok.config import VidTokConfig
from vidtok.folders import load_model, save_model
from vidtok.model import VidTokModel
from vidtok.tokens import TokenDataset, TokenRow, TokenWriter
from vidtok.video import to_frames

RUN = ["max_steps=3", "batch_size=2", "warmup_steps=1", "checkpoint_every=2", "evaluate_every=2", "evaluation_clips=2"]
MODEL = ["model.hidden_size=32", "model.num_hidden_layers=1", "model.num_attention_heads=2"]
FRAMES = 10


def small_model(factors: list[int], digits: str) -> VidGPTForCausalLM:
    """Give a model whose every weight counts: a fresh one leaves its branches out."""
    torch.manual_seed(0)
    config = VidGPTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, grid_height=2, grid_width=3, window=FRAMES,
        codebook_size=int(np.prod(factors)), factors=factors, digits=digits,
    )  # fmt: skip
    model = VidGPTForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.mark.parametrize(("factors", "digits"), [([16], "slots"), ([4, 4], "slots"), ([4, 4], "parallel")])
def test_the_likeliest_tokens_are_those_the_scores_count_as_hits(factors: list[int], digits: str) -> None:
    model = small_model(factors, digits)
    layout = model.model.layout
    # The true tokens are made the model's own first choice at half of the places, so that there are hits and misses.
    indices = torch.randint(16, (2, FRAMES, 2, 3), generator=torch.Generator().manual_seed(1))
    found = likeliest_tokens(model, layout, indices, None)
    assert found.shape == (2, FRAMES - 1, 2, 3) and len(found.unique()) > 4
    for frame in range(1, FRAMES, 2):
        indices[:, frame] = likeliest_tokens(model, layout, indices, None)[:, frame - 1]
    found = likeliest_tokens(model, layout, indices, None)
    hits = teacher_forced_scores(model, layout, indices, None).top1
    assert torch.equal((found == indices[:, 1:]).double(), hits) and 0.1 < hits.mean() < 0.9


def write_dataset(folder: Path) -> VidTokModel:
    """Write tokens with their tokenizer, whose frames are 15 x 23 and so smaller than its grid."""
    torch.manual_seed(0)
    tokenizer = VidTokModel(VidTokConfig(width=8, encoder_blocks=1, decoder_blocks=1, codebook_size=16, quantizer="fsq")).eval()
    for parameter in tokenizer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    stride = tokenizer.config.stride_t
    card = Card(
        tokenizer_fingerprint="0123abcd", codebook_size=tokenizer.codebook_size, grid_height=2, grid_width=3, stride_t=stride,
        stride_s=tokenizer.config.stride_s, fps=10.0, frame_height=15, frame_width=23, num_actions=0, data_name="toy", manifest_hash="abcd",
    )  # fmt: skip
    with TokenWriter(folder, card, 8) as writer:
        for number, split in enumerate(["train"] * 4 + ["validation"] * 2):
            indices = torch.randint(16, (FRAMES, 2, 3), generator=torch.Generator().manual_seed(number))
            row = TokenRow(source=f"clip-{number}", start=0.0, split=split, frames=1 + (FRAMES - 1) * stride, indices=indices)
            writer.add(row)
        writer.finish()
    save_model(tokenizer, folder / "tokenizer")
    return tokenizer


def test_vidgpt_train_keeps_pictures_of_a_held_out_clip(tmp_path: Path) -> None:
    tokens, run = tmp_path / "tokens", tmp_path / "gpt"
    write_dataset(tokens)
    train_gpt([f"tokens={tokens}", f"run_dir={run}", "trackers=[tensorboard]", "precision=fp32", *MODEL, *RUN])
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["step_000002.png", "step_000003.png"]
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    shown = events.Images("samples/real_over_likeliest")
    assert [event.step for event in shown] == [2, 3]
    pictures = [np.asarray(Image.open(run / "samples" / f"step_00000{step}.png")) for step in (2, 3)]
    for event, picture in zip(shown, pictures, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(event.encoded_image_string))), picture)
        assert picture.shape == (2 * 15, MOST_FRAMES * 23, 3)
        # The first frame is given, the others are the model's.
        np.testing.assert_array_equal(picture[:15, :23], picture[15:, :23])
        assert (picture[:15, 23:] != picture[15:, 23:]).any()
    decoder = load_decoder(tokens, torch.device("cpu"))
    assert decoder is not None
    real = TokenDataset(tokens, "validation", FRAMES)[0]["indices"][None]
    frames = to_frames(decoder.decode(real[:, :MOST_FRAMES])[0][:, :: decoder.config.stride_t, :15, :23])
    np.testing.assert_array_equal(pictures[0][:15], np.concatenate(list(frames), axis=1))
    # What model/ would have drawn is what the picture of its step shows.
    best = load_model(VidGPTForCausalLM, run / "model")
    drawn = drawing(decoder, best, best.model.layout, Card.load(tokens), real, None)()
    assert any(np.array_equal(drawn, picture) for picture in pictures)


def test_tokens_without_a_tokenizer_of_ours_have_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "model.safetensors").write_bytes(b"weights")
    assert load_decoder(tmp_path, torch.device("cpu")) is None
    (tmp_path / "tokenizer" / "config.json").write_text('{"model_type": "emu3_vqgan"}')
    assert load_decoder(tmp_path, torch.device("cpu")) is None
    (tmp_path / "tokenizer" / "config.json").write_text('{"model_type": "vidtok"}')
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_decoder(tmp_path, torch.device("cpu"))
