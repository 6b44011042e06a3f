"""Network parts of the tokenizer: every one is causal in time, and norms see one place of one frame only.

Inside the network a clip travels as (B * T, C, H, W), so that spatial layers are plain 2-D ones (fast, channels-last on a CPU);
layers that look back in time are given the number of frames and a Memory of the frames before them.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F


class Memory:
    """What the layers of one network keep of the frames before a chunk: read in the order the layers run, written anew for the next.

    Without a past (the start of a clip) the first frame stands in for what lies before it; instead of zeros, because those would
    carry absolute time into the latents (TATS, arXiv:2204.03638, section 3.2).
    """

    def __init__(self, past: Sequence[Tensor] | None = None, is_kept: bool = True) -> None:
        self.past = None if past is None else iter(past)
        self.is_kept = is_kept
        self.kept: list[Tensor] = []

    def extend(self, clips: Tensor, size: int) -> Tensor:
        """Put the `size` frames before a chunk (B, T, ...) in front of it, and keep the last `size` for the next chunk."""
        before = repeat(clips[:, 0], "b ... -> b k ...", k=size) if self.past is None else next(self.past)
        extended = torch.cat([before, clips], dim=1)
        if self.is_kept:
            # A copy: a view would keep the whole chunk alive.
            self.kept.append(extended[:, -size:].detach().clone())
        return extended


class Patchify(nn.Module):
    """Fold patches of time and space into channels, the first frame alone, and unfold them again.

    Exactly invertible and without parameters; the first frame is repeated so that it fills a time patch by itself, which makes an
    image a clip of one frame. is_haar: channels are Haar bands of a patch (means and differences), the lowest one its mean.
    Source: Cosmos tokenizer, arXiv:2501.03575, section 4.1.
    """

    def __init__(self, patch_t: int, patch_s: int, is_haar: bool = False) -> None:
        super().__init__()
        self.patch_t, self.patch_s, self.is_haar = patch_t, patch_s, is_haar

    def forward(self, video: Tensor, is_start: bool = True) -> Tensor:
        """Fold (B, C, T, H, W) to (B, C * patch_t * patch_s ** 2, t, h, w); is_start=False when frames came before it."""
        if is_start:
            first = repeat(video[:, :, :1], "b c 1 h w -> b c t h w", t=self.patch_t)
            video = torch.cat([first, video[:, :, 1:]], dim=2)
        pattern = "b c (t pt) (h p1) (w p2) -> b c pt p1 p2 t h w"
        patches = rearrange(video, pattern, pt=self.patch_t, p1=self.patch_s, p2=self.patch_s)
        if self.is_haar:
            patches = _haar(_haar(_haar(patches, 2), 3), 4)
        return rearrange(patches, "b c pt p1 p2 t h w -> b (c pt p1 p2) t h w")

    def inverse(self, patches: Tensor, is_start: bool = True) -> Tensor:
        """Unfold what forward folded; of a clip's first time patch only the last frame is kept."""
        pattern = "b (c pt p1 p2) t h w -> b c pt p1 p2 t h w"
        patches = rearrange(patches, pattern, pt=self.patch_t, p1=self.patch_s, p2=self.patch_s)
        if self.is_haar:
            # The transform is its own inverse up to the scale: forward gives means, this gives sums.
            patches = _haar(_haar(_haar(patches, 2, 1.0), 3, 1.0), 4, 1.0)
        video = rearrange(patches, "b c pt p1 p2 t h w -> b c (t pt) (h p1) (w p2)")
        return video[:, :, self.patch_t - 1 :] if is_start else video


def _haar(patches: Tensor, axis: int, scale: float = 0.5) -> Tensor:
    """Split an axis of 2 ** n values into bands by n levels of scaled sums and differences, every band again at every level."""
    for level in range(patches.shape[axis].bit_length() - 1):
        pairs = patches.unflatten(axis, (-1, 2, 2**level))
        first, second = pairs.unbind(axis + 1)
        bands = torch.stack([scale * (first + second), scale * (first - second)], dim=axis + 1)
        patches = bands.flatten(axis, axis + 2)
    return patches


class ChannelNorm(nn.Module):
    """RMS norm over the channels of each place: it cannot carry anything from frame to frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise (B, C, ...) over C."""
        weight = self.weight.to(hidden.dtype)  # one dtype keeps the fused kernel under autocast
        return F.rms_norm(hidden.movedim(1, -1), weight.shape, weight, 1e-6).movedim(-1, 1)


class ChannelLayerNorm(ChannelNorm):
    """Layer norm over the channels of each place, without shift; on a CPU, where it is one kernel, three times as fast."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise (B, C, ...) over C."""
        weight = self.weight.to(hidden.dtype)
        return F.layer_norm(hidden.movedim(1, -1), weight.shape, weight, None, 1e-6).movedim(-1, 1)


NORMS = {"rms": ChannelNorm, "layer": ChannelLayerNorm}


class CausalTimeConv(nn.Module):
    """Mix each place with the same place of the two frames before it."""

    kernel = 3

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(self.kernel * channels, channels, 1)

    def forward(self, hidden: Tensor, num_frames: int, memory: Memory) -> Tensor:
        """Mix (B * T, C, H, W), T = num_frames."""
        clips = rearrange(hidden, "(b t) c h w -> b t c h w", t=num_frames)
        padded = memory.extend(clips, self.kernel - 1)
        taps = [padded[:, shift : shift + num_frames] for shift in range(self.kernel)]
        return self.mix(rearrange(torch.cat(taps, dim=2), "b t c h w -> (b t) c h w"))


class ZeroConv2d(nn.Conv2d):
    """A convolution that starts at zero."""


class ResBlock(nn.Module):
    """norm, SiLU, conv (and look-back in time), norm, SiLU, conv; the last conv starts at zero, so a block starts as identity."""

    def __init__(self, channels: int, kernel: int, is_temporal: bool, norm: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = NORMS[norm](channels), NORMS[norm](channels)
        self.conv1 = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.conv2 = ZeroConv2d(channels, channels, kernel, padding=kernel // 2)
        self.time = CausalTimeConv(channels) if is_temporal else None

    def forward(self, hidden: Tensor, num_frames: int, memory: Memory) -> Tensor:
        """Keep the shape (B * T, C, H, W), T = num_frames."""
        out = self.conv1(F.silu(self.norm1(hidden)))
        if self.time is not None:
            out = out + self.time(out, num_frames, memory)
        return hidden + self.conv2(F.silu(self.norm2(out)))


class Downsample(nn.Module):
    """Halve height and width: a learned mix of each four places."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4 * channels_in, channels_out, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Give (B * T, C', H / 2, W / 2)."""
        return self.conv(rearrange(hidden, "b c (h p1) (w p2) -> b (p1 p2 c) h w", p1=2, p2=2))


class Upsample(nn.Module):
    """Double height and width by unfolding channels."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, 4 * channels_out, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Give (B * T, C', 2 * H, 2 * W)."""
        return rearrange(self.conv(hidden), "b (p1 p2 c) h w -> b c (h p1) (w p2)", p1=2, p2=2)


class Level(nn.Module):
    """One resolution: an optional change of it, then residual blocks."""

    def __init__(
        self, resample: nn.Module | None, channels: int, num_blocks: int, kernel: int, is_temporal: bool, norm: str
    ) -> None:
        super().__init__()
        self.resample = resample
        self.blocks = nn.Sequential(*(ResBlock(channels, kernel, is_temporal, norm) for _ in range(num_blocks)))

    def forward(self, hidden: Tensor, num_frames: int, memory: Memory) -> Tensor:
        """Give (B * T, C', H', W') of (B * T, C, H, W), T = num_frames."""
        hidden = hidden if self.resample is None else self.resample(hidden)
        for block in self.blocks:
            hidden = block(hidden, num_frames, memory)
        return hidden


class Pyramid(nn.Module):
    """Encoder (resample=Downsample, fine to coarse) or decoder (resample=Upsample, coarse to fine)."""

    def __init__(
        self,
        channels_in: int,
        widths: list[int],
        channels_out: int,
        num_blocks: int,
        kernel: int,
        is_temporal: bool,
        norm: str,
        resample: type[Downsample | Upsample],
    ) -> None:
        super().__init__()
        self.kernel, self.num_blocks, self.scale = kernel, num_blocks, 2.0 if resample is Downsample else 0.5
        # How many latent frames before its own an output depends on.
        self.latents_back = (CausalTimeConv.kernel - 1) * num_blocks * len(widths) if is_temporal else 0
        changes = [None, *(resample(*pair) for pair in pairwise(widths))]
        self.conv_in = nn.Conv2d(channels_in, widths[0], kernel, padding=kernel // 2)
        self.levels = nn.ModuleList(
            Level(change, width, num_blocks, kernel, is_temporal, norm) for change, width in zip(changes, widths, strict=True)
        )
        self.norm = NORMS[norm](widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], channels_out, kernel, padding=kernel // 2)

    def reach(self, cell: int) -> int:
        """Give how many pixels beyond its own place an output depends on, when a place of the input covers `cell` pixels."""
        sizes = [cell * self.scale**level for level in range(len(self.levels))]
        return math.ceil(self.kernel // 2 * (cell + 2 * self.num_blocks * sum(sizes) + sizes[-1]))

    def forward(self, clips: Tensor, memory: Memory | None = None) -> Tensor:
        """Give (B, C', t, H', W') of (B, C, t, H, W); without a memory the clip starts here."""
        num_frames, memory = clips.shape[2], Memory(is_kept=False) if memory is None else memory
        hidden = rearrange(clips, "b c t h w -> (b t) c h w").contiguous(memory_format=torch.channels_last)
        hidden = self.conv_in(hidden)
        for level in self.levels:
            hidden = level(hidden, num_frames, memory)
        hidden = self.conv_out(F.silu(self.norm(hidden)))
        return rearrange(hidden, "(b t) c h w -> b c t h w", t=num_frames)
