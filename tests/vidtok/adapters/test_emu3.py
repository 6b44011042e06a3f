"""Emu3's tokenizer gives what the class itself gives where that is right, and the right thing where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Emu3Config, Emu3ForConditionalGeneration, Emu3VQVAE, Emu3VQVAEConfig

from vidtok.adapters import base, emu3
from vidtok.adapters.emu3 import Emu3Tokenizer

OPTIONS: dict[str, Any] = {"codebook_size": 64, "embed_dim": 4, "latent_channels": 4, "base_channels": 32, "hidden_size": 32}
OPTIONS |= {"channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [3]}
NO_CROP = 10_000


@pytest.fixture
def network(lively: Callable[[Emu3VQVAE], None]) -> Emu3VQVAE:
    network = Emu3VQVAE(Emu3VQVAEConfig(**OPTIONS)).requires_grad_(False)
    lively(network)
    return network


def class_ids(network: Emu3VQVAE, video: Tensor, height: int = NO_CROP, width: int = NO_CROP) -> Tensor:
    """Encode with the class's own method: B T C H W in, a list of grids out."""
    sizes = torch.tensor([[height, width]] * len(video))
    return torch.stack(list(network.encode(video.transpose(1, 2), sizes).image_tokens))


@pytest.mark.parametrize("size", [(4, 32, 32), (12, 32, 48), (8, 40, 24)])
def test_ids_and_pixels_are_those_of_the_class(network, noise, size: tuple[int, int, int]) -> None:
    tokenizer, video = Emu3Tokenizer(network), noise(2, 3, *size)
    ids = tokenizer.encode(video)
    assert ids.dtype == torch.int64 and ids.shape == (2, size[0] // 4, size[1] // 8, size[2] // 8)
    assert ids.unique().numel() > 5
    assert torch.equal(ids, class_ids(network, video))
    expected = network.decode(ids).transpose(1, 2).clamp(-1, 1)
    torch.testing.assert_close(tokenizer.decode(ids), expected, atol=1e-4, rtol=0)


def test_wide_video_keeps_every_latent_frame_and_row_which_the_class_crops_away(network, noise) -> None:
    video = noise(1, 3, 16, 16, 32)
    assert class_ids(network, video, 16, 32).shape == (1, 2, 2, 4)
    assert Emu3Tokenizer(network).encode(video).shape == (1, 4, 2, 4)


def test_a_clip_that_does_not_fit_is_padded_by_repetition_and_trimmed(network, noise) -> None:
    tokenizer, video = Emu3Tokenizer(network), noise(1, 3, 10, 30, 45)
    padded = torch.cat([video, video[:, :, -1:].repeat(1, 1, 2, 1, 1)], dim=2)
    padded = torch.cat([padded, padded[..., -1:].repeat(1, 1, 1, 1, 3)], dim=4)
    padded = torch.cat([padded, padded[..., -1:, :].repeat(1, 1, 1, 2, 1)], dim=3)
    assert torch.equal(tokenizer.encode(video), tokenizer.encode(padded))
    assert tokenizer.grid_for(10, 30, 45) == (3, 4, 6)
    assert tokenizer.reconstruct(video).shape == video.shape
    assert (tokenizer.first_frames, tokenizer.valid_frames(10), tokenizer.valid_frames(2)) == (4, (8, 12), (4, 4))


@pytest.mark.parametrize("chunks", [(12,), (1, 4, 7), (5, 5, 2), (3, 3, 3, 2)])
def test_a_stream_gives_what_the_whole_gives(network, noise, chunks: tuple[int, ...]) -> None:
    tokenizer, video = Emu3Tokenizer(network), noise(1, 3, sum(chunks), 30, 32)
    streamed = torch.cat(list(tokenizer.stream_encode(video.split(chunks, dim=2))), dim=1)
    assert torch.equal(streamed, tokenizer.encode(video))


def test_a_token_sees_no_later_frame(network, noise) -> None:
    tokenizer, video = Emu3Tokenizer(network), noise(1, 3, 12, 32, 32)
    assert torch.equal(tokenizer.encode(video[:, :, :8]), tokenizer.encode(video)[:, :2])


def test_a_few_frames_at_a_time_change_nothing(network, noise, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, video = Emu3Tokenizer(network), noise(2, 3, 8, 32, 32)
    ids, pixels = tokenizer.encode(video), tokenizer.reconstruct(video)
    monkeypatch.setattr(base, "PIXELS_AT_ONCE", 3 * 32 * 32)
    assert torch.equal(tokenizer.encode(video), ids)
    torch.testing.assert_close(tokenizer.reconstruct(video), pixels, atol=1e-5, rtol=0)


def test_a_few_latents_at_a_time_change_no_id(network, noise, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, video, counts = Emu3Tokenizer(network), noise(2, 3, 8, 40, 32), []
    network.quantize.register_forward_pre_hook(lambda _, inputs: counts.append(inputs[0].shape[-1]))
    ids = tokenizer.encode(video)
    assert counts == [2 * 2 * 5 * 4]
    monkeypatch.setattr(emu3, "DISTANCES_AT_ONCE", 7 * 64 + 1)
    assert torch.equal(tokenizer.encode(video), ids)
    assert counts[1:] == [7] * 11 + [3]
    assert torch.equal(ids, class_ids(network, video))


@pytest.mark.parametrize(("factor", "stride_t"), [(1, 1), (2, 2), (3, 2)])
def test_the_temporal_stride_is_what_the_network_does(noise, factor: int, stride_t: int) -> None:
    tokenizer = Emu3Tokenizer(Emu3VQVAE(Emu3VQVAEConfig(**OPTIONS, temporal_downsample_factor=factor)))
    assert (tokenizer.stride_t, tokenizer.first_frames) == (stride_t, stride_t)
    assert tokenizer.decode(tokenizer.encode(noise(1, 3, 6, 16, 16))).shape == (1, 3, 6, 16, 16)


@pytest.mark.parametrize("chunks", [(3,), (1, 2)])
def test_pictures_come_in_pieces_of_a_few_frames(
    network, noise, chunks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Emu3Tokenizer(network)
    ids = tokenizer.encode(noise(2, 3, 12, 16, 24))
    expected = tokenizer.decode(ids)
    monkeypatch.setattr(emu3, "PIXELS_AT_ONCE", 5 * 2 * 16 * 24)
    pieces = list(tokenizer.stream_decode(ids.split(chunks, dim=1)))
    assert [piece.shape[2] for piece in pieces] == [5, 5, 2]
    torch.testing.assert_close(torch.cat(pieces, dim=2), expected, atol=1e-5, rtol=0)


def test_autocast_changes_nothing(network, noise) -> None:
    tokenizer, video = Emu3Tokenizer(network), noise(1, 3, 8, 32, 32)
    ids, pixels = tokenizer.encode(video), tokenizer.reconstruct(video)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer.encode(video), ids)
        assert torch.equal(next(tokenizer.stream_encode([video])), ids)
        assert torch.equal(tokenizer.decode(ids), pixels)
        (streamed,) = tokenizer.stream_decode([ids])
        assert streamed.dtype == torch.float32 and torch.allclose(streamed, pixels, atol=1e-5)


def test_train_mode_is_never_entered(network, noise) -> None:
    tokenizer, video = Emu3Tokenizer(network), noise(2, 3, 8, 32, 32)
    ids, before = tokenizer.encode(video), tokenizer.fingerprint()
    assert torch.equal(tokenizer.train().encode(video), ids)
    assert not network.training and tokenizer.fingerprint() == before


def test_an_emu3_with_its_language_model_holds_the_same_tokenizer(network, noise, saved, text_options, tmp_path) -> None:
    vocabulary = {"<image>": 1, "<|extra_200|>": 2}
    config = Emu3Config(vq_config=OPTIONS, text_config=text_options, vocabulary_map=vocabulary)
    whole = Emu3ForConditionalGeneration(config)
    whole.model.vqmodel.load_state_dict(network.state_dict())
    alone, inside = Emu3Tokenizer.load(*saved(network)), Emu3Tokenizer.load(*saved(whole, "whole", max_shard_size="100KB"))
    video = noise(1, 3, 8, 32, 32)
    assert torch.equal(alone.encode(video), class_ids(network, video))
    assert inside.fingerprint() == alone.fingerprint() == Emu3Tokenizer(network).fingerprint()
    inside.save_pretrained(tmp_path / "copy")
    files = {path.name for path in (tmp_path / "copy").iterdir()}
    assert files == {"config.json", "model.safetensors"}
    assert (tmp_path / "copy" / "model.safetensors").stat().st_size < 1.1 * sum(
        tensor.nbytes for tensor in network.state_dict().values()
    )
    assert Emu3Tokenizer.load(tmp_path / "copy", inside.values).fingerprint() == alone.fingerprint()
    assert torch.equal(class_ids(Emu3VQVAE.from_pretrained(tmp_path / "copy"), video), class_ids(network, video))


def test_one_changed_weight_or_option_changes_the_name(network) -> None:
    tokenizer = Emu3Tokenizer(network)
    before = tokenizer.fingerprint()
    network.quantize.embedding.weight[3, 2] += 1e-3
    changed = tokenizer.fingerprint()
    other = Emu3VQVAE(Emu3VQVAEConfig(**OPTIONS, num_attention_heads=2))
    other.load_state_dict(network.state_dict())
    assert len({before, changed, Emu3Tokenizer(other).fingerprint()}) == 3


def test_an_option_that_a_newer_library_adds_does_not_change_the_name(network, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Emu3Tokenizer(network).fingerprint()
    to_dict = Emu3VQVAEConfig.to_dict
    monkeypatch.setattr(Emu3VQVAEConfig, "to_dict", lambda config: {**to_dict(config), "new_option": 3})
    assert Emu3Tokenizer(network).fingerprint() == before


def test_wrong_input_is_one_sentence(network, noise) -> None:
    tokenizer = Emu3Tokenizer(network)
    with pytest.raises(ValueError, match=r"lie in \[-1, 1\]"):
        tokenizer.encode(noise(1, 3, 4, 32, 32) * 2)
    with pytest.raises(ValueError, match="id 64 lies outside the codebook of 64"):
        tokenizer.decode(torch.full((1, 1, 4, 4), 64))
    with pytest.raises(ValueError, match=r"not \(B, t, h, w\)"):
        tokenizer.decode(torch.zeros(4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="cannot be cut from a decoded clip"):
        tokenizer.decode(torch.zeros(1, 1, 4, 4, dtype=torch.int64), (5, 32, 32))
