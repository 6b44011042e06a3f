"""VidTokModel: clips to codebook indices and back, causal in time.

Unusual: time is compressed by folding patches (the first frame alone), so everything after runs at the latent frame rate. Layers
that look back keep what they need in a StreamState that the caller owns, so a long clip in chunks gives what it gives whole.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from vidtok.blocks import ChannelNorm, Downsample, Memory, Patchify, Pyramid, Upsample, ZeroConv2d
from vidtok.config import VidTokConfig
from vidtok.fingerprint import encoder_fingerprint, fingerprint
from vidtok.padding import grid_for, pad_clip, trim_clip, valid_frames
from vidtok.quantizer import build_quantizer, refill_buffers
from vidtok.streaming import StreamState, in_chunks, latents_at_once, regroup
from vidtok.tiling import run_tiled
from vidtok.video import check_video


@dataclass
class VidTokOutput(ModelOutput):
    """What a training step needs."""

    reconstruction: Tensor | None = None  # (B, 3, T, H, W), not clamped
    indices: Tensor | None = None  # (B, t, h, w) int64, None for continuous latents
    quantizer_loss: Tensor | None = None  # scalar
    quantizer_terms: dict[str, Tensor] | None = None  # scalars to log


class VidTokModel(PreTrainedModel):
    """A causal video tokenizer.

    T = 1 + k * stride_t frames become t = 1 + k latent frames of (H / stride_s, W / stride_s) tokens. Clips of other sizes are
    padded by repeating the last frame, row and column; `decode(indices, size)` and `reconstruct` cut that off again.
    """

    config_class = VidTokConfig
    base_model_prefix = "vidtok"
    main_input_name = "video"
    config: VidTokConfig
    edge_layers = ("conv_in", "conv_out")
    first_frames = 1  # pixel frames of the first latent frame

    def __init__(self, config: VidTokConfig) -> None:
        super().__init__(config)
        widths = [config.width * multiplier for multiplier in config.channel_multipliers or []]
        channels = 3 * config.stride_t * config.patch_s**2
        self.patchify = Patchify(config.stride_t, config.patch_s, config.patching == "haar")
        quantizer = build_quantizer(config)
        self.encoder = Pyramid(
            channels, widths, quantizer.channels_in, config.encoder_blocks, config.encoder_kernel,
            config.encoder_looks_back, config.norm, Downsample,
        )  # fmt: skip
        self.quantizer = quantizer
        self.decoder = Pyramid(
            quantizer.channels_out,
            widths[::-1],
            channels,
            config.decoder_blocks,
            3,
            config.decoder_looks_back,
            config.norm,
            Upsample,
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Called for leaves only: transformers passes over a module without weights of its own.
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if isinstance(module, ZeroConv2d):
                nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, ChannelNorm):
            nn.init.ones_(module.weight)
        refill_buffers(module)

    @property
    def stride_t(self) -> int:
        """Frames a latent frame stands for; the first one stands for first_frames."""
        return self.config.stride_t

    @property
    def stride_s(self) -> int:
        """Pixels a token covers on each side."""
        return self.config.stride_s

    @property
    def codebook_size(self) -> int:
        """Number of ids: all codebooks together."""
        return self.config.num_ids

    @property
    def codebook_factors(self) -> list[int]:
        """Sizes of the codebooks whose digits make an id: vidtok.digits."""
        return self.config.codebook_factors

    def valid_frames(self, frames: int) -> tuple[int, int]:
        """Give the nearest frame counts that need no padding: at most, and at least, `frames`."""
        return valid_frames(frames, self.stride_t)

    def grid_for(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Give the latent grid (t, h, w) of a clip of any size."""
        return grid_for(frames, height, width, self.stride_t, self.stride_s)

    def forward(self, video: Tensor, is_quantized: bool = True) -> VidTokOutput:
        """Reconstruct clips with gradients.

        video: (B, 3, T, H, W) in [-1, 1], of a size that needs no padding. is_quantized=False lets the latents pass as they are
        (warm-up of training).
        """
        latents = self.encoder(self.patchify(video))
        if not is_quantized:
            return VidTokOutput(self.patchify.inverse(self.decoder(self.quantizer.bypass(latents))), None, latents.new_zeros(()))
        quantized = self.quantizer(latents)
        reconstruction = self.patchify.inverse(self.decoder(quantized.codes.to(latents.dtype)))
        return VidTokOutput(reconstruction, quantized.indices, quantized.loss, quantized.terms)

    @torch.no_grad()
    def encode(
        self, video: Tensor, chunk_frames: int | None = None, tile: int | None = None, overlap: int | None = None
    ) -> Tensor:
        """Quantise clips to codebook indices.

        video: (B, 3, T, H, W) in [-1, 1], any size. Gives indices (B, t, h, w) in [0, codebook_size) of grid_for(T, H, W).
        chunk_frames: frames worked on at a time, with the state carried over, so the result is the same; None goes by free memory.
        tile, overlap: pixels a side of a tile and of the neighbours worked on with it; None: whole frames, and as far as layers look.
        Leaves the model and its codebook unchanged. Raises ValueError on a wrong range or rank, and for continuous latents.
        Source: MAGVIT-v2, arXiv:2310.05737, section 3.
        """
        self._check_discrete()
        latents = self._latents(video, chunk_frames, tile, overlap)
        with _evaluation(self):
            return self.quantizer(latents).indices

    @torch.no_grad()
    def decode(
        self,
        indices: Tensor,
        size: tuple[int, int, int] | None = None,
        chunk_frames: int | None = None,
        tile: int | None = None,
        overlap: int | None = None,
    ) -> Tensor:
        """Give the clips (B, 3, T, H, W) in [-1, 1], fp32, of indices (B, t, h, w).

        size: (T, H, W) that was encoded, to cut the padding off. Other keys as in encode. Raises ValueError on ids outside the codebook.
        """
        self._check_discrete()
        return self._video(self._codes(indices), size, chunk_frames, tile, overlap)

    @torch.no_grad()
    def reconstruct(self, video: Tensor) -> Tensor:
        """Give what decoding an encoding gives, of the video's size."""
        size = (video.shape[2], video.shape[3], video.shape[4]) if video.ndim == 5 else None
        if self.quantizer.is_discrete:
            return self.decode(self.encode(video), size)
        return self.decode_latents(self.encode_latents(video), size)

    @torch.no_grad()
    def encode_latents(
        self, video: Tensor, chunk_frames: int | None = None, tile: int | None = None, overlap: int | None = None
    ) -> Tensor:
        """Give the continuous latents (B, D, t, h, w) before quantisation, of a KL tokenizer the mean; keys as in encode."""
        return self.quantizer.bypass(self._latents(video, chunk_frames, tile, overlap))

    @torch.no_grad()
    def decode_latents(
        self,
        latents: Tensor,
        size: tuple[int, int, int] | None = None,
        chunk_frames: int | None = None,
        tile: int | None = None,
        overlap: int | None = None,
    ) -> Tensor:
        """Give the clips (B, 3, T, H, W) in [-1, 1], fp32, of codes or continuous latents (B, D, t, h, w); keys as in decode."""
        return self._video(latents, size, chunk_frames, tile, overlap)

    @torch.no_grad()
    def encode_chunk(self, video: Tensor, state: StreamState | None = None) -> tuple[Tensor, StreamState]:
        """Encode the next frames of a clip: 1 + k * stride_t without a state (the clip's start), k * stride_t with one.

        Gives indices (B, n, h, w) and the state for the next call. Sides must be multiples of stride_s. Raises ValueError otherwise.
        """
        self._check_discrete()
        check_video(video)
        frames, height, width = video.shape[2:]
        is_start = state is None
        if (frames - is_start) % self.stride_t or height % self.stride_s or width % self.stride_s:
            raise ValueError(
                f"a chunk of {frames} frames of {height}x{width} does not fit stride_t={self.stride_t} and stride_s={self.stride_s}: give "
                f"{'1 + ' if is_start else ''}k * {self.stride_t} frames whose sides are multiples of {self.stride_s}"
            )
        with _evaluation(self):
            latents, state = self._encode_step(video, state)
            return self.quantizer(latents).indices, state

    @torch.no_grad()
    def decode_chunk(self, indices: Tensor, state: StreamState | None = None) -> tuple[Tensor, StreamState]:
        """Decode the next latent frames (B, n, h, w): 1 + (n - 1) * stride_t frames without a state, n * stride_t with one."""
        self._check_discrete()
        with _evaluation(self):
            return self._decode_step(self._codes(indices), state)

    def stream_encode(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield indices (B, n, h, w) of a video of unknown length that comes as (B, 3, m, H, W), any m.

        Equal to encode of the whole; memory goes by the largest m, not by the length.
        Frames of other sides are padded; the last step of time too.
        """
        state: StreamState | None = None
        for video in regroup(chunks, self.stride_t):
            _, h, w = self.grid_for(*video.shape[2:])
            indices, state = self.encode_chunk(pad_clip(video, video.shape[2], h * self.stride_s, w * self.stride_s), state)
            yield indices

    def stream_decode(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield clips (B, 3, m, H, W) of indices that come as (B, n, h, w), any n; equal to decode of the whole."""
        state: StreamState | None = None
        for indices in chunks:
            video, state = self.decode_chunk(indices, state)
            yield video

    def fingerprint(self) -> str:
        """Give 16 hex digits that name these weights and this architecture."""
        return fingerprint(self)

    def encoder_fingerprint(self) -> str:
        """Give 16 hex digits that name what decides over indices: encoder and codebook, not the decoder."""
        return encoder_fingerprint(self)

    def _latents(self, video: Tensor, chunk_frames: int | None, tile: int | None = None, overlap: int | None = None) -> Tensor:
        check_video(video)
        _, h, w = self.grid_for(*video.shape[2:])
        video = pad_clip(video, self.valid_frames(video.shape[2])[1], h * self.stride_s, w * self.stride_s)

        def work(part: Tensor) -> Tensor:
            steps = self._steps_at_once(part.shape[3:], chunk_frames, len(part))
            first = 1 + (steps - 1) * self.stride_t
            return torch.cat(list(in_chunks(self._encode_step, part, first, steps * self.stride_t)), dim=2)

        with _evaluation(self):
            if tile is None:
                return work(video)
            reach = self.encoder.reach(self.config.patch_s)
            cells, overlap, _ = self._tile(tile, overlap, reach)
            return run_tiled(work, video, (h, w), (self.stride_s, 1), cells, overlap, 0)

    def _video(
        self,
        codes: Tensor,
        size: tuple[int, int, int] | None,
        chunk_frames: int | None,
        tile: int | None = None,
        overlap: int | None = None,
    ) -> Tensor:
        def work(part: Tensor) -> Tensor:
            sides = [side * self.stride_s for side in part.shape[3:]]
            steps = self._steps_at_once(sides, chunk_frames, len(part))
            return torch.cat(list(in_chunks(self._decode_step, part, steps, steps)), dim=2)

        with _evaluation(self):
            if tile is None:
                return trim_clip(work(codes), size)
            cells, overlap, ramp = self._tile(tile, overlap, self.decoder.reach(self.stride_s))
            height, width = codes.shape[3:]
            return trim_clip(run_tiled(work, codes, (height, width), (1, self.stride_s), cells, overlap, ramp), size)

    def _encode_step(self, video: Tensor, state: StreamState | None) -> tuple[Tensor, StreamState]:
        memory = Memory(None if state is None else state.tensors)
        latents = self.encoder(self.patchify(video.to(self.device, self.dtype), state is None), memory)
        return latents, StreamState(tuple(memory.kept))

    def _decode_step(self, codes: Tensor, state: StreamState | None) -> tuple[Tensor, StreamState]:
        memory = Memory(None if state is None else state.tensors)
        patches = self.decoder(codes.to(self.device, self.dtype), memory)
        return self.patchify.inverse(patches, state is None).float().clamp(-1, 1), StreamState(tuple(memory.kept))

    def _codes(self, indices: Tensor) -> Tensor:
        if indices.ndim != 4:
            raise ValueError(f"indices have shape {tuple(indices.shape)}, not (B, t, h, w): add or remove axes")
        return self.quantizer.decode(indices.to(self.device))

    def _steps_at_once(self, sides: Iterable[int], chunk_frames: int | None, batch: int) -> int:
        """Give the latent frames of a chunk of `batch` clips."""
        if chunk_frames is not None:
            if chunk_frames < 1:
                raise ValueError(f"chunk_frames={chunk_frames} is no chunk: give 1 or more, or null to go by free memory")
            return max(1, chunk_frames // self.stride_t)
        height, width = sides
        config = self.config
        places = height * width // config.patch_s**2
        # About eight maps of the finest width live at once, and the frames themselves three times, in fp32.
        return latents_at_once(4 * batch * (8 * config.width * places + 9 * config.stride_t * height * width), self.device)

    def _tile(self, tile: int, overlap: int | None, reach: int) -> tuple[int, int, int]:
        """Give a tile's cells, its overlap and its ramp in cells; reach: pixels that layers look beyond a token."""
        if tile < self.stride_s or (overlap is not None and overlap < 0):
            raise ValueError(
                f"tile={tile} and overlap={overlap} are in pixels: a tile needs {self.stride_s} or more, an overlap 0 or more"
            )
        far = -(-reach // self.stride_s)
        cells = far if overlap is None else min(far, -(-overlap // self.stride_s))
        # As far as layers look, a tile's own part is exact and is cut out; nearer, its error fades towards the tile's middle.
        tile_cells = tile // self.stride_s
        # Ramps of two borders must not meet inside a tile, or three tiles would share a place.
        ramp = min(max(1, cells // 2), tile_cells // 2) if 0 < cells < far else 0
        return tile_cells, cells, ramp

    def _check_discrete(self) -> None:
        if not self.quantizer.is_discrete:
            raise ValueError(
                f"quantizer={self.config.quantizer} has continuous latents and no indices: use encode_latents and decode_latents"
            )


class _evaluation:
    """Put a model into eval mode and back, each part as it was: encoding must not move an EMA codebook, frozen parts stay frozen."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.modes = model, [(module, module.training) for module in model.modules()]

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        for module, was_training in self.modes:
            module.training = was_training
