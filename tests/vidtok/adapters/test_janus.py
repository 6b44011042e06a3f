"""Janus' tokenizer encodes to what its decoder looks up, and decodes grids of any shape."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import JanusConfig, JanusForConditionalGeneration, JanusVQVAE, JanusVQVAEConfig

from vidtok.adapters.janus import JanusTokenizer


@pytest.fixture
def network(picture_options) -> JanusVQVAE:
    return JanusVQVAE(JanusVQVAEConfig(**picture_options, num_patches=8)).requires_grad_(False)


def test_pixels_are_those_of_the_class_on_its_one_square_grid(network: JanusVQVAE, noise: Callable[..., Tensor]) -> None:
    tokenizer = JanusTokenizer(network)
    ids = tokenizer.encode(noise(2, 3, 1, 32, 32))
    assert ids.shape == (2, 1, 8, 8)
    expected = network.decode(ids.flatten(1)).clamp(-1, 1)
    torch.testing.assert_close(tokenizer.decode(ids)[:, :, 0], expected, atol=1e-4, rtol=0)


def test_another_grid_is_decoded_where_the_class_refuses(network: JanusVQVAE, noise: Callable[..., Tensor]) -> None:
    tokenizer, video = JanusTokenizer(network), noise(2, 3, 3, 30, 50)
    ids = tokenizer.encode(video)
    assert ids.shape == (2, 3, 8, 13)
    with pytest.raises(ValueError, match="Expected"):
        network.decode(ids[:, 0].flatten(1))
    assert tokenizer.reconstruct(video).shape == video.shape
    assert torch.equal(tokenizer.encode(video[:, :, 1:2]), ids[:, 1:2])


def test_an_id_is_the_nearest_of_the_codes_that_the_decoder_looks_up(network: JanusVQVAE, noise: Callable[..., Tensor]) -> None:
    pictures = noise(1, 3, 32, 48)
    latents = network.quant_conv(network.encoder(pictures)).double().numpy()
    latents = np.moveaxis(latents, 1, -1).reshape(-1, 4)
    codes = network.quantize.get_codebook_entry(torch.arange(64)[None]).double().numpy().reshape(4, 64).T
    assert np.allclose(np.linalg.norm(codes, axis=1), 1)
    latents /= np.linalg.norm(latents, axis=1, keepdims=True)
    nearest = np.linalg.norm(latents[:, None] - codes, axis=2).argmin(axis=1)
    found = JanusTokenizer(network).encode(pictures[:, :, None])
    assert found.flatten().tolist() == nearest.tolist()


def test_with_codes_of_length_1_the_class_finds_the_same_ids(network: JanusVQVAE, noise: Callable[..., Tensor]) -> None:
    pictures, tokenizer = noise(2, 3, 32, 32), JanusTokenizer(network)
    assert not torch.equal(tokenizer.encode(pictures[:, :, None]).flatten(), network.encode(pictures).image_tokens)
    network.quantize.embedding.weight.copy_(F.normalize(network.quantize.embedding.weight, dim=-1))
    assert torch.equal(tokenizer.encode(pictures[:, :, None]).flatten(), network.encode(pictures).image_tokens)


def test_a_janus_with_its_language_model_holds_the_same_tokenizer(network, saved, text_options, picture_options) -> None:
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 4}
    config = JanusConfig(
        vq_config={**picture_options, "num_patches": 8}, vision_config={**vision, "projection_dim": 32}, text_config=text_options
    )
    whole = JanusForConditionalGeneration(config)
    whole.model.vqmodel.load_state_dict(network.state_dict())
    assert JanusTokenizer.load(*saved(whole)).fingerprint() == JanusTokenizer.load(*saved(network, "alone")).fingerprint()
