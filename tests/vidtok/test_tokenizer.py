"""The protocol: every tokenizer is loaded by one function, chosen by the same keys, and coded in pieces like whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Emu3VQVAE, Emu3VQVAEConfig, JanusVQVAE, JanusVQVAEConfig

from tests.conftest import randomised
from vidtok.adapters.base import ForeignTokenizer, Options
from vidtok.config import VidTokConfig
from vidtok.folders import save_model
from vidtok.model import VidTokModel
from vidtok.tokenizer import (
    FAMILIES,
    StreamDecoder,
    StreamEncoder,
    Tokenizer,
    check_decoder,
    choose_tokenizer,
    decode_stream,
    encode_stream,
    encodes_in_pieces,
    family_of,
    load_tokenizer,
    save_tokenizer,
)

SMALL = {"embed_dim": 4, "latent_channels": 4, "base_channels": 32, "channel_multiplier": [1, 1, 1], "num_res_blocks": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Ours, frame-wise and with a temporal stride, and two of other projects."""
    root = tmp_path_factory.mktemp("tokenizers")
    torch.manual_seed(0)
    small = {"width": 8, "encoder_blocks": 1, "decoder_blocks": 1}
    save_model(randomised(VidTokModel(VidTokConfig(stride_t=1, **small))), root / "framewise")
    save_model(randomised(VidTokModel(VidTokConfig(stride_t=4, **small))), root / "run" / "model")
    save_model(Emu3VQVAE(Emu3VQVAEConfig(codebook_size=64, hidden_size=32, attn_resolutions=[], **SMALL)), root / "emu3")
    save_model(JanusVQVAE(JanusVQVAEConfig(num_embeddings=64, **SMALL)), root / "janus")
    return {name: root / name for name in ("framewise", "run", "emu3", "janus")}


NAMES = ("framewise", "run", "emu3", "janus")


def clip(frames: int = 11, height: int = 30, width: int = 44) -> Tensor:
    return torch.rand(1, 3, frames, height, width, generator=torch.Generator().manual_seed(frames)) * 2 - 1


@pytest.mark.parametrize("name", NAMES)
def test_every_tokenizer_keeps_the_protocol(folders: dict[str, Path], name: str) -> None:
    tokenizer: Tokenizer = load_tokenizer(folders[name])
    video = clip()
    grid = tokenizer.grid_for(11, 30, 44)
    ids = tokenizer.encode(video)
    assert ids.dtype == torch.int64 and ids.shape == (1, *grid)
    assert 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.codebook_size
    assert torch.tensor(tokenizer.codebook_factors).prod() == tokenizer.codebook_size
    whole = tokenizer.decode(ids)
    assert whole.shape[2] == tokenizer.first_frames + (grid[0] - 1) * tokenizer.stride_t == tokenizer.valid_frames(11)[1]
    assert whole.shape[3:] == (grid[1] * tokenizer.stride_s, grid[2] * tokenizer.stride_s)
    assert torch.equal(tokenizer.decode(ids, (11, 30, 44)), whole[:, :, :11, :30, :44])
    assert torch.equal(tokenizer.reconstruct(video), whole[:, :, :11, :30, :44])
    assert whole.dtype == torch.float32 and float(whole.abs().max()) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_tokenizer_is_the_same_tokenizer(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folders[name])
    save_tokenizer(tokenizer, tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    again = load_tokenizer(tmp_path)
    assert again.fingerprint() == tokenizer.fingerprint()
    assert torch.equal(again.encode(clip()), tokenizer.encode(clip()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 3, 16])
def test_pieces_give_what_the_whole_gives(folders: dict[str, Path], name: str, size: int) -> None:
    tokenizer, video = load_tokenizer(folders[name]), clip()
    ids = torch.cat(list(encode_stream(tokenizer, video.split(size, dim=2))), dim=1)
    assert torch.equal(ids, tokenizer.encode(video))
    decoded = torch.cat(list(decode_stream(tokenizer, ids.split(size, dim=1))), dim=2)
    torch.testing.assert_close(decoded, tokenizer.decode(ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_history_is_what_a_clip_needs_in_front_to_keep_its_ids(folders: dict[str, Path], name: str) -> None:
    tokenizer, video = load_tokenizer(folders[name]), clip(frames=61)
    ids, stride, history = tokenizer.encode(video), tokenizer.stride_t, tokenizer.history_frames
    assert tokenizer.is_framewise == (history == 0) == (name in ("framewise", "janus"))
    assert history % stride == 0
    first = 12 * stride if stride > 1 else 30
    part = tokenizer.encode(video[:, :, first - history : first + 5])[:, history // stride :]
    if name != "emu3":  # how far it looks is not known
        assert torch.equal(part, ids[:, first // stride :][:, : part.shape[1]])


@pytest.mark.parametrize("looks_back", ["temporal_encoder", "temporal_decoder"])
def test_a_stride_of_one_with_layers_that_look_back_is_not_framewise(looks_back: str) -> None:
    config = VidTokConfig(stride_t=1, width=8, encoder_blocks=1, decoder_blocks=1, **{looks_back: True})
    tokenizer, video = randomised(VidTokModel(config)), clip(9)
    assert not tokenizer.is_framewise
    assert (tokenizer.history_frames > 0) == (looks_back == "temporal_encoder")
    assert not torch.equal(tokenizer.reconstruct(video)[:, :, 4:], tokenizer.reconstruct(video[:, :, 4:]))


class Counting(ForeignTokenizer):
    """One frame a latent frame, whose id is how many frames were seen so far."""

    device = torch.device("cpu")

    def _encode(self, video: Tensor) -> Tensor:
        return torch.arange(video.shape[2])[None, :, None, None].expand(len(video), *self.grid_for(*video.shape[2:]))


def test_another_projects_stride_of_one_is_not_taken_for_framewise() -> None:
    tokenizer = Counting(Options({}, {}), 1, 8, 100)
    assert not encodes_in_pieces(tokenizer)
    ids = torch.cat(list(encode_stream(tokenizer, clip().split(3, dim=2))), dim=1)
    assert torch.equal(ids, tokenizer.encode(clip()))


@pytest.mark.parametrize("name", [*NAMES, "counting"])
def test_a_stream_of_nothing_or_of_two_sizes_is_refused_by_every_tokenizer(folders: dict[str, Path], name: str) -> None:
    tokenizer = Counting(Options({}, {}), 1, 8, 100) if name == "counting" else load_tokenizer(folders[name])
    ids = torch.zeros(1, 2, 4, 4, dtype=torch.int64)
    for stream, piece in ((encode_stream, clip()), (decode_stream, ids)):
        for pieces, sentence in (
            ([], "ended before its first frame"),
            ([piece, piece[..., :-1]], "a stream keeps its size"),
            ([piece[0]], "add or remove axes"),
        ):
            with pytest.raises(ValueError, match=sentence):
                list(stream(tokenizer, pieces))


@pytest.mark.parametrize("name", ["run", "emu3", "janus"])
def test_what_are_no_ids_is_refused_alike_by_every_tokenizer(folders: dict[str, Path], name: str) -> None:
    tokenizer, ids = load_tokenizer(folders[name]), torch.zeros(1, 2, 4, 4, dtype=torch.int64)
    for wrong, sentence in (
        (ids.float(), "indices are torch.float32, but ids are whole numbers"),
        (ids[:, :0], r"indices have shape \(1, 0, 4, 4\), not \(B, t, h, w\) of 1 or more each"),
        (ids[0], r"indices have shape \(2, 4, 4\)"),
    ):
        with pytest.raises(ValueError, match=sentence):
            tokenizer.decode(wrong)
    with pytest.raises(ValueError, match="ids are whole numbers"):
        list(decode_stream(tokenizer, [ids.float()]))


def test_which_tokenizers_carry_their_state_on(folders: dict[str, Path]) -> None:
    found = {name: load_tokenizer(folders[name]) for name in NAMES}
    assert {name for name in NAMES if isinstance(found[name], StreamEncoder)} == {"framewise", "run", "emu3"}
    assert {name for name in NAMES if isinstance(found[name], StreamDecoder)} == {"framewise", "run", "emu3"}
    for tokenizer in found.values():
        check_decoder(tokenizer)


def test_the_kind_is_read_from_the_files(folders: dict[str, Path], tmp_path: Path) -> None:
    assert [family_of(folders[name]) for name in NAMES] == [None, None, "emu3", "janus"]
    for family, kinds in FAMILIES.items():
        for kind in kinds:
            (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
            assert family_of(tmp_path) == family


def test_keys_choose_exactly_one(folders: dict[str, Path]) -> None:
    ours, theirs = str(folders["run"]), {"name": "emu3", "path": str(folders["emu3"])}
    assert isinstance(choose_tokenizer(ours, None), VidTokModel)
    assert choose_tokenizer(None, theirs).codebook_size == 64
    with pytest.raises(ValueError, match=r"^no tokenizer is given.*give exactly one$"):
        choose_tokenizer(None, None)
    with pytest.raises(ValueError, match=r"^two tokenizers are given"):
        choose_tokenizer(ours, theirs)


def test_a_folder_of_another_kind_is_refused_by_name(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer=emu3, but .* holds one of the kind janus: .*emu3_vqgan"):
        choose_tokenizer(None, {"name": "emu3", "path": str(folders["janus"])})
    with pytest.raises(ValueError, match=r"holds none that is known here: .*encoder.jit and decoder.jit"):
        choose_tokenizer(None, {"name": "cosmos", "path": str(folders["framewise"])})
    with pytest.raises(ValueError, match=r"is another project's tokenizer: give tokenizer=emu3 tokenizer.path="):
        choose_tokenizer(str(folders["emu3"]), None)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        choose_tokenizer(None, {"name": "emu3", "path": str(tmp_path / "nowhere")})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dac"}))
    with pytest.raises(ValueError, match=r"'dac'.*emu3, janus, chameleon, flava, glm_image"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{half")
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_tokenizer(tmp_path)
