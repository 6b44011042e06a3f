"""Latents without a codebook: as they are, or a diagonal Gaussian kept near the unit one. Source: arXiv:1312.6114."""

import torch
from torch import Tensor

from vidtok.config import VidTokConfig
from vidtok.quantizers.base import Quantizer, Rounded


class IdentityQuantizer(Quantizer):
    """Pass latents on: the upper bound of what any codebook reaches with this network."""

    def __init__(self, config: VidTokConfig) -> None:
        super().__init__()
        self.factors = []
        self.channels_in = self.channels_out = config.codebook_shape[1]

    def quantize(self, latents: Tensor) -> Rounded:
        """Pass latents on."""
        return Rounded(latents, None, latents.new_zeros(()))


class GaussianQuantizer(Quantizer):
    """Draw latents from the Gaussian whose mean and log variance the encoder gives; outside of training they are the mean."""

    def __init__(self, config: VidTokConfig) -> None:
        super().__init__()
        self.factors = []
        self.kl_weight = config.kl_weight
        _, dim = config.codebook_shape
        self.channels_in, self.channels_out = 2 * dim, dim

    def unrounded(self, latents: Tensor) -> Tensor:
        """Give the mean."""
        return latents.chunk(2, dim=-1)[0]

    def quantize(self, latents: Tensor) -> Rounded:
        """Draw, and weigh the divergence from the unit Gaussian, in nats, a mean over latent values."""
        mean, log_variance = latents.chunk(2, dim=-1)
        log_variance = log_variance.clamp(-30, 20)  # exp must stay finite
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        drawn = mean + (0.5 * log_variance).exp() * torch.randn_like(mean) if self.training else mean
        return Rounded(drawn, None, self.kl_weight * divergence, {"kl_nats_per_value": divergence.detach()})
