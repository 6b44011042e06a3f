"""FLAVA's picture codebook, the encoder of DALL-E's dVAE: 8x8 pixels a token, encoder only. Source: arXiv:2102.12092, section 2."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import FlavaImageCodebook

from vidtok.adapters.base import PictureTokenizer, options_of
from vidtok.adapters.weights import load_network, options_in

STRIDE = 8  # three poolings, fixed in the class
MARGIN = 0.1  # of the logit-Laplace distribution: pixels lie in [0.1, 0.9]


class FlavaTokenizer(PictureTokenizer):
    """FlavaImageCodebook."""

    has_decoder = False

    def __init__(self, network: FlavaImageCodebook) -> None:
        super().__init__(options_of(network.config), STRIDE, network.config.vocab_size)
        self.network = network
        self.eval()

    @classmethod
    def load(cls, folder: Path, values: Mapping[str, Any]) -> "FlavaTokenizer":
        """Read a folder of the codebook alone, or of a FLAVA that contains it."""
        return cls(load_network(FlavaImageCodebook, options_in(values, "image_codebook_config"), folder))

    def _ids(self, pictures: Tensor) -> Tensor:
        return self.network.get_codebook_indices((1 - 2 * MARGIN) * (pictures + 1) / 2 + MARGIN)
