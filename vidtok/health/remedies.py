"""Which keys of a new training would help, as they are typed: valid beside what the tokenizer has, and never what it has already."""

from __future__ import annotations

from vidtok.config import VidTokConfig, levels_of

FEWEST_CODES, FEWEST_CHANNELS = 64, 4


def smaller_codebook(config: VidTokConfig) -> str | None:
    """Give about half as many codes."""
    size = config.codebook_shape[0] // 2
    while config.quantizer == "fsq" and size >= FEWEST_CODES and not levels_of(size):
        size -= 1
    return _codebook(config, size) if config.is_discrete and size >= FEWEST_CODES else None


def larger_codebook(config: VidTokConfig) -> str | None:
    """Give about twice as many codes."""
    size = 2 * config.codebook_shape[0]
    while config.quantizer == "fsq" and not levels_of(size):
        size += 1
    return _codebook(config, size) if config.is_discrete else None


def _codebook(config: VidTokConfig, size: int) -> str:
    if config.quantizer != "fsq" or config.fsq_levels == levels_of(config.codebook_shape[0]):
        return f"tokenizer.codebook_size={size}"
    # Levels that were chosen would contradict a size.
    return f"tokenizer.codebook_size=null tokenizer.fsq_levels=[{','.join(map(str, levels_of(size)))}]"


def fewer_channels(config: VidTokConfig) -> str | None:
    """Give half the channels of a code, where they are free to choose."""
    channels = config.codebook_shape[1] // 2
    return f"tokenizer.codebook_dim={channels}" if config.quantizer in ("vq", "simvq") and channels >= FEWEST_CHANNELS else None


def rounding(config: VidTokConfig) -> str | None:
    """Give the quantizer that cannot collapse."""
    if config.quantizer == "fsq" or not config.is_discrete:
        return None
    size = "" if levels_of(config.codebook_shape[0]) else " tokenizer.codebook_size=1024"
    return f"tokenizer.quantizer=fsq{size}" + ("" if config.codebook_shape[1] == 8 else " tokenizer.codebook_dim=null")


def own_patch_alone(config: VidTokConfig) -> str | None:
    """Let a token see its own patch alone."""
    return "tokenizer.encoder_kernel=1" if config.encoder_kernel != 1 else None


def smaller_patches(config: VidTokConfig) -> str | None:
    """Let a token cover half as many pixels a side."""
    stride = config.stride_s // 2
    if stride < 4:
        return None
    if config.patch_s > stride:
        return f"tokenizer.stride_s={stride} tokenizer.patch_s={stride}"
    # One halving less.
    is_derived = config.channel_multipliers == [2**level for level in range(config.num_halvings + 1)]
    return f"tokenizer.stride_s={stride}" + ("" if is_derived else " tokenizer.channel_multipliers=null")
