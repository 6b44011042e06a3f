"""GLM-Image's picture tokenizer: quantised features of its vision encoder, so encoder only. Source: transformers, glm_image."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from transformers import GlmImageVisionModel, GlmImageVQVAE
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vidtok.adapters.base import Options, PictureTokenizer, options_of
from vidtok.adapters.weights import load_network, options_in


class GlmImageTokenizer(PictureTokenizer):
    """GlmImageVisionModel and GlmImageVQVAE."""

    has_decoder = False

    def __init__(self, visual: GlmImageVisionModel, vqmodel: GlmImageVQVAE) -> None:
        vision, vq = visual.config, vqmodel.config
        if vision.spatial_merge_size != 1:
            raise ValueError(
                f"spatial_merge_size={vision.spatial_merge_size} reorders the patches: only a GLM-Image with 1 is read"
            )
        parts = {"vision_config": options_of(vision), "vq_config": options_of(vq)}
        kind = {"model_type": "glm_image"}
        options = Options(
            {**kind, **{name: part.values for name, part in parts.items()}},
            {**kind, **{name: part.telling for name, part in parts.items()}},
        )
        super().__init__(options, vision.patch_size, vq.num_embeddings)
        self.visual, self.vqmodel = visual, vqmodel
        self.eval()

    @classmethod
    def load(cls, folder: Path, values: Mapping[str, Any]) -> "GlmImageTokenizer":
        """Read a folder of GLM-Image, of which only the vision encoder and the quantiser are used."""
        return cls(
            load_network(GlmImageVisionModel, options_in(values, "vision_config"), folder),
            load_network(GlmImageVQVAE, options_in(values, "vq_config"), folder),
        )

    def _ids(self, pictures: Tensor) -> Tensor:
        patch, count = self.stride_s, len(pictures)
        height, width = pictures.shape[2] // patch, pictures.shape[3] // patch
        mean, spread = (torch.tensor(values, device=pictures.device) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        colours = ((pictures + 1) / 2 - mean[:, None, None]) / spread[:, None, None]
        patches = rearrange(colours, "N C (h p) (w q) -> (N h w) (C p q)", p=patch, q=patch)
        grids = torch.tensor([[1, height, width]] * count, device=pictures.device)
        features = self.visual(patches, grid_thw=grids).last_hidden_state
        ids = self.vqmodel.encode(rearrange(features, "(N h w) D -> N D h w", h=height, w=width)).image_tokens
        return rearrange(ids, "(N h w) -> N h w", h=height, w=width)
