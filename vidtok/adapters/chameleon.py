"""Chameleon's picture tokenizer: 16x16 pixels a token, encoder only. Source: Make-A-Scene, arXiv:2203.13131; arXiv:2405.09818."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from einops import rearrange
from torch import Tensor
from transformers import ChameleonVQVAE

from vidtok.adapters.base import PictureTokenizer, options_of
from vidtok.adapters.weights import load_network, options_in


class ChameleonTokenizer(PictureTokenizer):
    """ChameleonVQVAE."""

    has_decoder = False

    def __init__(self, network: ChameleonVQVAE) -> None:
        config = network.config
        super().__init__(options_of(config), 2 ** (len(config.channel_multiplier) - 1), config.num_embeddings)
        self.network = network
        self.eval()

    @classmethod
    def load(cls, folder: Path, values: Mapping[str, Any]) -> "ChameleonTokenizer":
        """Read a folder of the tokenizer alone, or of a Chameleon that contains it."""
        # What is taken out is the first layer of a decoder that is not there.
        return cls(load_network(ChameleonVQVAE, options_in(values, "vq_config"), folder, unused="post_quant_conv"))

    def _ids(self, pictures: Tensor) -> Tensor:
        ids = self.network.encode(pictures).image_tokens
        return rearrange(ids, "(N h w) -> N h w", N=len(pictures), h=pictures.shape[2] // self.stride_s)
