"""Janus' picture tokenizer: 16x16 pixels a token. Source: LlamaGen, arXiv:2406.06525, section 3.1; Janus, arXiv:2410.13848.

The decoder of transformers (5.23) looks codes up with length 1, its encoder compares them at the length they are stored with: what
is nearest there need not be what is decoded. Here both have length 1, as in LlamaGen. Grids of any shape are decoded, not the one
square of the config alone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from transformers import JanusVQVAE

from vidtok.adapters.base import PictureTokenizer, options_of
from vidtok.adapters.weights import load_network, options_in


class JanusTokenizer(PictureTokenizer):
    """JanusVQVAE."""

    def __init__(self, network: JanusVQVAE) -> None:
        config = network.config
        super().__init__(options_of(config), 2 ** (len(config.channel_multiplier) - 1), config.num_embeddings)
        self.network = network
        self.eval()

    @classmethod
    def load(cls, folder: Path, values: Mapping[str, Any]) -> "JanusTokenizer":
        """Read a folder of the tokenizer alone, or of a Janus that contains it."""
        return cls(load_network(JanusVQVAE, options_in(values, "vq_config"), folder))

    def _ids(self, pictures: Tensor) -> Tensor:
        latents = self.network.quant_conv(self.network.encoder(pictures))
        latents = F.normalize(rearrange(latents, "N D h w -> N h w D"), dim=-1)
        # Among vectors of length 1 the nearest is the one with the largest product.
        return (latents @ self._codes().T).argmax(dim=-1)

    def _pictures(self, ids: Tensor) -> Tensor:
        codes = rearrange(self._codes()[ids], "N h w D -> N D h w")
        return self.network.decoder(self.network.post_quant_conv(codes))

    def _codes(self) -> Tensor:
        return F.normalize(self.network.quantize.embedding.weight, dim=-1)
