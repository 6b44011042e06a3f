"""Emu3's video tokenizer: 4 frames of 8x8 pixels a token. Source: Emu3, arXiv:2409.18869, section 2.

The class of transformers crops time and height where it means height and width (5.23), and works on all frames at once. So its
parts are run here: the picture network some frames at a time, only the small temporal part on the whole clip, and the quantiser some
latents at a time.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from transformers import Emu3VQVAE

from vidtok.adapters.base import PIXELS_AT_ONCE, ForeignTokenizer, a_few_at_a_time, options_of
from vidtok.adapters.weights import load_network, options_in
from vidtok.digits import check_indices
from vidtok.streaming import check_same_size
from vidtok.video import check_video

# Numbers in one of the class's three matrices of a distance for every latent and code: 128 MB each.
DISTANCES_AT_ONCE = 1 << 25


class Emu3Tokenizer(ForeignTokenizer):
    """Emu3VQVAE. A latent frame stands for stride_t frames, the first one too."""

    def __init__(self, network: Emu3VQVAE) -> None:
        config = network.config
        stride_s = 2 ** (len(config.channel_multiplier) - 1)
        # The class rounds temporal_downsample_factor down to a power of 2.
        super().__init__(options_of(config), 2 ** len(network.encoder.time_conv), stride_s, config.codebook_size)
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
        for chunk in check_same_size(chunks):
            check_video(chunk)
            with self._in_fp32():
                features.append(self._features(self._padded(chunk, whole=False).to(self.device)))
        with self._in_fp32():
            ids = self._checked(self._quantise(torch.cat(features, dim=2)))
        yield ids

    @torch.no_grad()
    def stream_decode(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield clips (B, 3, m, H, W) in [-1, 1] of ids that come as (B, n, h, w), any n, once all have come: no pictures are kept."""
        indices = torch.cat(list(check_same_size(chunks, "Bnhw")), dim=1)
        check_indices(indices)
        with self._in_fp32():
            hidden = self._hidden(self._checked(indices.to(self.device).long()))
        for part in hidden.split(max(1, PIXELS_AT_ONCE // (indices[:, 0].numel() * self.stride_s**2)), dim=2):
            with self._in_fp32():
                video = self._painted(part)
            yield video.clamp(-1, 1)

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
        return self._nearest(self.network.quant_conv(hidden))

    def _nearest(self, latents: Tensor) -> Tensor:
        """Give the ids (B, t, h, w) of the codes nearest to latents (B, D, t, h, w)."""
        shape = {"B": len(latents), "t": latents.shape[2], "h": latents.shape[3]}
        parts = rearrange(latents, "B D t h w -> (B t h w) D").split(max(1, DISTANCES_AT_ONCE // self.codebook_size))
        ids = [self.network.quantize(rearrange(part, "N D -> 1 1 D 1 N")).flatten() for part in parts]
        return rearrange(torch.cat(ids), "(B t h w) -> B t h w", **shape)

    def _decode(self, indices: Tensor) -> Tensor:
        return self._painted(self._hidden(indices))

    def _hidden(self, indices: Tensor) -> Tensor:
        """Give what the picture network needs for every frame, (2 B, D, T, h, w): the latents, then the codes that steer its norms."""
        network, decoder = self.network, self.network.decoder
        codes = rearrange(network.quantize.embedding(indices), "B t h w D -> B D t h w")
        # The codes go beside the latents through the temporal layers.
        hidden = torch.cat([network.post_quant_conv(codes), codes])
        for block in decoder.time_res_stack:
            hidden = block(hidden)
        for conv in decoder.time_conv:
            hidden = F.silu(conv(hidden))
        return hidden

    def _painted(self, hidden: Tensor) -> Tensor:
        """Give the pictures (B, 3, T, H, W) of hidden (2 B, D, T, h, w), each by itself."""
        decoder = self.network.decoder

        def paint(latents: Tensor, steering: Tensor) -> Tensor:
            maps = decoder.up_block(decoder.middle_block(decoder.conv_in(latents), steering), steering)
            return decoder.conv_out(F.silu(decoder.norm_out(maps, steering)))

        latents, steering = rearrange(hidden, "(two B) D T h w -> two (B T) D h w", two=2)
        pictures = a_few_at_a_time(paint, latents, steering, pixels=self.stride_s**2)
        return rearrange(pictures, "(B T) C H W -> B C T H W", T=hidden.shape[2])
