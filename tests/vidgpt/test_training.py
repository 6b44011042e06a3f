"""Training on ids of several digits, as a user types it, from tokens to figures and frames."""

import json
import math
from pathlib import Path

import pytest
import torch

from vidgpt.config import VidGPTConfig
from vidgpt.evaluate import main as evaluate
from vidgpt.model import VidGPTForCausalLM
from vidgpt.rollout import stream_tokens
from vidgpt.train import main as train_gpt
from vidgpt.training import config_for
from vidtok.card import Card
from vidtok.folders import load_model
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


def write_tokens(folder: Path, card: Card) -> Path:
    with TokenWriter(folder, card, 8) as writer:
        for number in range(6):
            indices = torch.randint(card.codebook_size, (5, 2, 3), generator=torch.Generator().manual_seed(number))
            split = "train" if number < 4 else "validation"
            writer.add(TokenRow(source=f"clip-{number}", start=0.0, split=split, frames=5, indices=indices, actions=None))
        writer.finish()
    return folder


def test_digits_are_the_tokenizers_codebooks_unless_a_user_says_otherwise() -> None:
    assert config_for(card_of([1024] * 4), {}).factors == [1024] * 4
    assert config_for(card_of([1 << 18]), {"factors": None}).factors == [1 << 18]
    assert config_for(card_of([1 << 18]), {"factors": [512, 512]}).vocab_size == 512 + 512 + 2
    assert isinstance(config_for(card_of([20]), {}), VidGPTConfig)
    with pytest.raises(
        Exception, match=r"factors=\[512, 256\] multiply to 131072, the tokens have a codebook_size of 262144 ids"
    ):
        config_for(card_of([1 << 18]), {"factors": [512, 256]})


@pytest.mark.slow
@pytest.mark.parametrize("digits", ["slots", "parallel"])
def test_a_residual_tokenizers_tokens_train_evaluate_and_roll_out(digits, tmp_path, capsys) -> None:
    tokens = write_tokens(tmp_path / "tokens", card_of([8, 8, 8]))
    train_gpt([f"tokens={tokens}", f"run_dir={tmp_path / 'gpt'}", f"model.digits={digits}", *MODEL, *RUN])
    shown = " ".join(capsys.readouterr().out.split())
    places = {"slots": "19 tokens a frame (2x3 places of 3 digits (8x8x8 values), foretold in turn, and a lead)"}
    places["parallel"] = "7 tokens a frame (2x3 places of 3 digits (8x8x8 values), foretold together, and a lead)"
    assert places[digits] in shown
    assert f"uniform ln V = {math.log(512):.3f}" in shown
    arguments = [f"checkpoint={tmp_path / 'gpt'}", f"tokens={tokens}", "context=2", f"output={tmp_path / 'out'}"]
    evaluate([*arguments, "clips=2", "rollout_clips=1"])
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())["teacher_forced"]["model"]
    assert figures["cross_entropy_nats_per_token"] == pytest.approx(math.log(512), rel=0.2)
    assert "digit by digit" in (tmp_path / "out" / "report.html").read_text()
    model = load_model(VidGPTForCausalLM, tmp_path / "gpt" / "model")
    frames = list(stream_tokens(model, torch.full((1, 2, 2, 3), 511), 2))
    assert [frame.shape for frame in frames] == [(1, 2, 3)] * 2
