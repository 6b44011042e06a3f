"""Training on ids of several digits, as a user types it, from tokens to figures and frames."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vidgpt import training
from vidgpt.config import VidGPTConfig
from vidgpt.evaluate import main as evaluate
from vidgpt.finetuning import config_for
from vidgpt.model import VidGPTForCausalLM
from vidgpt.options import TrainGPTOptions
from vidgpt.rollout import stream_tokens
from vidgpt.train import main as train_gpt
from vidtok.card import Card
from vidtok.folders import copy_folder, load_model
from vidtok.tokens import TokenRow, TokenWriter

RUN = ["max_steps=2", "batch_size=2", "warmup_steps=1", "checkpoint_every=2", "evaluate_every=2", "evaluation_clips=2"]
MODEL = ["model.hidden_size=32", "model.num_hidden_layers=1", "model.num_attention_heads=2"]


def card_of(codebook_factors: list[int]) -> Card:
    sides = {"grid_height": 2, "grid_width": 3, "stride_t": 1, "stride_s": 8, "frame_height": 16, "frame_width": 24}
    names = {"tokenizer_fingerprint": "0123abcd", "data_name": "toy", "manifest_hash": "abcd"}
    return Card(
        codebook_size=math.prod(codebook_factors),
        codebook_factors=codebook_factors,
        fps=10.0,
        num_actions=0,
        **sides,
        **names,
    )


def write_tokens(folder: Path, card: Card, train: int = 4, validation: int = 2, frames: int = 5) -> Path:
    with TokenWriter(folder, card, 8) as writer:
        for number, split in enumerate(["train"] * train + ["validation"] * validation):
            indices = torch.randint(card.codebook_size, (frames, 2, 3), generator=torch.Generator().manual_seed(number))
            actions = torch.zeros(frames, dtype=torch.int64) if card.num_actions else None
            writer.add(TokenRow(source=f"clip-{number}", start=0.0, split=split, frames=frames, indices=indices, actions=actions))
        writer.finish()
    return folder


def test_a_tracker_that_is_not_known_is_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match=r"^trackers=\[tensorbord\] names tensorbord, which is not known"):
        TrainGPTOptions(tokens="tokens", trackers=["tensorbord"])


def test_digits_are_the_tokenizers_codebooks_unless_a_user_says_otherwise() -> None:
    assert config_for(card_of([1024] * 4), {}).factors == [1024] * 4
    assert config_for(card_of([1 << 18]), {"factors": None}).factors == [1 << 18]
    assert config_for(card_of([1 << 18]), {"factors": [512, 512]}).vocab_size == 512 + 512 + 2
    assert isinstance(config_for(card_of([20]), {}), VidGPTConfig)
    with pytest.raises(
        Exception, match=r"factors=\[512, 256\] multiply to 131072, the tokens have a codebook_size of 262144 ids"
    ):
        config_for(card_of([1 << 18]), {"factors": [512, 256]})


# 2048 values a digit make more ids than 32 bits number.
@pytest.mark.parametrize(("digits", "size"), [("slots", 8), ("parallel", 8), ("slots", 2048), ("parallel", 2048)])
def test_a_residual_tokenizers_tokens_train_evaluate_and_roll_out(digits, size, tmp_path, capsys) -> None:
    tokens = write_tokens(tmp_path / "tokens", card_of([size] * 3))
    train_gpt([f"tokens={tokens}", f"run_dir={tmp_path / 'gpt'}", f"model.digits={digits}", *MODEL, *RUN])
    shown = " ".join(capsys.readouterr().out.split())
    sequence = {"slots": ("19", "in turn"), "parallel": ("7", "together")}[digits]
    values = f"2x3 places of 3 digits ({size}x{size}x{size} values)"
    assert f"{sequence[0]} tokens a frame ({values}, predicted {sequence[1]}, and a lead)" in shown
    assert f"uniform ln V = {3 * math.log(size):.3f}" in shown
    arguments = [f"checkpoint={tmp_path / 'gpt'}", f"tokens={tokens}", "context=2", f"output={tmp_path / 'out'}"]
    evaluate([*arguments, "clips=2", "rollout_clips=1"])
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())["teacher_forced"]["model"]
    assert figures["cross_entropy_nats_per_token"] == pytest.approx(3 * math.log(size), rel=0.2)
    assert "digit by digit" in (tmp_path / "out" / "report.html").read_text()
    model = load_model(VidGPTForCausalLM, tmp_path / "gpt" / "model")
    frames = list(stream_tokens(model, torch.full((1, 2, 2, 3), size**3 - 1), 2))
    assert [frame.shape for frame in frames] == [(1, 2, 3)] * 2


@pytest.mark.parametrize("has_links", [True, False])
def test_the_tokenizer_is_copied_into_the_run_once(has_links: bool, tmp_path, monkeypatch, capsys) -> None:
    tokens, elsewhere = write_tokens(tmp_path / "tokens", card_of([8]), validation=0), tmp_path / "elsewhere"
    (tokens / "tokenizer").mkdir()
    (tokens / "tokenizer" / "model.safetensors").write_bytes(b"weights")
    copied = []
    monkeypatch.setattr(training, "copy_folder", lambda *folders: copied.append(folders) or copy_folder(*folders))
    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    train_gpt([f"tokens={tokens}", f"run_dir={tmp_path / 'gpt'}", *MODEL, *RUN, "checkpoint_every=1"])
    assert (tmp_path / "gpt" / "model" / "tokenizer" / "model.safetensors").read_bytes() == b"weights"
    assert len(copied) == 1
    # Tokens of the same tokenizer in a folder that nothing can be counted in, with actions that this model does not know.
    write_tokens(elsewhere, replace(card_of([8]), num_actions=2), train=0)
    evaluate(
        [f"checkpoint={tmp_path / 'gpt'}", f"tokens={elsewhere}", f"output={tmp_path / 'out'}", "context=2", "rollout_clips=0"]
    )
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())["teacher_forced"]
    assert set(figures) == {"model", "uniform", "copy_last_frame_smoothed"}
    assert f"{elsewhere} has no training split to count tokens of" in capsys.readouterr().out


def no_links(*_: object) -> None:
    raise OSError("this disk has no links")


def test_clips_of_one_latent_frame_are_refused_by_name(tmp_path, capsys) -> None:
    tokens = write_tokens(tmp_path / "tokens", card_of([8]), frames=1)
    with pytest.raises(SystemExit):
        train_gpt([f"tokens={tokens}", f"run_dir={tmp_path / 'gpt'}", *MODEL, *RUN])
    assert f"the training clips of {tokens} have one latent frame, and nothing to predict" in capsys.readouterr().err
