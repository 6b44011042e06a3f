"""VidTokModel: clips to codebook indices and back, causal in time.

Unusual: time is compressed by folding patches (the first frame alone), so everything after runs at the latent frame rate. Layers
that look back keep what they need in a StreamState that the caller owns, so a long clip in parts gives what it gives whole.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from vidtok.blocks import ChannelNorm, Downsample, Memory, Patchify, Pyramid, Upsample, ZeroConv2d
from vidtok.config import VidTokConfig
from vidtok.digits import check_indices
from vidtok.fingerprint import encoder_fingerprint, fingerprint
from vidtok.padding import grid_for, pad_clip, trim_clip, valid_frames
from vidtok.quantizer import build_quantizer, refill_buffers
from vidtok.streaming import StreamState, carry_state, check_same_size, concatenate, in_parts, inference, latents_at_once, regroup
from vidtok.tiling import run_tiled, tile_cells
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
            quantizer.channels_out, widths[::-1], channels, config.decoder_blocks, 3,
            config.decoder_looks_back, config.norm, Upsample,
        )  # fmt: skip
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

    @property
    def is_framewise(self) -> bool:
        """Whether each frame is coded by itself, so that frames may be coded in any grouping."""
        return self.stride_t == 1 and not (self.config.encoder_looks_back or self.config.decoder_looks_back)

    @property
    def history_frames(self) -> int:
        """Frames that a clip's ids depend on in front of it, inside a longer video: whole steps of time, one more than layers look back."""
        back = self.encoder.latents_back
        return (back + 1) * self.stride_t if back or self.stride_t > 1 else 0

    def valid_frames(self, frames: int) -> tuple[int, int]:
        """Give the nearest frame counts that need no padding: at most, and at least, `frames`."""
        return valid_frames(frames, self.stride_t)

    def grid_for(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Give the latent grid (t, h, w) of a clip of any size."""
        return grid_for(frames, height, width, self.stride_t, self.stride_s)

    def forward(self, video: Tensor, is_quantized: bool = True) -> VidTokOutput:
        """Reconstruct clips with gradients.

        video: (B, 3, T, H, W) in [-1, 1], of a size that needs no padding. is_quantized=False lets the latents pass unrounded
        (warm-up of training).
        """
        latents = self.encoder(self.patchify(video))
        if not is_quantized:
            return VidTokOutput(self.patchify.inverse(self.decoder(self.quantizer.bypass(latents))), None, latents.new_zeros(()))
        quantized = self.quantizer(latents)
        reconstruction = self.patchify.inverse(self.decoder(quantized.codes.to(latents.dtype)))
        return VidTokOutput(reconstruction, quantized.indices, quantized.loss, quantized.terms)

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
        check_video(video)
        return torch.cat(list(self.stream_encode([video], chunk_frames, tile, overlap)), dim=1)

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
        return self.decode_latents(self._codes(indices), size, chunk_frames, tile, overlap)

    def reconstruct(self, video: Tensor) -> Tensor:
        """Give what decoding an encoding gives, of the video's size."""
        size = (video.shape[2], video.shape[3], video.shape[4]) if video.ndim == 5 else None
        if self.quantizer.is_discrete:
            return self.decode(self.encode(video), size)
        return self.decode_latents(self.encode_latents(video), size)

    def encode_latents(
        self, video: Tensor, chunk_frames: int | None = None, tile: int | None = None, overlap: int | None = None
    ) -> Tensor:
        """Give latents (B, D, t, h, w) unrounded: of kl the mean, of fsq bounded by tanh, of lfq the expected code; keys as in encode."""
        check_video(video)
        return torch.cat(list(self.stream_encode_latents([video], chunk_frames, tile, overlap)), dim=2)

    def decode_latents(
        self,
        latents: Tensor,
        size: tuple[int, int, int] | None = None,
        chunk_frames: int | None = None,
        tile: int | None = None,
        overlap: int | None = None,
    ) -> Tensor:
        """Give the clips (B, 3, T, H, W) in [-1, 1], fp32, of codes or continuous latents (B, D, t, h, w); keys as in decode."""
        self._check_latents(latents)
        frames = 1 + (latents.shape[2] - 1) * self.stride_t
        return trim_clip(concatenate(self._videos(latents, [], chunk_frames, tile, overlap), frames), size)

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
        states = [] if state is None else [state]
        indices = torch.cat([self._indices(latents) for latents in self._latents(video, states)], dim=1)
        return indices, states[0]

    def decode_chunk(self, indices: Tensor, state: StreamState | None = None) -> tuple[Tensor, StreamState]:
        """Decode the next latent frames (B, n, h, w): 1 + (n - 1) * stride_t frames without a state, n * stride_t with one."""
        codes, states = self._codes(indices), [] if state is None else [state]
        frames = codes.shape[2] * self.stride_t - (self.stride_t - 1 if state is None else 0)
        return concatenate(self._videos(codes, states), frames), states[0]

    def stream_encode(
        self, chunks: Iterable[Tensor], chunk_frames: int | None = None, tile: int | None = None, overlap: int | None = None
    ) -> Iterator[Tensor]:
        """Yield indices (B, n, h, w) of a video of unknown length that comes as (B, 3, m, H, W), any m, one B, H and W; keys as in encode.

        Equal to encode of the whole; beside the chunks, memory goes neither by m nor by the length. The right, bottom and end are padded.
        """
        self._check_discrete()
        for latents in self._stream_latents(chunks, chunk_frames, tile, overlap):
            yield self._indices(latents)

    def stream_decode(
        self, chunks: Iterable[Tensor], chunk_frames: int | None = None, tile: int | None = None, overlap: int | None = None
    ) -> Iterator[Tensor]:
        """Yield clips (B, 3, m, H, W) of indices that come as (B, n, h, w), any n; equal to decode of the whole. Keys as in encode."""
        return self.stream_decode_latents(map(self._codes, check_same_size(chunks, "Bnhw")), chunk_frames, tile, overlap)

    def stream_encode_latents(
        self, chunks: Iterable[Tensor], chunk_frames: int | None = None, tile: int | None = None, overlap: int | None = None
    ) -> Iterator[Tensor]:
        """Yield what encode_latents gives, (B, D, n, h, w), of a video that comes as (B, 3, m, H, W); see stream_encode."""
        for latents in self._stream_latents(chunks, chunk_frames, tile, overlap):
            with inference(self):
                passed = self.quantizer.bypass(latents)
            yield passed

    def stream_decode_latents(
        self, chunks: Iterable[Tensor], chunk_frames: int | None = None, tile: int | None = None, overlap: int | None = None
    ) -> Iterator[Tensor]:
        """Yield clips (B, 3, m, H, W) of what decode_latents takes, in chunks (B, D, n, h, w); see stream_decode."""
        states: list[StreamState] = []
        for latents in check_same_size(chunks):
            self._check_latents(latents)
            yield from self._videos(latents, states, chunk_frames, tile, overlap)

    def fingerprint(self) -> str:
        """Give 16 hex digits that name these weights and this architecture."""
        return fingerprint(self)

    def encoder_fingerprint(self) -> str:
        """Give 16 hex digits that name what decides over indices: encoder and codebook, not the decoder."""
        return encoder_fingerprint(self)

    def _stream_latents(
        self, chunks: Iterable[Tensor], chunk_frames: int | None, tile: int | None, overlap: int | None
    ) -> Iterator[Tensor]:
        states: list[StreamState] = []
        for video in regroup(chunks, self.stride_t):
            yield from self._latents(video, states, chunk_frames, tile, overlap)

    def _latents(
        self,
        video: Tensor,
        states: list[StreamState],
        chunk_frames: int | None = None,
        tile: int | None = None,
        overlap: int | None = None,
    ) -> Iterator[Tensor]:
        """Yield the encoder's latents (B, D, n, h, w) of a clip's next frames, part by part; states of its tiles: empty at its start."""
        check_video(video)
        _, *cells = self.grid_for(*video.shape[2:])
        size, around, _ = tile_cells(tile, overlap, self.encoder.reach(self.config.patch_s), self.stride_s)
        later = self._steps_at_once(cells, size + 2 * around, chunk_frames, len(video)) * self.stride_t
        for part in in_parts(video, later if states else later - self.stride_t + 1, later):
            work = carry_state(self._encode_step, states)
            yield run_tiled(work, part, (cells[0], cells[1]), (self.stride_s, 1), size, around, 0)

    def _videos(
        self,
        latents: Tensor,
        states: list[StreamState],
        chunk_frames: int | None = None,
        tile: int | None = None,
        overlap: int | None = None,
    ) -> Iterator[Tensor]:
        """Yield the frames (B, 3, m, H, W) of a clip's next latents, part by part; states as in _latents."""
        height, width = latents.shape[3:]
        size, around, ramp = tile_cells(tile, overlap, self.decoder.reach(self.stride_s), self.stride_s)
        for part in latents.split(self._steps_at_once((height, width), size + 2 * around, chunk_frames, len(latents)), dim=2):
            yield run_tiled(carry_state(self._decode_step, states), part, (height, width), (1, self.stride_s), size, around, ramp)

    def _encode_step(self, video: Tensor, state: StreamState | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Give latents of frames of any size, padded to whole tokens, and what to keep of them."""
        grid = self.grid_for(*video.shape[2:])
        frames = self.valid_frames(video.shape[2])[1] if state is None else -(-video.shape[2] // self.stride_t) * self.stride_t
        with inference(self):
            video = pad_clip(video, frames, grid[1] * self.stride_s, grid[2] * self.stride_s).to(self.device, self.dtype)
            memory = Memory(None if state is None else state.tensors)
            latents = self.encoder(self.patchify(video, state is None), memory)
        return latents, tuple(memory.kept)

    def _decode_step(self, codes: Tensor, state: StreamState | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        with inference(self):
            memory = Memory(None if state is None else state.tensors)
            patches = self.decoder(codes.to(self.device, self.dtype), memory)
            video = self.patchify.inverse(patches, state is None).float().clamp(-1, 1)
        return video, tuple(memory.kept)

    def _indices(self, latents: Tensor) -> Tensor:
        with inference(self):
            return self.quantizer(latents).indices

    def _codes(self, indices: Tensor) -> Tensor:
        self._check_discrete()
        check_indices(indices)
        with inference(self):
            return self.quantizer.decode(indices.to(self.device))

    def _check_latents(self, latents: Tensor) -> None:
        channels = self.quantizer.channels_out
        if latents.ndim != 5 or latents.shape[1] != channels or not latents.numel():
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, not (B, {channels}, t, h, w) of 1 or more each: give what encode_latents gives"
            )

    def _steps_at_once(self, cells: Sequence[int], most: int, chunk_frames: int | None, batch: int) -> int:
        """Give the latent frames of a part of `batch` clips of `cells` tokens, of which a tile takes `most` a side."""
        if chunk_frames is not None:
            if chunk_frames < 1:
                raise ValueError(f"chunk_frames={chunk_frames} is no chunk: give 1 or more, or null to go by free memory")
            return max(1, chunk_frames // self.stride_t)
        height, width = (min(side, most) * self.stride_s for side in cells)
        config = self.config
        places = height * width // config.patch_s**2
        # About eight maps of the finest width live at once, and the frames themselves three times, in fp32.
        return latents_at_once(4 * batch * (8 * config.width * places + 9 * config.stride_t * height * width), self.device)

    def _check_discrete(self) -> None:
        if not self.quantizer.is_discrete:
            raise ValueError(
                f"quantizer={self.config.quantizer} has continuous latents and no indices: use encode_latents and decode_latents"
            )
