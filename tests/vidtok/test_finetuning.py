"""Training that goes on from a trained tokenizer: where its architecture comes from, and what stays frozen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vidtok.data import ClipDataset, build_episodes
from vidtok.folders import load_model
from vidtok.model import VidTokModel
from vidtok.options import GanOptions, TrainTokenizerOptions
from vidtok.train import main
from vidtok.training import train_tokenizer

TOKENIZER = {"stride_t": 2, "width": 8, "encoder_blocks": 1, "decoder_blocks": 1}
VQ = {"quantizer": "vq", "codebook_size": 16, "codebook_dim": 4}
DIGITS = {"name": "digits", "episodes": 6, "validation_episodes": 2, "frames": 5, "size": 32}
RUN = {"batch_size": 2, "warmup_steps": 0, "clip_frames": 3, "evaluation_clips": 2, "unquantized_steps": 1, "log_every": 1}


def train(folder: Path, tokenizer: dict[str, Any], **changes: Any) -> VidTokModel:
    values = RUN | {"max_steps": 6, "evaluate_every": 3, "checkpoint_every": 3, "lr": 0.01} | changes
    gan = GanOptions(**values.pop("gan", {}))
    options = TrainTokenizerOptions(run_dir=str(folder), gan=gan, **values)
    train_tokenizer(options, DIGITS, tokenizer, {**values, "tokenizer": tokenizer})
    return load_model(VidTokModel, folder)


def is_same(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    return all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize(
    "quantizer", [{}, VQ, {"quantizer": "simvq", "codebook_size": 16, "codebook_dim": 4}], ids=["fsq", "vq", "simvq"]
)
def test_training_the_decoder_alone_keeps_every_token(quantizer: dict[str, Any], tmp_path: Path) -> None:
    original = train(tmp_path / "first", TOKENIZER | quantizer)
    gan = {"weight": 0.1, "width": 4, "layers": 1, "start": 0, "warmup_steps": 0, "ramp_steps": 1}
    tuned = train(tmp_path / "tuned", {}, init_from=str(tmp_path / "first"), train_only="decoder", ema_decay=0.5, gan=gan)
    clips = ClipDataset(build_episodes(DIGITS).episodes, 5)
    for index in range(len(clips)):
        video = clips[index]["video"][None]
        assert torch.equal(original.encode(video), tuned.encode(video))
    assert is_same(original.encoder, tuned.encoder) and is_same(original.quantizer, tuned.quantizer)
    assert not is_same(original.decoder, tuned.decoder)
    assert original.encoder_fingerprint() == tuned.encoder_fingerprint()
    assert original.fingerprint() != tuned.fingerprint()
    # The first pass already decodes codes: nothing is left unquantised.
    lines = [json.loads(line) for line in (tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["codebook_window_tokens"] > 0


def test_the_whole_tokenizer_starts_at_the_given_weights(tmp_path: Path) -> None:
    original = train(tmp_path / "first", TOKENIZER)
    tuned = train(tmp_path / "tuned", {}, init_from=str(tmp_path / "first"), max_steps=1, lr=1e-12)
    for name, value in original.state_dict().items():
        torch.testing.assert_close(tuned.state_dict()[name], value, rtol=0, atol=1e-9)
    moved = train(tmp_path / "moved", {}, init_from=str(tmp_path / "first"))
    assert not is_same(original.encoder, moved.encoder)


def test_a_resumed_run_does_not_read_them_again_and_ends_in_the_same_bits(tmp_path: Path) -> None:
    changes = {"init_from": str(tmp_path / "first"), "train_only": "decoder", "min_lr_ratio": 1.0}
    train(tmp_path / "first", TOKENIZER | VQ)
    straight = train(tmp_path / "straight", {}, **changes)
    train(tmp_path / "parted", {}, max_steps=4, **changes)
    (tmp_path / "first").rename(tmp_path / "gone")
    parted = train(tmp_path / "parted", {}, **changes)
    assert is_same(straight, parted) and parted.config.codebook_size == 16


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ({"width": 16}, r"^tokenizer\.width=16, but the tokenizer of init_from=.*first has width=8: leave tokenizer= out"),
        ({**TOKENIZER, "stride_s": 16, "quantizer": "fsq"}, r"^tokenizer\.stride_s=16, .* has stride_s=8"),
        (
            {**TOKENIZER, "stride_s": 8, "quantizer": "vq", "codebook_size": 1000},
            r"^tokenizer\.quantizer=vq, .* has quantizer=fsq",
        ),
    ],
)
def test_an_architecture_that_contradicts_is_refused_by_its_key(tokenizer: dict[str, Any], message: str, tmp_path: Path) -> None:
    train(tmp_path / "first", TOKENIZER)
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "tuned", tokenizer, init_from=str(tmp_path / "first"))
    # What agrees, or leaves a value open, is fine.
    agreeing = {**TOKENIZER, "stride_s": 8, "quantizer": "fsq", "channel_multipliers": None, "codebook_size": 1000}
    train(tmp_path / "tuned", agreeing, init_from=str(tmp_path / "first"), max_steps=1)


def test_keys_that_only_say_how_to_train_need_not_agree(tmp_path: Path) -> None:
    original = train(tmp_path / "first", TOKENIZER | VQ)
    init = {"init_from": str(tmp_path / "first"), "train_only": "decoder"}
    tuned = train(tmp_path / "tuned", {"commitment_weight": 1.0, "vq_decay": 0.5}, **init, lr=0.02, max_steps=1)
    assert (tuned.config.commitment_weight, tuned.config.vq_decay, tuned.quantizer.commitment_weight) == (1.0, 0.5, 1.0)
    assert original.encoder_fingerprint() == tuned.encoder_fingerprint()
    train(tmp_path / "tuned", {"commitment_weight": 1.0, "vq_decay": 0.5}, **init, lr=0.02, max_steps=2)


def test_the_command_takes_the_architecture_from_the_folder_unless_a_preset_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "first", TOKENIZER)
    data = ["data=digits", "data.episodes=6", "data.validation_episodes=2", "data.frames=5", "data.size=32"]
    keys = ["batch_size=2", "clip_frames=3", "evaluation_clips=2", "max_steps=1", f"init_from={tmp_path / 'first'}"]
    main([*data, *keys, f"run_dir={tmp_path / 'tuned'}"])
    assert load_model(VidTokModel, tmp_path / "tuned").config.width == 8
    for words, named in ((["tokenizer=tiny"], "stride_t=1"), (["tokenizer.decoder_blocks=2"], "decoder_blocks=2")):
        with pytest.raises(SystemExit) as stop:
            main([*data, *keys, *words, f"run_dir={tmp_path / 'refused'}"])
        assert stop.value.code == 2
        assert capsys.readouterr().err.startswith(f"vidtok-train: tokenizer.{named}, but the tokenizer of init_from=")


def test_what_cannot_be_trained_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^init_from: .*nowhere does not exist"):
        train(tmp_path / "run", {}, init_from=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="say which with init_from=DIR"):
        TrainTokenizerOptions(train_only="decoder")
    with pytest.raises(ValueError, match="train_only=encoder is not known: give decoder, or null"):
        TrainTokenizerOptions(init_from="somewhere", train_only="encoder")
