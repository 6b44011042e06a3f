"""Other projects' tokenizers through the commands: what is typed for them encodes, trains and predicts like our own."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import ChameleonVQVAE, ChameleonVQVAEConfig, Emu3VQVAE, Emu3VQVAEConfig

from vidgpt.predict import main as predict
from vidgpt.rollout import Predictor
from vidgpt.train import main as train_gpt
from vidtok.card import Card
from vidtok.encode import main as encode
from vidtok.folders import save_model
from vidtok.reconstruct import main as reconstruct
from vidtok.video import probe

SMALL = {"embed_dim": 4, "latent_channels": 4, "base_channels": 32, "num_res_blocks": 1}
RUN = ["max_steps=2", "batch_size=1", "warmup_steps=1"]
MODEL = ["model.hidden_size=32", "model.num_hidden_layers=1", "model.num_attention_heads=2"]
FRAMES = np.random.default_rng(0).integers(0, 256, (12, 4, 6, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 3, (2, 8, 8), (2, 8, 8))
        self.register_buffer("_levels", torch.tensor([4, 4, 4]), persistent=False)

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
        digits = (self.conv(torch.cat([video[:, :, :1], video], dim=2)).movedim(1, -1).sigmoid() * 3).round()
        return (digits[..., 0] + 4 * digits[..., 1] + 16 * digits[..., 2]).to(torch.int64), digits


class Decoder(nn.Module):
    def forward(self, indices: Tensor) -> Tensor:
        pixels = indices[:, None].to(torch.float32).expand(-1, 3, -1, -1, -1) / 63
        return pixels.repeat_interleave(2, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)[:, :, 1:]


def run(main: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Give what a command says on stderr; empty when it does its work."""
    capsys.readouterr()
    try:
        main(list(arguments))
    except SystemExit as error:
        assert error.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("films") / "film=1.npy"
    np.save(path, FRAMES)
    return path


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    torch.manual_seed(0)
    emu3 = Emu3VQVAEConfig(codebook_size=64, hidden_size=32, channel_multiplier=[1, 1, 1, 1], attn_resolutions=[3], **SMALL)
    save_model(Emu3VQVAE(emu3), root / "emu3")
    chameleon = ChameleonVQVAEConfig(num_embeddings=64, resolution=32, channel_multiplier=[1, 1, 1, 1], **SMALL)
    save_model(ChameleonVQVAE(chameleon), root / "chameleon")
    (root / "cosmos").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(Encoder(), torch.zeros(1, 3, 5, 16, 16)).save(str(root / "cosmos" / "encoder.jit"))
        torch.jit.script(Decoder()).save(str(root / "cosmos" / "decoder.jit"))
    return {name: root / name for name in ("emu3", "chameleon", "cosmos")}


def encoded_and_trained(name: str, tokenizer: Path, film: Path, folder: Path, *keys: str, size: str = "[32,48]") -> Path:
    data = ["data=files", f"data.root={film}", f"data.size={size}", "data.validation=0", f"data.cache_dir={folder / 'cache'}"]
    encode([*data, f"tokenizer={name}", f"tokenizer.path={tokenizer}", *keys, f"output={folder / 'tokens'}"])
    train_gpt([f"tokens={folder / 'tokens'}", f"run_dir={folder / 'gpt'}", *RUN, *MODEL])
    return folder / "gpt"


def test_emu3_encodes_trains_and_predicts_like_our_own(tokenizers, film: Path, tmp_path: Path, capsys) -> None:
    gpt = encoded_and_trained("emu3", tokenizers["emu3"], film, tmp_path)
    card = Card.load(gpt / "model")
    assert (card.first_frames, card.stride_t, card.codebook_size, card.rows, card.frames) == (4, 4, 64, 1, 12)
    assert {path.name for path in (gpt / "model" / "tokenizer").iterdir()} == {"config.json", "model.safetensors"}
    arguments = [f"checkpoint={gpt}", f"input={film}", f"output={tmp_path / 'out'}"]
    assert run(predict, capsys, *arguments, "context=8", "future=3", "start=0") == ""
    assert probe(tmp_path / "out" / "prediction.mp4").frames == 11
    assert len(list((tmp_path / "out" / "frames").glob("*.png"))) == 3
    assert json.loads((tmp_path / "out" / "prediction.json").read_text())["context_frames_used"] == 8
    tokens = load_file(tmp_path / "out" / "tokens.safetensors")
    assert tokens["context"].shape == (1, 2, 4, 6) and tokens["future"].shape == (1, 1, 4, 6)


def test_frames_that_fit_no_token_are_predicted_at_their_own_size(tokenizers, film: Path, tmp_path: Path, capsys) -> None:
    gpt = encoded_and_trained("emu3", tokenizers["emu3"], film, tmp_path, size="[30,42]")
    predictor = Predictor.from_pretrained(gpt)
    assert (predictor.card.frame_height, predictor.card.grid_height, predictor.card.grid_width) == (30, 4, 6)
    video = torch.zeros(1, 3, 8, 30, 42)
    assert predictor.predict(video, future=3).shape == (1, 3, 3, 30, 42)
    with pytest.raises(ValueError, match="7 frames ends inside a latent frame: use 4 or 8 frames"):
        predictor.predict(video[:, :, :7], future=1)
    arguments = [f"checkpoint={gpt}", f"input={film}", f"output={tmp_path / 'out'}"]
    assert run(predict, capsys, *arguments, "context=2", "future=3", "start=0") == ""
    assert "frame 0 2 times more in front" in json.loads((tmp_path / "out" / "prediction.json").read_text())["input_note"]


def test_emu3_reconstructs(tokenizers, film: Path, tmp_path: Path, capsys) -> None:
    arguments = ["tokenizer=emu3", f"tokenizer.path={tokenizers['emu3']}", f"input={film}", f"output={tmp_path}"]
    assert run(reconstruct, capsys, *arguments) == ""
    assert json.loads((tmp_path / "metrics.json").read_text())["frames"] == 12


def test_a_tokenizer_without_a_decoder_trains_and_is_refused_before_it_predicts(tokenizers, film, tmp_path: Path, capsys) -> None:
    gpt = encoded_and_trained("chameleon", tokenizers["chameleon"], film, tmp_path)
    arguments = [f"input={film}", f"output={tmp_path / 'out'}"]
    assert "has no decoder in transformers" in run(predict, capsys, f"checkpoint={gpt}", "context=4", "future=2", *arguments)
    chosen = ["tokenizer=chameleon", f"tokenizer.path={tokenizers['chameleon']}"]
    assert "has no decoder in transformers" in run(reconstruct, capsys, *chosen, *arguments)
    assert not (tmp_path / "out").exists()


def test_torchscript_runs_only_where_each_command_is_told_so(tokenizers, film: Path, tmp_path: Path, capsys) -> None:
    chosen = ["tokenizer=cosmos", f"tokenizer.path={tokenizers['cosmos']}", "tokenizer.levels=null"]
    arguments = [f"input={film}", f"output={tmp_path / 'out'}"]
    assert "tokenizer.allow_torchscript=true" in run(reconstruct, capsys, *chosen, *arguments)
    allowed = ["tokenizer.levels=[4,4,4]", "tokenizer.allow_torchscript=true"]
    gpt = encoded_and_trained("cosmos", tokenizers["cosmos"], film, tmp_path, *allowed)
    assert Card.load(gpt / "model").clip_frames == 1 + 16 * 2
    files = {path.name for path in (gpt / "model" / "tokenizer").iterdir()}
    assert files == {"encoder.jit", "decoder.jit", "tokenizer.json"}
    keys = [f"checkpoint={gpt}", *arguments, "context=5", "future=3"]
    assert "runs code from these files" in run(predict, capsys, *keys)
    assert not (tmp_path / "out").exists()
    assert run(predict, capsys, *keys, "allow_torchscript=true") == ""
    assert len(list((tmp_path / "out" / "frames").glob("*.png"))) == 3


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ([], "no tokenizer is given"),
        (["checkpoint=runs/tok", "tokenizer=emu3", "tokenizer.path={emu3}"], "two tokenizers are given"),
        (["tokenizer=emu3"], "tokenizer.path must be given"),
        (["tokenizer=emu"], "tokenizer=emu: unknown preset, did you mean emu3?"),
        (["tokenizer=janus", "tokenizer.path={emu3}"], "holds one of the kind emu3"),
        (["tokenizer=emu3", "tokenizer.path={emu3}/nowhere"], "nowhere does not exist"),
        (["tokenizer=emu3", "tokenizer.pth={emu3}"], "did you mean tokenizer.path?"),
        (["checkpoint={emu3}"], "give tokenizer=emu3 tokenizer.path="),
    ],
)
def test_a_users_mistake_is_one_sentence(keys: list[str], sentence: str, tokenizers, film: Path, tmp_path: Path, capsys) -> None:
    given = [key.format(**tokenizers) for key in keys]
    error = run(encode, capsys, "data=files", f"data.root={film}", f"output={tmp_path / 'out'}", *given)
    assert sentence in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
