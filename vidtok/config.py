"""The tokenizer's options: the only home of their defaults."""

import math

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from vidtok.digits import MAX_CODEBOOK, MAX_IDS

QUANTIZERS = ("fsq", "vq", "simvq", "lfq", "bsq", "kl", "none")
RESIDUAL_QUANTIZERS = ("fsq", "vq", "simvq", "lfq")
# Options that say how to train, and change no index.
TRAINING_ONLY = {"vq_decay", "vq_kmeans_init", "dead_code_ratio", "commitment_weight", "entropy_weight", "kl_weight"}


@strict
class VidTokConfig(PreTrainedConfig):
    """Options of VidTokModel.

    stride_t, stride_s: pixel frames and pixels a token covers; patch_s of stride_s is done by folding patches into channels,
    the rest by halvings, each of which enters the next entry of channel_multipliers.
    patching: fold, or haar, whose channels are the means and differences of a patch.
    norm: rms, or layer, which is the faster one; both over the channels of one place.
    temporal_encoder, temporal_decoder: whether its layers look back in time; null: where a token stands for several frames.
    encoder_kernel: 1 lets a token see its own patch alone, which makes tokens easier to predict; 3 shares with the neighbours.
    quantizer: fsq (rounding, cannot collapse), vq (codebook of running averages), simvq (codebook behind one learned map), lfq and bsq
    (signs, bsq on the sphere); continuous latents, which have no ids: kl (Gaussian), none (as they are: the upper bound).
    codebook_size: entries of one codebook, null: 1000 for fsq, else 1024; of lfq and bsq a power of two.
    num_codebooks: above 1 (fsq, vq, simvq, lfq) each codebook rounds what those before it left over; an id joins a digit of each.
    codebook_dim: latent channels, null: 8; of fsq one a level, of lfq and bsq one a bit. fsq_levels: for fsq alone, their product is
    codebook_size; null: made from it, 8, 5, 5, 5 of 1000.
    fsq_norm: RMS norm before rounding; try it with tens of thousands of codes, it harms small codebooks.
    vq_*, dead_code_ratio: for vq; the ratio is relative to the expected count of a code (tokens of all processes' batch / codebook
    size). Weights: commitment_weight (vq, simvq, lfq, bsq; mean squared distance of latents to codes), entropy_weight (lfq, bsq;
    0 to 1 bit a bit, so it means the same for every size), kl_weight (nats, mean over latent values).
    """

    model_type = "vidtok"

    format_version: int = 1
    stride_t: int = 4
    stride_s: int = 8
    patch_s: int = 4
    width: int = 64
    channel_multipliers: list[int] | None = None
    patching: str = "fold"
    encoder_kernel: int = 3
    encoder_blocks: int = 2
    decoder_blocks: int = 3
    norm: str = "rms"
    temporal_encoder: bool | None = None
    temporal_decoder: bool | None = None
    quantizer: str = "fsq"
    num_codebooks: int = 1
    fsq_levels: list[int] | None = None
    fsq_norm: bool = False
    codebook_size: int | None = None
    codebook_dim: int | None = None
    vq_decay: float = 0.99
    vq_kmeans_init: bool = True
    commitment_weight: float = 0.25
    dead_code_ratio: float = 0.1
    entropy_weight: float = 0.1
    kl_weight: float = 1e-6

    def __post_init__(self, **kwargs: object) -> None:
        """Derive what depends on other fields."""
        if self.channel_multipliers is None:
            self.channel_multipliers = [2**level for level in range(self.num_halvings + 1)]
        if self.quantizer == "fsq":
            self.fsq_levels = self.fsq_levels or levels_of(1000 if self.codebook_size is None else self.codebook_size)
        levels = self.fsq_levels if self.quantizer == "fsq" else None
        if self.codebook_size is None:
            self.codebook_size = math.prod(levels) if levels else 1024
        if self.codebook_dim is None:
            bits = self.codebook_size.bit_length() - 1
            self.codebook_dim = len(levels) if levels else bits if self.quantizer in ("lfq", "bsq") else 8
        super().__post_init__(**kwargs)

    @property
    def num_halvings(self) -> int:
        """Halvings of height and width after patching."""
        return max(0, round(math.log2(max(1, self.stride_s // max(1, self.patch_s)))))

    @property
    def encoder_looks_back(self) -> bool:
        """Whether the encoder's layers see earlier frames."""
        return self.stride_t > 1 if self.temporal_encoder is None else self.temporal_encoder

    @property
    def decoder_looks_back(self) -> bool:
        """Whether the decoder's layers see earlier frames."""
        return self.stride_t > 1 if self.temporal_decoder is None else self.temporal_decoder

    @property
    def is_discrete(self) -> bool:
        """Whether latents become ids."""
        return self.quantizer not in ("kl", "none")

    @property
    def codebook_shape(self) -> tuple[int, int]:
        """Entries of one codebook, and its channels."""
        assert self.codebook_size is not None and self.codebook_dim is not None
        return self.codebook_size, self.codebook_dim

    @property
    def codebook_factors(self) -> list[int]:
        """Sizes of the codebooks whose digits make an id, coarsest first; none for continuous latents."""
        return [self.codebook_shape[0]] * self.num_codebooks if self.is_discrete else []

    @property
    def num_ids(self) -> int:
        """Number of ids: all codebooks together, 0 for continuous latents."""
        return math.prod(self.codebook_factors) if self.is_discrete else 0

    def validate_architecture(self) -> None:
        """Check the rules across fields."""
        allowed = {
            "stride_t": (1, 2, 4),
            "stride_s": (4, 8, 16),
            "patch_s": (1, 2, 4, 8, 16),
            "patching": ("fold", "haar"),
            "encoder_kernel": (1, 3),
            "norm": ("rms", "layer"),
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
        size, dim = self.codebook_shape
        if min(self.width, size - 1, dim, self.encoder_blocks, self.decoder_blocks) < 1:
            raise ValueError(
                "width, codebook_dim, encoder_blocks and decoder_blocks must be 1 or more and codebook_size 2 or more"
            )
        self._check_codebooks(size, dim)
        self._check_weights()

    def _check_codebooks(self, size: int, dim: int) -> None:
        levels = self.fsq_levels or []
        if self.quantizer == "fsq":
            self._check_levels(levels, size, dim)
        elif levels:
            raise ValueError(
                f"fsq_levels={levels} mean nothing to quantizer={self.quantizer}: set fsq_levels=null, or quantizer=fsq"
            )
        bits = size.bit_length() - 1
        if self.quantizer in ("lfq", "bsq") and size != 1 << bits:
            raise ValueError(
                f"codebook_size={size} is no power of two, which quantizer={self.quantizer} needs: use {1 << bits} or {2 << bits}"
            )
        if self.quantizer in ("lfq", "bsq") and dim != bits:
            raise ValueError(
                f"codebook_dim={dim} is not the {bits} bits of codebook_size={size}, which quantizer={self.quantizer} has for channels: "
                f"set codebook_dim=null, or codebook_size={1 << dim}"
            )
        if self.num_codebooks < 1 or (self.num_codebooks > 1 and self.quantizer not in RESIDUAL_QUANTIZERS):
            raise ValueError(
                f"num_codebooks={self.num_codebooks} does not go with quantizer={self.quantizer}: use 1, or more with one of "
                f"{', '.join(RESIDUAL_QUANTIZERS)}"
            )
        if self.is_discrete and (size > MAX_CODEBOOK or self.num_ids >= MAX_IDS):
            raise ValueError(
                f"num_codebooks={self.num_codebooks} of codebook_size={size} are too many ids: a codebook may have 2**24, "
                "all together fewer than 2**62; use several smaller codebooks, or fewer"
            )

    def _check_levels(self, levels: list[int], size: int, dim: int) -> None:
        if not levels:
            raise ValueError(
                f"codebook_size={size} is no product of whole numbers from 3 to 8, which quantizer=fsq needs: use 1000, 1024, 4096, 64000 "
                "or another, or give fsq_levels"
            )
        if not 3 <= min(levels) <= max(levels) <= 1000:
            raise ValueError(
                f"fsq_levels={levels} has a level that is not 3 to 1000: give one number a channel, for example [8, 5, 5, 5]"
            )
        for name, given, made in (("codebook_size", size, math.prod(levels)), ("codebook_dim", dim, len(levels))):
            if given != made:
                raise ValueError(
                    f"{name}={given} is not the {made} that fsq_levels={levels} make: set {name}=null, or other fsq_levels"
                )

    def _check_weights(self) -> None:
        if not 0 < self.vq_decay < 1:
            raise ValueError(f"vq_decay={self.vq_decay} is not between 0 and 1: 0.99 averages over about 100 steps")
        if not 0 <= self.dead_code_ratio < 1:
            raise ValueError(
                f"dead_code_ratio={self.dead_code_ratio} is no share below 1 of the expected count: 0.1 is usual, 0 is off"
            )
        for name, usual in {"commitment_weight": 0.25, "entropy_weight": 0.1, "kl_weight": 1e-6}.items():
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is below 0: {usual} is usual")


def levels_of(codebook_size: int) -> list[int]:
    """Give the FSQ levels, 8 down to 3, whose product is codebook_size; the fewest of the largest, [] where there are none."""
    for level in range(8, 2, -1):
        if codebook_size == level:
            return [level]
        rest = levels_of(codebook_size // level) if codebook_size % level == 0 else []
        if rest:
            return [level, *rest]
    return []
