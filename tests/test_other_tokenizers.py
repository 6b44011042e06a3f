"""Other projects' tokenizers through the commands: what is typed for them encodes, trains and predicts like our own."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import ChameleonVQVAE, ChameleonVQVAEConfig, Emu3VQVAE, Emu3VQVAEConfig, JanusVQVAE, JanusVQVAEConfig

from vidgpt.predict import main as predict
from vidgpt.rollout import Predictor
from vidgpt.train import main as train_gpt
from vidtok.card import Card
from vidtok.encode import main as encode
from vidtok.evaluate import main as evaluate
from vidtok.folders import save_model
from vidtok.reconstruct import main as reconstruct
from vidtok.tokens import TokenDataset
from vidtok.video import probe, to_video

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
    save_model(JanusVQVAE(JanusVQVAEConfig(num_embeddings=64, channel_multiplier=[1, 1, 1, 1], **SMALL)), root / "janus")
    (root / "cosmos").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(Encoder(), torch.zeros(1, 3, 5, 16, 16)).save(str(root / "cosmos" / "encoder.jit"))
        torch.jit.script(Decoder()).save(str(root / "cosmos" / "decoder.jit"))
    return {name: root / name for name in ("emu3", "janus", "chameleon", "cosmos")}


def encoded_and_trained(name: str, tokenizer: Path, film: Path, folder: Path, *keys: str, size: str = "[32,48]") -> Path:
    data = ["data=files", f"data.root={film}", f"data.size={size}", "data.validation=0", f"data.cache_dir={folder / 'cache'}"]
    encode([*data, f"tokenizer={name}", f"tokenizer.path={tokenizer}", *keys, f"output={folder / 'tokens'}"])
    train_gpt([f"tokens={folder / 'tokens'}", f"run_dir={folder / 'gpt'}", *RUN, *MODEL])
    return folder / "gpt"


@pytest.mark.parametrize(("name", "stride_t"), [("emu3", 4), ("janus", 1)])
def test_another_tokenizer_encodes_trains_and_predicts_like_our_own(
    name: str, stride_t: int, tokenizers, film: Path, tmp_path: Path, capsys
) -> None:
    gpt = encoded_and_trained(name, tokenizers[name], film, tmp_path)
    card = Card.load(gpt / "model")
    assert (card.first_frames, card.stride_t, card.codebook_size, card.rows, card.frames) == (stride_t, stride_t, 64, 1, 12)
    assert {path.name for path in (gpt / "model" / "tokenizer").iterdir()} == {"config.json", "model.safetensors"}
    arguments = [f"checkpoint={gpt}", f"input={film}", f"output={tmp_path / 'out'}"]
    assert run(predict, capsys, *arguments, "context=8", "future=3", "start=0") == ""
    assert probe(tmp_path / "out" / "prediction.mp4").frames == 11
    assert len(list((tmp_path / "out" / "frames").glob("*.png"))) == 3
    assert json.loads((tmp_path / "out" / "prediction.json").read_text())["context_frames_used"] == 8
    tokens = load_file(tmp_path / "out" / "tokens.safetensors")
    assert tokens["context"].shape == (1, 8 // stride_t, 4, 6) and tokens["future"].shape == (1, -(-3 // stride_t), 4, 6)


def test_a_row_of_emu3_is_what_its_class_gives_for_those_frames_alone(tokenizers, film: Path, tmp_path: Path) -> None:
    data = ["data=files", f"data.root={film}", "data.size=[32,48]", "data.validation=0", f"data.cache_dir={tmp_path / 'cache'}"]
    cut = ["clip_frames=8", "clip_hop=4", "chunk_frames=3"]
    encode([*data, *cut, "tokenizer=emu3", f"tokenizer.path={tokenizers['emu3']}", f"output={tmp_path / 'tokens'}"])
    network = Emu3VQVAE.from_pretrained(tokenizers["emu3"])
    rows = list(TokenDataset(tmp_path / "tokens", "train", window=2).rows())
    assert len(rows) == 2
    for row, first in zip(rows, (0, 4), strict=True):
        clip = rearrange(to_video(FRAMES[first : first + 8]), "C T H W -> 1 T C H W")
        with torch.no_grad():
            (expected,) = network.encode(clip, torch.tensor([[10_000, 10_000]])).image_tokens
        assert torch.equal(row[0], expected)


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
    assert "this tokenizer does not work in tiles" in run(reconstruct, capsys, *arguments, "tile=16")
    assert run(reconstruct, capsys, *arguments, "chunk_frames=3") == ""
    assert json.loads((tmp_path / "metrics.json").read_text())["frames"] == 12


@pytest.mark.parametrize("name", ["emu3", "cosmos"])
def test_another_projects_tokenizer_is_evaluated(name: str, tokenizers, film: Path, tmp_path: Path, capsys) -> None:
    keys = {"emu3": [], "cosmos": ["tokenizer.allow_torchscript=true", "tokenizer.levels=[4,4,4]"]}[name]
    data = ["data=files", f"data.root={film}", "data.size=[32,48]", f"data.cache_dir={tmp_path / 'cache'}", "data.validation=0"]
    chosen = [f"tokenizer={name}", f"tokenizer.path={tokenizers[name]}", *keys]
    assert run(evaluate, capsys, *chosen, *data, f"output={tmp_path / 'out'}", "clips=3", "batch_size=2") == ""
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert figures["clips"] > 0 and figures["peak_tensors_mebibytes"] > 0 and (tmp_path / "out" / "report.html").is_file()
    if name == "emu3":
        # 12 frames are 3 latent frames, which the commands code in one go: no border is there to be seen.
        assert figures["clip_frames"] == 12 and figures["chunk_way"] == "chunk after chunk of one clip"
        assert figures["chunk_changed_ids_fraction"] == 0 and figures["chunk_max_abs_pixel_difference"] == 0
    else:
        assert figures["clip_frames"] == 11 and figures["chunk_way"] == "every chunk a clip of its own"


def test_a_tokenizer_without_a_decoder_trains_and_is_refused_before_it_predicts(tokenizers, film, tmp_path: Path, capsys) -> None:
    gpt = encoded_and_trained("chameleon", tokenizers["chameleon"], film, tmp_path)
    arguments = [f"input={film}", f"output={tmp_path / 'out'}"]
    assert "has no decoder in transformers" in run(predict, capsys, f"checkpoint={gpt}", "context=4", "future=2", *arguments)
    chosen = ["tokenizer=chameleon", f"tokenizer.path={tokenizers['chameleon']}"]
    assert "has no decoder in transformers" in run(reconstruct, capsys, *chosen, *arguments)
    data = ["data=files", f"data.root={film}", arguments[1]]
    assert "has no decoder in transformers" in run(evaluate, capsys, *chosen, *data)
    assert not (tmp_path / "out").exists()


def test_torchscript_runs_only_where_each_command_is_told_so(tokenizers, film: Path, tmp_path: Path, capsys) -> None:
    chosen = ["tokenizer=cosmos", f"tokenizer.path={tokenizers['cosmos']}"]
    arguments = [f"input={film}", f"output={tmp_path / 'out'}"]
    assert "tokenizer.allow_torchscript=true" in run(reconstruct, capsys, *chosen, *arguments)
    gpt = encoded_and_trained("cosmos", tokenizers["cosmos"], film, tmp_path, "tokenizer.allow_torchscript=true")
    card = Card.load(gpt / "model")
    assert (card.clip_frames, card.codebook_size) == (1 + 16 * 2, 64)
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
        (["tokenizer.path={emu3}"], "give tokenizer=NAME too, one of chameleon, cosmos, emu3, flava, glm_image, janus"),
        (["pretrained@tokenizer=emu3", "tokenizer.path={emu3}/nowhere"], "nowhere does not exist"),
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
