"""Emu3's video tokenizer: 4 frames of 8x8 pixels a token. Source: Emu3, arXiv:2409.18869, section 2.

The class of transformers crops time and height where it means height and width (5.23), and works on all frames at once. So its
parts are run here: the picture network some frames at a time, and only the small temporal part on the whole clip.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from transformers import Emu3VQVAE

from vidtok.adapters.base import ForeignTokenizer, a_few_at_a_time, options_of
from vidtok.adapters.weights import load_network, options_in
from vidtok.video import check_video


class Emu3Tokenizer(ForeignTokenizer):
    """Emu3VQVAE. A latent frame stands for stride_t frames, the first one too."""

    def __init__(self, network: Emu3VQVAE) -> None:
        config = network.config
        stride_s = 2 ** (len(config.channel_multiplier) - 1)
        super().__init__(options_of(config), config.temporal_downsample_factor, stride_s, config.codebook_size)
        self.first_frames = self.stride_t
        self.network = network
        self.eval()

    @classmethod
    def load(cls, folder: Path, values: Mapping[str, Any]) -> "Emu3Tokenizer":
        """Read a folder of the tokenizer alone, or of an Emu3 that contains it."""
        return cls(load_network(Emu3VQVAE, options_in(values, "vq_config"), folder))

    @torch.no_grad()
    def stream_encode(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield once: the ids (B, t, h, w) of a video that comes as (B, 3, m, H, W), any m. Only its small features are kept."""
        features = []
        for chunk in chunks:
            check_video(chunk)
            features.append(self._features(self._padded(chunk, whole=False).to(self.device)))
        yield self._checked(self._quantise(torch.cat(features, dim=2)))

    def _encode(self, video: Tensor) -> Tensor:
        return self._quantise(self._features(video))

    def _features(self, video: Tensor) -> Tensor:
        """Give the features (B, D, T, h, w) of frames, each by itself."""
        encoder = self.network.encoder

        def look(pictures: Tensor) -> Tensor:
            hidden = encoder.middle_block(encoder.down_block(encoder.conv_in(pictures)))
            return encoder.conv_out(F.silu(encoder.norm_out(hidden)))

        features = a_few_at_a_time(look, rearrange(video, "B C T H W -> (B T) C H W"))
        return rearrange(features, "(B T) D h w -> B D T h w", B=len(video))

    def _quantise(self, features: Tensor) -> Tensor:
        # Repeating a frame at the end repeats its features: no layer before here looks at another frame.
        missing = self.valid_frames(features.shape[2])[1] - features.shape[2]
        hidden = torch.cat([features, features[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
        for conv in self.network.encoder.time_conv:
            hidden = F.silu(conv(hidden))
        for block in self.network.encoder.time_res_stack:
            hidden = block(hidden)
        return self.network.quantize(rearrange(self.network.quant_conv(hidden), "B D t h w -> B t D h w"))

    def _decode(self, indices: Tensor) -> Tensor:
        network, decoder = self.network, self.network.decoder
        codes = rearrange(network.quantize.embedding(indices), "B t h w D -> B D t h w")
        # The codes go beside the latents through the temporal layers, to steer the norms of the picture network.
        hidden = torch.cat([network.post_quant_conv(codes), codes])
        for block in decoder.time_res_stack:
            hidden = block(hidden)
        for conv in decoder.time_conv:
            hidden = F.silu(conv(hidden))

        def paint(latents: Tensor, steering: Tensor) -> Tensor:
            maps = decoder.up_block(decoder.middle_block(decoder.conv_in(latents), steering), steering)
            return decoder.conv_out(F.silu(decoder.norm_out(maps, steering)))

        latents, steering = rearrange(hidden, "(two B) D T h w -> two (B T) D h w", two=2)
        pictures = a_few_at_a_time(paint, latents, steering, pixels=self.stride_s**2)
        return rearrange(pictures, "(B T) C H W -> B C T H W", B=len(indices))
