"""What every quantizer is: it owns layout, precision and the shape of the answer; a method works on rows of latents.

Latents enter as (B, D, t, h, w) and leave so; indices are int64 (B, t, h, w). All arithmetic and all state is fp32 whatever surrounds
it, because in 16 bits neighbouring codes merge and small steps of an average are lost.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Self

import torch
from einops import rearrange
from torch import Tensor, distributed, nn


@dataclass(frozen=True)
class Quantized:
    """What a quantizer gives."""

    codes: Tensor  # (B, D, t, h, w), straight-through
    indices: Tensor | None  # (B, t, h, w) int64, None for continuous latents
    loss: Tensor  # scalar, 0 where the method needs none
    terms: dict[str, Tensor] = field(default_factory=dict)  # scalars to log, detached


@dataclass(frozen=True)
class Rounded:
    """What a method makes of rows of latents."""

    codes: Tensor  # (N, D), straight-through
    indices: Tensor | None  # (N,) int64
    loss: Tensor  # scalar
    terms: dict[str, Tensor] = field(default_factory=dict)


class Quantizer(nn.Module):
    """Latents to codes and indices, and indices to codes.

    factors: the size of each codebook, coarsest first; an id joins their digits (vidtok.digits). Empty for continuous latents.
    """

    factors: list[int]
    channels_in: int
    channels_out: int

    @property
    def is_discrete(self) -> bool:
        """Tell whether there are indices."""
        return bool(self.factors)

    @property
    def is_filled(self) -> bool:
        """Tell whether there is a codebook to encode with: one made from data waits for the first quantised batch."""
        return True

    def forward(self, latents: Tensor) -> Quantized:
        """Quantise latents (B, channels_in, t, h, w). Raises ValueError when the codebook lies in 16 bits."""
        self._check_precision()
        with torch.autocast(latents.device.type, enabled=False):
            rounded = self.quantize(self.prepare(_rows(latents)))
        indices = None if rounded.indices is None else _places(rounded.indices[:, None], latents)[:, 0]
        return Quantized(_places(rounded.codes, latents), indices, rounded.loss, rounded.terms)

    def bypass(self, latents: Tensor) -> Tensor:
        """Give (B, channels_out, t, h, w), what latents are before rounding: what the unquantised warm-up passes on."""
        with torch.autocast(latents.device.type, enabled=False):
            passed = _places(self.unrounded(self.prepare(_rows(latents))), latents)
        if self.training:
            # Several processes stop at a parameter without a gradient, and during the warm-up the codebook's would have none.
            passed = passed + sum(0 * parameter.sum() for parameter in self.parameters())
        return passed.to(latents.dtype)

    def decode(self, indices: Tensor) -> Tensor:
        """Give the codes (B, channels_out, t, h, w) of indices (B, t, h, w). Raises ValueError on an id outside the codebook."""
        if not self.is_discrete:
            raise ValueError("continuous latents have no ids to decode: decode latents, or train a tokenizer with quantizer=fsq")
        self._check_precision()
        indices, number = indices.long(), math.prod(self.factors)
        outside = (indices < 0) | (indices >= number)
        if outside.any():
            raise ValueError(
                f"index {int(indices[outside][0])} lies outside the codebook of {number}: tokens of another tokenizer"
            )
        with torch.autocast(indices.device.type, enabled=False):
            codes = self.look_up(rearrange(indices, "b t h w -> (b t h w)"))
        return _places(codes, indices[:, None])

    def prepare(self, latents: Tensor) -> Tensor:
        """Bring latents (N, channels_in) to the range that the method rounds in."""
        return latents

    def unrounded(self, latents: Tensor) -> Tensor:
        """Give (N, channels_out) of prepared latents (N, channels_in): bounded where codes are, and of a Gaussian the mean."""
        return latents

    def quantize(self, latents: Tensor) -> Rounded:
        """Round prepared latents (N, channels_in); in training mode the codebook follows."""
        raise NotImplementedError

    def look_up(self, indices: Tensor) -> Tensor:
        """Give the codes (N, channels_out) of indices (N,)."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to another device, but stay fp32: `model.to(torch.bfloat16)` must not halve the averages of a codebook."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype in (tensor.dtype, torch.float32) else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def _check_precision(self) -> None:
        for name, tensor in chain(self.named_parameters(), self.named_buffers()):
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                raise ValueError(
                    f"the quantizer's {name} is {tensor.dtype}, in which codes merge: load the tokenizer in float32 "
                    "(`.to(torch.bfloat16)` afterwards converts all but the quantizer)"
                )


def straight_through(codes: Tensor, latents: Tensor) -> Tensor:
    """Give exactly the codes, with the gradient of the latents. Source: arXiv:1308.3432."""
    return codes.detach() + (latents - latents.detach())


def is_distributed() -> bool:
    """Tell whether several processes train together, asked anew each time: the library keeps its first answer for ever."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _rows(latents: Tensor) -> Tensor:
    return rearrange(latents.float(), "b d t h w -> (b t h w) d")


def _places(rows: Tensor, like: Tensor) -> Tensor:
    """Give (B, D, t, h, w) of rows (N, D), B, t, h, w being those of `like`."""
    batch, _, t, h, w = like.shape
    return rearrange(rows, "(b t h w) d -> b d t h w", b=batch, t=t, h=h, w=w)
