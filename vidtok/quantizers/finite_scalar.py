"""Finite scalar quantization: nothing to learn, nothing to collapse. Source: arXiv:2309.15505."""

import math
from collections.abc import Sequence

from torch import Tensor, nn
from vector_quantize_pytorch import FSQ

from vidtok.digits import pack_digits, unpack_digits
from vidtok.quantizers.base import Quantizer, Rounded, straight_through


class FSQuantizer(Quantizer):
    """Round every channel to its own number of levels; an id joins the levels, the first channel first.

    use_norm: RMS norm over the channels before rounding.
    is_symmetric: levels spread evenly over [-1, 1] and a range that ends there, as a level of a residual stack needs, instead of a tanh.
    """

    def __init__(self, levels: Sequence[int], use_norm: bool = False, is_symmetric: bool = False) -> None:
        super().__init__()
        self.levels = list(levels)
        # Without its indices the library keeps no table of all codes, and packs nothing in fp32, which is exact to 2**24 only.
        self.fsq = FSQ(self.levels, return_indices=False, preserve_symmetry=is_symmetric, bound_hard_clamp=is_symmetric)
        self.fsq.levels = self.levels  # to refill its buffers from
        self.norm = nn.RMSNorm(len(self.levels), eps=1e-6) if use_norm else None
        self.is_symmetric = is_symmetric
        self.factors = [math.prod(self.levels)]
        self.channels_in = self.channels_out = len(self.levels)

    def prepare(self, latents: Tensor) -> Tensor:
        """Normalise where asked to."""
        return latents if self.norm is None else self.norm(latents)

    def unrounded(self, latents: Tensor) -> Tensor:
        """Bound latents as rounding does; a level of a residual stack is given bounded ones."""
        if self.is_symmetric:
            return latents
        counts = self.fsq._levels
        # As in the library, whose own function rounds too: a margin of a thousandth, and an even number of levels off by half a step.
        half_range, offset = (counts - 1) * 1.001 / 2, 0.5 - 0.5 * (counts % 2)
        return ((latents + (offset / half_range).atanh()).tanh() * half_range - offset) / (counts // 2)

    def quantize(self, latents: Tensor) -> Rounded:
        """Round every channel to its levels."""
        rounded = self.fsq.quantize(latents)
        counts = self.fsq._levels
        shifted = (rounded + 1) * (counts - 1) / 2 if self.is_symmetric else (rounded + 1) * (counts // 2)
        levels = shifted.detach().round().long()
        return Rounded(straight_through(self._codes(levels), rounded), pack_digits(levels, self.levels), latents.new_zeros(()))

    def look_up(self, indices: Tensor) -> Tensor:
        """Unpack indices to levels."""
        return self._codes(unpack_digits(indices, self.levels))

    def _codes(self, levels: Tensor) -> Tensor:
        """Give codes of levels 0 .. L - 1: in [-1, 1] from end to end, or in steps of 1 / (L // 2) around the middle level."""
        counts = self.fsq._levels
        return levels * 2 / (counts - 1) - 1 if self.is_symmetric else (levels - counts // 2) / (counts // 2)
