"""The one door to quantization: which method a config names, and what loading leaves to refill; the methods live in vidtok/quantizers/."""

import torch
from torch import nn
from vector_quantize_pytorch import FSQ, VectorQuantize

from vidtok.config import VidTokConfig
from vidtok.quantizers.base import Quantized, Quantizer
from vidtok.quantizers.continuous import GaussianQuantizer, IdentityQuantizer
from vidtok.quantizers.finite_scalar import FSQuantizer
from vidtok.quantizers.lookup_free import LookupFreeQuantizer
from vidtok.quantizers.residual import ResidualQuantizer
from vidtok.quantizers.simvq import SimVQuantizer
from vidtok.quantizers.vector import VQuantizer

__all__ = [
    "FSQuantizer",
    "GaussianQuantizer",
    "IdentityQuantizer",
    "LookupFreeQuantizer",
    "Quantized",
    "Quantizer",
    "ResidualQuantizer",
    "SimVQuantizer",
    "VQuantizer",
    "build_quantizer",
    "refill_buffers",
]


def build_quantizer(config: VidTokConfig) -> Quantizer:
    """Build the quantizer that the config names; num_codebooks > 1 makes it residual."""
    if config.num_codebooks == 1:
        return _build_one(config)
    is_fsq = config.quantizer == "fsq"
    levels = [
        FSQuantizer(config.fsq_levels or [], is_symmetric=True) if is_fsq else _build_one(config)
        for _ in range(config.num_codebooks)
    ]
    steps = config.fsq_levels or [] if is_fsq else [2 if config.quantizer == "lfq" else 1] * config.codebook_shape[1]
    norm = nn.RMSNorm(config.codebook_shape[1], eps=1e-6) if is_fsq and config.fsq_norm else None
    return ResidualQuantizer(levels, steps, is_bounded=is_fsq, norm=norm)


def refill_buffers(module: nn.Module) -> None:
    """Recompute the buffers that are not saved, which loading leaves uninitialised; other modules stay as they are."""
    if isinstance(module, FSQ):
        module._levels.copy_(torch.tensor(module.levels))
        module._basis.copy_(torch.tensor([1, *module.levels[:-1]]).cumprod(0))
    elif isinstance(module, VectorQuantize):
        module.zero.zero_()
    elif isinstance(module, ResidualQuantizer):
        module.scales.copy_(module.fresh_scales())


def _build_one(config: VidTokConfig) -> Quantizer:
    if config.quantizer == "fsq":
        return FSQuantizer(config.fsq_levels or [], config.fsq_norm)
    if config.quantizer in ("lfq", "bsq"):
        return LookupFreeQuantizer(config, is_spherical=config.quantizer == "bsq")
    methods = {"vq": VQuantizer, "simvq": SimVQuantizer, "kl": GaussianQuantizer, "none": IdentityQuantizer}
    return methods[config.quantizer](config)
