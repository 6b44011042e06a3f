"""TorchScript pairs: opened only when the caller allows it, measured where nothing is said, named by their bytes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vidtok.adapters.torchscript import TorchScriptTokenizer
from vidtok.folders import copy_folder
from vidtok.tokenizer import choose_tokenizer, load_tokenizer

LEVELS = [4, 3, 5]


class Quantiser(nn.Module):
    def __init__(self, knows_levels: bool) -> None:
        super().__init__()
        if knows_levels:
            self.register_buffer("_levels", torch.tensor(LEVELS), persistent=False)
        self.scale, self.basis = torch.tensor([3.0, 2.0, 4.0]), torch.tensor([1, 4, 12])

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        digits = (latents.movedim(1, -1).sigmoid() * self.scale).round()
        return (digits * self.basis).sum(-1).to(torch.int32), digits


class Encoder(nn.Module):
    """Strides 4 and 8, causal in time: the first frame stands alone."""

    def __init__(self, knows_levels: bool) -> None:
        super().__init__()
        self.conv, self.quantiser = nn.Conv3d(3, 3, (4, 8, 8), (4, 8, 8)), Quantiser(knows_levels)

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
        return self.quantiser(self.conv(torch.cat([video[:, :, :1].expand(-1, -1, 3, -1, -1), video], dim=2)))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose3d(3, 3, (4, 8, 8), (4, 8, 8))

    def forward(self, indices: Tensor) -> Tensor:
        digits = torch.stack([indices % 4, indices // 4 % 3, indices // 12], dim=1)
        return self.conv(digits.to(torch.float32))[:, :, 3:]


class PictureEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.quantiser = nn.Conv2d(3, 3, 16, 16), Quantiser(True)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        return self.quantiser(self.conv(pictures))


class PictureDecoder(nn.Module):
    def forward(self, indices: Tensor) -> Tensor:
        return indices[:, None].expand(-1, 3, -1, -1).to(torch.float32).repeat_interleave(16, 2).repeat_interleave(16, 3) / 60


def write_pair(folder: Path, encoder: nn.Module, decoder: nn.Module, example: Tensor) -> Path:
    folder.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls TorchScript deprecated, and these files exist
        torch.jit.trace(encoder, example).save(str(folder / "encoder.jit"))
        torch.jit.script(decoder).save(str(folder / "decoder.jit"))
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    return write_pair(tmp_path / "pair", Encoder(True), Decoder(), torch.zeros(1, 3, 5, 16, 16))


@pytest.fixture
def silent_pair(tmp_path: Path) -> Path:
    """A pair that does not say its levels."""
    return write_pair(tmp_path / "silent", Encoder(False), Decoder(), torch.zeros(1, 3, 5, 16, 16))


def test_nothing_is_opened_without_the_callers_word(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(torch.jit, "load", lambda path, **_: opened.append(path))
    (pair / "tokenizer.json").write_text(json.dumps({"allow_torchscript": True, "stride_t": 4, "stride_s": 8, "levels": LEVELS}))
    (pair / "config.json").write_text(json.dumps({"model_type": "cosmos", "allow_torchscript": True}))
    with pytest.raises(ValueError, match=r"runs code from these files.*tokenizer\.allow_torchscript=true"):
        load_tokenizer(pair)
    with pytest.raises(ValueError, match="runs code"):
        choose_tokenizer(None, {"name": "cosmos", "path": str(pair), "allow_torchscript": False})
    copy_folder(pair, pair.parent / "copied")
    assert {path.name for path in (pair.parent / "copied").glob("*.jit")} == {"encoder.jit", "decoder.jit"}
    assert opened == []


def test_ids_and_pixels_are_those_of_the_scripts(pair: Path, noise: Callable[..., Tensor]) -> None:
    tokenizer, video = load_tokenizer(pair, allow_torchscript=True), noise(2, 3, 9, 16, 24)
    assert (tokenizer.stride_t, tokenizer.stride_s, tokenizer.first_frames, tokenizer.codebook_size) == (4, 8, 1, 60)
    ids = tokenizer.encode(video)
    encoder, decoder = (torch.jit.load(str(pair / name)) for name in ("encoder.jit", "decoder.jit"))
    assert ids.dtype == torch.int64
    assert torch.equal(ids, encoder(video)[0].long())
    assert torch.equal(tokenizer.decode(ids), decoder(ids).clamp(-1, 1))
    assert tokenizer.reconstruct(noise(1, 3, 7, 13, 22)).shape == (1, 3, 7, 13, 22)


def test_a_pair_for_pictures_codes_every_frame_by_itself(tmp_path: Path, noise: Callable[..., Tensor]) -> None:
    folder = write_pair(tmp_path / "pictures", PictureEncoder(), PictureDecoder(), torch.zeros(1, 3, 32, 32))
    tokenizer, video = load_tokenizer(folder, allow_torchscript=True), noise(2, 3, 3, 32, 48)
    assert (tokenizer.stride_t, tokenizer.stride_s) == (1, 16)
    ids = tokenizer.encode(video)
    assert ids.shape == (2, 3, 2, 3)
    assert torch.equal(tokenizer.encode(video[:, :, 1:2]), ids[:, 1:2])
    assert torch.equal(tokenizer.reconstruct(video)[:, 0, :, ::16, ::16], ids / 60)


@pytest.mark.parametrize("given", [{"stride_t": 1, "stride_s": 16}, {"stride_s": 16}, {"levels": LEVELS}])
def test_a_pair_for_pictures_is_known_whatever_is_given(
    tmp_path: Path, noise: Callable[..., Tensor], given: dict[str, Any]
) -> None:
    folder = write_pair(tmp_path / "pictures", PictureEncoder(), PictureDecoder(), torch.zeros(1, 3, 32, 32))
    tokenizer = TorchScriptTokenizer.load(folder, given)
    assert (tokenizer.values["is_picture"], tokenizer.stride_t, tokenizer.stride_s) == (True, 1, 16)
    assert tokenizer.reconstruct(noise(1, 3, 2, 30, 40)).shape == (1, 3, 2, 30, 40)


@pytest.mark.parametrize(
    ("given", "written", "levels"),
    [
        ({"levels": [4, 4, 4]}, [4, 4, 5], [4, 4, 4]),
        ({"levels": None}, [4, 4, 5], [4, 4, 5]),
        ({}, None, [8, 8, 8, 5, 5, 5]),
    ],
)
def test_a_key_counts_more_than_the_folder_and_that_more_than_the_preset(
    silent_pair: Path, given: dict[str, Any], written: list[int] | None, levels: list[int]
) -> None:
    if written is not None:
        (silent_pair / "tokenizer.json").write_text(json.dumps({"levels": written}))
    preset = {"stride_t": None, "usual_levels": [8, 8, 8, 5, 5, 5]}
    assert TorchScriptTokenizer.load(silent_pair, {**preset, **given}).values["levels"] == levels


def test_what_the_encoder_says_counts_more_than_the_preset(pair: Path) -> None:
    assert TorchScriptTokenizer.load(pair, {"usual_levels": [8, 8, 8, 5, 5, 5]}).values["levels"] == LEVELS


@pytest.mark.parametrize(
    "written",
    [
        {"stride_t": 0},
        {"stride_s": "8"},
        {"levels": 60},
        {"levels": []},
        {"levels": [4, 3.5]},
        {"stride_t": 4, "stride_s": 8, "is_picture": 2},
    ],
)
def test_options_that_are_none_are_refused(silent_pair: Path, written: dict[str, Any]) -> None:
    (silent_pair / "tokenizer.json").write_text(json.dumps({"levels": LEVELS} | written))
    with pytest.raises(ValueError, match="are whole numbers of 1 or more"):
        load_tokenizer(silent_pair, allow_torchscript=True)


def test_what_cannot_be_measured_is_asked_for_by_its_key(silent_pair: Path) -> None:
    with pytest.raises(ValueError, match=r"levels of .* cannot be measured: give tokenizer\.levels=.*tokenizer\.json"):
        load_tokenizer(silent_pair, allow_torchscript=True)
    keys = {"name": "cosmos", "path": str(silent_pair), "allow_torchscript": True, "stride_t": None, "levels": LEVELS}
    assert choose_tokenizer(None, keys).codebook_size == 60
    (silent_pair / "tokenizer.json").write_text(json.dumps({"levels": LEVELS}))
    assert load_tokenizer(silent_pair, allow_torchscript=True).codebook_size == 60


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"levels": [8, 8, 8, 5, 5, 5]}, r"has \[4, 3, 5\]: leave the key away"),
        ({"stride_t": 2, "stride_s": 8}, "correct tokenizer.stride_t"),
    ],
)
def test_a_wrong_key_is_refused(pair: Path, noise: Callable[..., Tensor], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TorchScriptTokenizer.load(pair, given).encode(noise(1, 3, 9, 16, 16))


def test_too_few_levels_are_found_out_by_an_id(silent_pair: Path, noise: Callable[..., Tensor]) -> None:
    tokenizer = TorchScriptTokenizer.load(silent_pair, {"levels": [2, 2]})
    with pytest.raises(ValueError, match="lies outside the codebook of 4"):
        tokenizer.encode(noise(1, 3, 9, 16, 16))


def test_a_continuous_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = write_pair(tmp_path / "cv", nn.Conv3d(3, 4, 1), Decoder(), torch.zeros(1, 3, 5, 16, 16))
    with pytest.raises(ValueError, match="this is a continuous tokenizer"):
        load_tokenizer(folder, allow_torchscript=True)


def test_a_copy_has_the_same_name_and_another_file_another(pair: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(pair, allow_torchscript=True)
    tokenizer.save_pretrained(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy", allow_torchscript=True).fingerprint() == tokenizer.fingerprint()
    other = write_pair(tmp_path / "other", Encoder(True), Decoder(), torch.zeros(1, 3, 5, 16, 16))
    assert load_tokenizer(other, allow_torchscript=True).fingerprint() != tokenizer.fingerprint()


def test_a_damaged_file_is_one_sentence(pair: Path) -> None:
    (pair / "decoder.jit").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"decoder\.jit cannot be loaded as TorchScript"):
        load_tokenizer(pair, allow_torchscript=True)
