"""Discriminators that judge patches of frames or of clips."""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

MAX_MULTIPLIER = 8


class PatchDiscriminator(nn.Module):
    """Give a score to every patch: high for real video, low for reconstructions.

    Strided convolutions with spectral norm; nothing is normalised over a batch or over pixels, so a score depends on its own patch.
    Source: PatchGAN, arXiv:1611.07004; spectral norm, arXiv:1802.05957.
    """

    real_mean: Tensor
    fake_mean: Tensor

    def __init__(self, dimensions: int = 2, width: int = 64, layers: int = 3) -> None:
        """dimensions: 2 looks at single frames, 3 at frames with their neighbours. layers: halvings of height and width."""
        super().__init__()
        self.dimensions = dimensions
        widths = [width * min(2**layer, MAX_MULTIPLIER) for layer in range(layers + 1)]
        convolutions = [
            _convolution(dimensions, channels_in, channels_out, side=4, stride=2, stride_t=1 if layer == 0 else 2)
            for layer, (channels_in, channels_out) in enumerate(zip([3, *widths], widths[:-1], strict=False))
        ]
        convolutions.append(_convolution(dimensions, widths[-2], widths[-1], side=3, stride=1, stride_t=1))
        self.features = nn.ModuleList(spectral_norm(convolution) for convolution in convolutions)
        self.score = spectral_norm(_convolution(dimensions, widths[-1], 1, side=3, stride=1, stride_t=1))
        # Averages of the scores that LeCam regularisation compares with: here, so that a checkpoint holds them.
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("fake_mean", torch.zeros(()))

    def forward(self, video: Tensor) -> Tensor:
        """Give scores (B, N) of clips (B, 3, T, H, W) in [-1, 1], N patches each."""
        hidden = video if self.dimensions == 3 else rearrange(video, "B C T H W -> (B T) C H W")
        for convolution in self.features:
            hidden = F.leaky_relu(convolution(hidden), 0.2)
        return rearrange(self.score(hidden), "(B T) 1 ... -> B (T ...)", B=len(video))


def _convolution(dimensions: int, channels_in: int, channels_out: int, side: int, stride: int, stride_t: int) -> nn.Module:
    if dimensions == 2:
        return nn.Conv2d(channels_in, channels_out, side, stride, padding=1)
    return nn.Conv3d(channels_in, channels_out, (3, side, side), (stride_t, stride, stride), padding=1)
