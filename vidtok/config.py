"""The tokenizer's options: the only home of their defaults."""

import math

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

QUANTIZERS = ("fsq", "vq")


@strict
class VidTokConfig(PreTrainedConfig):
    """Options of VidTokModel.

    stride_t, stride_s: pixel frames and pixels a token covers; patch_s of stride_s is done by folding patches into channels,
    the rest by halvings, each of which enters the next entry of channel_multipliers.
    encoder_kernel: 1 lets a token see its own patch alone, which makes tokens easier to predict; 3 shares with the neighbours.
    fsq_levels counts for quantizer=fsq; codebook_size, vq_* for quantizer=vq. dead_code_ratio is relative to the expected
    count of a code (tokens a batch / codebook size).
    """

    model_type = "vidtok"

    format_version: int = 1
    stride_t: int = 4
    stride_s: int = 8
    patch_s: int = 4
    width: int = 64
    channel_multipliers: list[int] | None = None
    encoder_kernel: int = 3
    encoder_blocks: int = 2
    decoder_blocks: int = 3
    quantizer: str = "fsq"
    fsq_levels: list[int] | None = None
    codebook_size: int = 1000
    codebook_dim: int = 8
    vq_decay: float = 0.99
    vq_kmeans_init: bool = True
    commitment_weight: float = 0.25
    dead_code_ratio: float = 0.1

    def __post_init__(self, **kwargs: object) -> None:
        """Derive what depends on other fields."""
        if self.channel_multipliers is None:
            self.channel_multipliers = [2**level for level in range(self.num_halvings + 1)]
        if self.quantizer == "fsq":
            self.fsq_levels = self.fsq_levels or [8, 5, 5, 5]
            self.codebook_size, self.codebook_dim = math.prod(self.fsq_levels), len(self.fsq_levels)
        super().__post_init__(**kwargs)

    @property
    def num_halvings(self) -> int:
        """Halvings of height and width after patching."""
        return max(0, round(math.log2(max(1, self.stride_s // max(1, self.patch_s)))))

    def validate_architecture(self) -> None:
        """Check the rules across fields."""
        allowed = {
            "stride_t": (1, 2, 4),
            "stride_s": (4, 8, 16),
            "patch_s": (1, 2, 4, 8, 16),
            "encoder_kernel": (1, 3),
            "quantizer": QUANTIZERS,
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not one of {', '.join(map(str, values))}: choose one of these"
                )
        if self.patch_s > self.stride_s:
            raise ValueError(f"patch_s={self.patch_s} is larger than stride_s={self.stride_s}: lower patch_s")
        if len(self.channel_multipliers or []) != self.num_halvings + 1:
            raise ValueError(
                f"channel_multipliers={self.channel_multipliers} has not {self.num_halvings + 1} entries: stride_s={self.stride_s} with "
                f"patch_s={self.patch_s} halves {self.num_halvings} times, give one multiplier for each resolution"
            )
        if min(self.fsq_levels or [3]) < 3:
            raise ValueError(f"fsq_levels={self.fsq_levels} has a level below 3: every level must be 3 or more")
        if not 0 < self.vq_decay < 1:
            raise ValueError(f"vq_decay={self.vq_decay} is not between 0 and 1: 0.99 averages over about 100 steps")
        if not 0 <= self.dead_code_ratio < 1:
            raise ValueError(
                f"dead_code_ratio={self.dead_code_ratio} is no share below 1 of the expected count: 0.1 is usual, 0 is off"
            )
        if self.commitment_weight < 0:
            raise ValueError(f"commitment_weight={self.commitment_weight} is below 0: 0.25 is usual")
        if min(self.width, self.codebook_size - 1, self.codebook_dim, self.encoder_blocks, self.decoder_blocks) < 1:
            raise ValueError(
                "width, codebook_dim, encoder_blocks and decoder_blocks must be 1 or more and codebook_size 2 or more"
            )
