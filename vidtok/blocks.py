"""Network parts of the tokenizer: every one is causal in time, and norms see one place of one frame only.

Inside the network a clip travels as (B * T, C, H, W), so that spatial layers are plain 2-D ones (fast, channels-last on a CPU);
layers that look back in time are given the number of frames.
"""

from itertools import pairwise

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F


class Patchify(nn.Module):
    """Fold patches of time and space into channels, the first frame alone, and unfold them again.

    Exactly invertible and without parameters; the first frame is repeated so that it fills a time patch by itself, which makes an
    image a clip of one frame. Source: Cosmos tokenizer, arXiv:2501.03575, section 4.1.
    """

    def __init__(self, patch_t: int, patch_s: int) -> None:
        super().__init__()
        self.patch_t, self.patch_s = patch_t, patch_s

    def forward(self, video: Tensor) -> Tensor:
        """Fold (B, C, T, H, W) to (B, C * patch_t * patch_s ** 2, t, h, w)."""
        first = repeat(video[:, :, :1], "b c 1 h w -> b c t h w", t=self.patch_t)
        return rearrange(
            torch.cat([first, video[:, :, 1:]], dim=2),
            "b c (t pt) (h p1) (w p2) -> b (c pt p1 p2) t h w",
            pt=self.patch_t,
            p1=self.patch_s,
            p2=self.patch_s,
        )

    def inverse(self, patches: Tensor) -> Tensor:
        """Unfold what forward folded; of the first time patch only the last frame is kept."""
        video = rearrange(
            patches,
            "b (c pt p1 p2) t h w -> b c (t pt) (h p1) (w p2)",
            pt=self.patch_t,
            p1=self.patch_s,
            p2=self.patch_s,
        )
        return video[:, :, self.patch_t - 1 :]


class ChannelNorm(nn.Module):
    """RMS norm over the channels of each place: it cannot carry anything from frame to frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise (B, C, ...) over C."""
        weight = self.weight.to(hidden.dtype)  # one dtype keeps the fused kernel under autocast
        return F.rms_norm(hidden.movedim(1, -1), weight.shape, weight, 1e-6).movedim(-1, 1)


class CausalTimeConv(nn.Module):
    """Mix each place with the same place of the two frames before it; the first frame stands in for what lies before the clip.

    Replicating instead of padding with zeros keeps absolute time out of the latents (TATS, arXiv:2204.03638, section 3.2).
    """

    kernel = 3

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(self.kernel * channels, channels, 1)

    def forward(self, hidden: Tensor, num_frames: int) -> Tensor:
        """Mix (B * T, C, H, W), T = num_frames."""
        clips = rearrange(hidden, "(b t) c h w -> b t c h w", t=num_frames)
        past = repeat(clips[:, :1], "b 1 c h w -> b k c h w", k=self.kernel - 1)
        padded = torch.cat([past, clips], dim=1)
        taps = [padded[:, shift : shift + num_frames] for shift in range(self.kernel)]
        return self.mix(rearrange(torch.cat(taps, dim=2), "b t c h w -> (b t) c h w"))


class ZeroConv2d(nn.Conv2d):
    """A convolution that starts at zero."""


class ResBlock(nn.Module):
    """norm, SiLU, conv (and look-back in time), norm, SiLU, conv; the last conv starts at zero, so a block starts as identity."""

    def __init__(self, channels: int, kernel: int, is_temporal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(channels), ChannelNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.conv2 = ZeroConv2d(channels, channels, kernel, padding=kernel // 2)
        self.time = CausalTimeConv(channels) if is_temporal else None

    def forward(self, hidden: Tensor, num_frames: int) -> Tensor:
        """Keep the shape (B * T, C, H, W), T = num_frames."""
        out = self.conv1(F.silu(self.norm1(hidden)))
        if self.time is not None:
            out = out + self.time(out, num_frames)
        return hidden + self.conv2(F.silu(self.norm2(out)))


class Downsample(nn.Module):
    """Halve height and width: mean of four places plus a learned correction."""

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

    def __init__(self, resample: nn.Module | None, channels: int, num_blocks: int, kernel: int, is_temporal: bool) -> None:
        super().__init__()
        self.resample = resample
        self.blocks = nn.Sequential(*(ResBlock(channels, kernel, is_temporal) for _ in range(num_blocks)))

    def forward(self, hidden: Tensor, num_frames: int) -> Tensor:
        """Give (B * T, C', H', W') of (B * T, C, H, W), T = num_frames."""
        hidden = hidden if self.resample is None else self.resample(hidden)
        for block in self.blocks:
            hidden = block(hidden, num_frames)
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
        resample: type[Downsample | Upsample],
    ) -> None:
        super().__init__()
        changes = [None, *(resample(*pair) for pair in pairwise(widths))]
        self.conv_in = nn.Conv2d(channels_in, widths[0], kernel, padding=kernel // 2)
        self.levels = nn.ModuleList(
            Level(change, width, num_blocks, kernel, is_temporal) for change, width in zip(changes, widths, strict=True)
        )
        self.norm = ChannelNorm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], channels_out, kernel, padding=kernel // 2)

    def forward(self, clips: Tensor) -> Tensor:
        """Give (B, C', t, H', W') of (B, C, t, H, W)."""
        num_frames = clips.shape[2]
        hidden = rearrange(clips, "b c t h w -> (b t) c h w").contiguous(memory_format=torch.channels_last)
        hidden = self.conv_in(hidden)
        for level in self.levels:
            hidden = level(hidden, num_frames)
        hidden = self.conv_out(F.silu(self.norm(hidden)))
        return rearrange(hidden, "(b t) c h w -> b c t h w", t=num_frames)
