"""The tokenizers without a decoder: ids are those of their classes, and frames are refused in one sentence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import Tensor
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonVQVAE,
    ChameleonVQVAEConfig,
    FlavaImageCodebook,
    FlavaImageCodebookConfig,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
)
from transformers.models.flava.image_processing_pil_flava import FlavaImageProcessorPil
from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil

from vidtok.adapters.base import PictureTokenizer
from vidtok.adapters.chameleon import ChameleonTokenizer
from vidtok.adapters.flava import FlavaTokenizer
from vidtok.adapters.glm_image import GlmImageTokenizer
from vidtok.video import to_video

# Patches of one colour each: averages of noise look alike, and so would their ids.
BYTES = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2)


def check_encoder(tokenizer: PictureTokenizer, expected: Tensor, stride: int) -> None:
    video = to_video(BYTES)[None]
    ids = tokenizer.encode(video)
    assert ids.shape == (1, 2, 32 // stride, 48 // stride)
    assert ids.unique().numel() > 5
    assert torch.equal(ids.flatten(), expected.flatten())
    assert tokenizer.encode(video[:, :, :, :-1, :-3]).shape == ids.shape
    with pytest.raises(ValueError, match="has no decoder in transformers"):
        tokenizer.decode(ids)


def test_chameleon(saved, picture_options, text_options) -> None:
    options = {**picture_options, "resolution": 32}
    network = ChameleonVQVAE(ChameleonVQVAEConfig(**options)).requires_grad_(False)
    expected = network.encode(rearrange(to_video(BYTES), "C T H W -> T C H W")).image_tokens
    check_encoder(ChameleonTokenizer.load(*saved(network)), expected, 4)
    whole = ChameleonForConditionalGeneration(
        ChameleonConfig(**{**text_options, "vq_config": options, "vocabulary_map": {"<image>": 1}})
    )
    whole.model.vqmodel.load_state_dict(network.state_dict())
    check_encoder(ChameleonTokenizer.load(*saved(whole, "whole")), expected, 4)


def test_flava_sees_pixels_as_its_own_processor_gives_them(saved) -> None:
    network = FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=8, vocab_size=64, num_blocks_per_group=1))
    for weight in network.parameters():
        # All values are positive here: as it is, their mean would decide over nearly every id.
        weight.data -= weight.data.mean(dim=(1, 2, 3), keepdim=True) if weight.ndim == 4 else weight.data
    keys: dict[str, Any] = {"return_codebook_pixels": True, "codebook_do_resize": False, "codebook_do_center_crop": False}
    pixels = FlavaImageProcessorPil(**keys)(list(BYTES), return_tensors="pt")["codebook_pixel_values"]
    check_encoder(FlavaTokenizer.load(*saved(network)), network.get_codebook_indices(pixels), 8)


@pytest.fixture
def glm_image(text_options) -> GlmImageForConditionalGeneration:
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "image_size": 64, "patch_size": 8, "intermediate_size": 32}
    vq = {"embed_dim": 16, "num_embeddings": 64, "latent_channels": 32}
    text = {**text_options, "vision_vocab_size": 66, "head_dim": 16}
    return GlmImageForConditionalGeneration(GlmImageConfig(vision_config=vision, vq_config=vq, text_config=text)).requires_grad_(
        False
    )


def test_glm_image_sees_patches_as_its_own_processor_gives_them(glm_image, saved, tmp_path) -> None:
    keys: dict[str, Any] = {"do_resize": False, "patch_size": 8, "merge_size": 1, "temporal_patch_size": 1}
    seen = GlmImageImageProcessorPil(**keys)(list(BYTES), return_tensors="pt")
    features = glm_image.model.visual(seen["pixel_values"], grid_thw=seen["image_grid_thw"]).last_hidden_state
    grids = rearrange(features, "(N h w) D -> N D h w", h=4, w=6)
    tokenizer = GlmImageTokenizer.load(*saved(glm_image))
    check_encoder(tokenizer, glm_image.get_image_tokens(grids), 8)
    tokenizer.save_pretrained(tmp_path / "copy")
    assert GlmImageTokenizer.load(tmp_path / "copy", tokenizer.values).fingerprint() == tokenizer.fingerprint()


def test_glm_image_with_merged_patches_is_refused(glm_image, saved) -> None:
    folder, values = saved(glm_image)
    values["vision_config"]["spatial_merge_size"] = 2
    with pytest.raises(ValueError, match="spatial_merge_size=2"):
        GlmImageTokenizer.load(folder, values)
