"""Lookup-free and binary spherical quantization: one bit a channel. Sources: arXiv:2310.05737 (LFQ), 2406.07548 (BSQ)."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vidtok.config import VidTokConfig
from vidtok.quantizers.base import Quantizer, Rounded, straight_through
from vidtok.run.processes import averaged


class LookupFreeQuantizer(Quantizer):
    """Keep the sign of every channel: codes +-1, or with is_spherical +-1 / sqrt(D) of latents put on the unit sphere.

    Channel k is bit k of the id, the first channel the lowest. The entropy term asks for sure bits, each of them on in half of the
    global batch. It is taken bit by bit, so no matrix of tokens by codes is needed: the entropy of a token is exact, because
    softmax over distances to all sign vectors is a product of sigmoids; that of the batch is its upper bound, the sum over bits,
    reached where bits are independent (BSQ, section 4.2).
    """

    def __init__(self, config: VidTokConfig, is_spherical: bool) -> None:
        super().__init__()
        self.num_bits = config.codebook_shape[1]
        self.is_spherical = is_spherical
        self.magnitude = self.num_bits**-0.5 if is_spherical else 1.0
        self.commitment_weight, self.entropy_weight = config.commitment_weight, config.entropy_weight
        self.factors = [1 << self.num_bits]
        self.channels_in = self.channels_out = self.num_bits

    def prepare(self, latents: Tensor) -> Tensor:
        """Put latents on the unit sphere where the method says so."""
        return F.normalize(latents, dim=-1) if self.is_spherical else latents

    def unrounded(self, latents: Tensor) -> Tensor:
        """Give the mean of the codes under the probabilities that `entropies` gives bits; on the sphere latents as they are."""
        return latents if self.is_spherical else (2 * latents).tanh()

    def quantize(self, latents: Tensor) -> Rounded:
        """Keep the signs."""
        bits = latents > 0
        indices = (bits.long() << torch.arange(self.num_bits, device=latents.device)).sum(-1)
        codes = self.look_up(indices)
        commitment = F.mse_loss(latents, codes)
        of_token, of_batch = self.entropies(latents)
        loss = self.commitment_weight * commitment + self.entropy_weight * (of_token - of_batch)
        terms = {"commitment_loss": commitment, "token_entropy_bits_per_bit": of_token, "batch_entropy_bits_per_bit": of_batch}
        return Rounded(straight_through(codes, latents), indices, loss, {key: value.detach() for key, value in terms.items()})

    def look_up(self, indices: Tensor) -> Tensor:
        """Unpack indices to signs."""
        bits = indices[:, None] >> torch.arange(self.num_bits, device=indices.device) & 1
        return (2.0 * bits - 1.0) * self.magnitude

    def entropies(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Give the mean entropy of a token and the entropy of the batch, of all processes in training mode; means over bits, in bits.

        A bit is on with the probability sigmoid(4 x / magnitude): softmax over minus squared distances, in units of the magnitude.
        """
        logits = 4 * latents / self.magnitude
        probabilities = logits.sigmoid()
        of_token = probabilities * F.softplus(-logits) + (1 - probabilities) * F.softplus(logits)
        total, count = probabilities.sum(0), logits.new_full((), len(logits))
        if self.training:
            # The value of all processes with the gradient of this one: averaging gradients over processes makes it whole.
            total, count = averaged(total) + (total - total.detach()), averaged(count)
        share = (total / count).clamp(1e-6, 1 - 1e-6)
        of_batch = -(share * share.log() + (1 - share) * (1 - share).log())
        return of_token.mean() / math.log(2), of_batch.mean() / math.log(2)
