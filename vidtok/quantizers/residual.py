"""Residual quantization: each codebook rounds what the ones before it left over. Source: SoundStream, arXiv:2107.03312."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vidtok.digits import pack_digits, unpack_digits
from vidtok.quantizers.base import Quantizer, Rounded, straight_through


class ResidualQuantizer(Quantizer):
    """A stack of quantizers of one kind; digit 0 of an id is the coarsest, and the codes are the sum over digits.

    steps: how much smaller, channel by channel, the remainder of a level is than what it was given, so that the next level, scaled by
    it, sees the same range: L for L symmetric levels in +-L / (L - 1), 2 for signs; 1 where codebooks find the range by themselves.
    is_bounded: tanh brings latents into +-L / (L - 1) before. The loss is a mean over levels, terms are of each.
    """

    scales: Tensor

    def __init__(
        self, levels: Sequence[Quantizer], steps: Sequence[int], is_bounded: bool = False, norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.levels = nn.ModuleList(levels)
        self.norm = norm
        self.steps, self.is_bounded = list(steps), is_bounded
        self.register_buffer("scales", self.fresh_scales(), persistent=False)
        self.factors = [factor for level in levels for factor in level.factors]
        self.channels_in = self.channels_out = levels[0].channels_in

    @property
    def is_filled(self) -> bool:
        """Tell whether every codebook is filled."""
        return all(level.is_filled for level in self._stack)

    @property
    def _stack(self) -> list[Quantizer]:
        return [level for level in self.levels if isinstance(level, Quantizer)]

    def fresh_scales(self) -> Tensor:
        """Give the scale (Q, D) of every level and channel."""
        return torch.tensor(self.steps, dtype=torch.float32) ** -torch.arange(len(self.levels))[:, None]

    def prepare(self, latents: Tensor) -> Tensor:
        """Bring latents to where level 0 rounds."""
        if self.norm is not None:
            latents = self.norm(latents)
        if not self.is_bounded:
            return latents
        bound = 1 / (1 - self.scales[1])
        return bound * (latents / bound).tanh()

    def unrounded(self, latents: Tensor) -> Tensor:
        """Bound latents as sums of signs are; what codebooks will hold is not known."""
        if self.is_bounded or set(self.steps) == {1}:
            return latents
        bound = self.scales.sum(dim=0)
        return bound * (latents / bound).tanh()

    def quantize(self, latents: Tensor) -> Rounded:
        """Round latents, then what is left, and so on."""
        # No gradient runs from one level's loss through the codes of the levels before.
        total, parts = torch.zeros_like(latents), []
        for level, scale in zip(self._stack, self.scales, strict=True):
            parts.append(level.quantize((latents - total) / scale))
            total = total + parts[-1].codes.detach() * scale
        digits = torch.stack([part.indices for part in parts if part.indices is not None], dim=-1)
        terms = {f"{key}_{number}": value for number, part in enumerate(parts) for key, value in part.terms.items()}
        loss = torch.stack([part.loss for part in parts]).mean()
        return Rounded(straight_through(total, latents), pack_digits(digits, self.factors), loss, terms)

    def look_up(self, indices: Tensor) -> Tensor:
        """Add the codes of all digits up."""
        digits = unpack_digits(indices, self.factors).unbind(-1)
        total = torch.zeros(len(indices), self.channels_out, device=indices.device)
        for level, scale, digit in zip(self._stack, self.scales, digits, strict=True):
            total = total + level.look_up(digit) * scale
        return total
