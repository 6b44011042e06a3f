"""The one adapter between the tokenizer and vector-quantize-pytorch: it owns layout, precision and the library's traps.

Latents enter as (B, D, t, h, w) and leave so; indices are int64 (B, t, h, w). All arithmetic is fp32 whatever surrounds it, because
in 16 bits neighbouring codes merge.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ, VectorQuantize

from vidtok.config import VidTokConfig


@dataclass(frozen=True)
class Quantized:
    """What a quantizer gives."""

    codes: Tensor  # (B, D, t, h, w), straight-through
    indices: Tensor  # (B, t, h, w) int64
    loss: Tensor  # scalar, 0 where the method needs none


class Quantizer(nn.Module):
    """Latents to codes and indices, and indices to codes."""

    codebook_size: int

    @property
    def is_filled(self) -> bool:
        """Tell whether there is a codebook to encode with: one made from data waits for the first quantised batch."""
        return True

    def forward(self, latents: Tensor) -> Quantized:
        """Quantise latents (B, D, t, h, w)."""
        shape = dict(zip("bthw", (latents.shape[0], *latents.shape[2:]), strict=True))
        with torch.autocast(latents.device.type, enabled=False):
            codes, indices, loss = self.quantize(rearrange(latents.float(), "b d t h w -> 1 (b t h w) d"))
        return Quantized(
            rearrange(codes, "1 (b t h w) d -> b d t h w", **shape),
            rearrange(indices.long(), "1 (b t h w) -> b t h w", **shape),
            loss,
        )

    def decode(self, indices: Tensor) -> Tensor:
        """Give the codes (B, D, t, h, w) of indices (B, t, h, w). Raises ValueError when an id lies outside the codebook."""
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= self.codebook_size:
            raise ValueError(
                f"index {low if low < 0 else high} lies outside the codebook of {self.codebook_size}: tokens of another tokenizer"
            )
        codes = self.look_up(rearrange(indices, "b t h w -> 1 (b t h w)"))
        _, t, h, w = indices.shape
        return rearrange(codes, "1 (b t h w) d -> b d t h w", t=t, h=h, w=w)

    def quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give codes (1, N, D), indices (1, N) and the loss of latents (1, N, D)."""
        raise NotImplementedError

    def look_up(self, indices: Tensor) -> Tensor:
        """Give codes (1, N, D) of indices (1, N)."""
        raise NotImplementedError


class FSQuantizer(Quantizer):
    """Finite scalar quantization: nothing to learn, nothing to collapse. Source: arXiv:2309.15505."""

    def __init__(self, levels: list[int]) -> None:
        super().__init__()
        # from_pretrained builds on the meta device, where the library's .item() calls fail.
        with torch.device("cpu"):
            self.fsq = FSQ(levels)
        self.fsq.levels = levels
        self.codebook_size = int(self.fsq.codebook_size)

    def quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Round every channel to its levels."""
        codes, indices = self.fsq(latents)
        return codes, indices, latents.new_zeros(())

    def look_up(self, indices: Tensor) -> Tensor:
        """Unpack indices to levels."""
        return self.fsq.indices_to_codes(indices)


class VQuantizer(Quantizer):
    """Vector quantization with EMA codebook, data (k-means) init and revival of dead codes. Source: arXiv:1711.00937, 1906.00446."""

    def __init__(self, config: VidTokConfig) -> None:
        super().__init__()
        self.codebook_size = config.codebook_size
        self.dead_code_ratio = config.dead_code_ratio
        # sync_codebook left to the library is memoised at its first use anywhere in the process, so it is said here.
        is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.vq = VectorQuantize(
            dim=config.codebook_dim,
            codebook_size=config.codebook_size,
            decay=config.vq_decay,
            kmeans_init=config.vq_kmeans_init,
            commitment_weight=config.commitment_weight,
            threshold_ema_dead_code=1,
            rotation_trick=False,
            sync_codebook=is_distributed,
        )

    @property
    def is_filled(self) -> bool:
        """Tell whether k-means has run."""
        return bool(self.vq._codebook.initted)

    def quantize(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Move every latent to its nearest code; in training mode the codebook follows."""
        codebook = self.vq._codebook
        if not self.training and not self.is_filled:
            # The library would fill the codebook from whatever is encoded first, even in eval mode.
            raise ValueError(
                "the codebook was never filled: train on, past unquantized_steps, before encoding with this tokenizer"
            )
        expected = latents.shape[1] / self.codebook_size
        # A revived code restarts at the expected count: the library's default would let it die again in the next step.
        codebook.threshold_ema_dead_code = self.dead_code_ratio * expected
        codebook.reset_cluster_size = expected
        codes, indices, loss = self.vq(latents)
        return codes, indices, loss.sum()

    def look_up(self, indices: Tensor) -> Tensor:
        """Read the codebook."""
        return self.vq.get_output_from_indices(indices)


def build_quantizer(config: VidTokConfig) -> Quantizer:
    """Build the quantizer that the config names."""
    return FSQuantizer(list(config.fsq_levels or [])) if config.quantizer == "fsq" else VQuantizer(config)


def refill_buffers(module: nn.Module) -> None:
    """Recompute the level tables of a finite scalar quantizer: they are not saved, and loading leaves them uninitialised."""
    if isinstance(module, FSQ):
        fresh = FSQ(module.levels)
        for name, buffer in fresh.named_buffers():
            module.get_buffer(name).copy_(buffer)
