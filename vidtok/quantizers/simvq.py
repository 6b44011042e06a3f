"""SimVQ: a frozen random codebook seen through one learned linear map, which moves all codes at once. Source: arXiv:2411.02038."""

from torch import Tensor
from torch.nn import functional as F
from vector_quantize_pytorch import SimVQ

from vidtok.config import VidTokConfig
from vidtok.quantizers.base import Quantizer, Rounded, straight_through
from vidtok.quantizers.vector import nearest


class SimVQuantizer(Quantizer):
    """Move every latent to its nearest code; codes learn from gradients, so several processes need no other agreement."""

    def __init__(self, config: VidTokConfig) -> None:
        super().__init__()
        self.commitment_weight = config.commitment_weight
        size, dim = config.codebook_shape
        self.factors = [size]
        self.channels_in = self.channels_out = dim
        self.simvq = SimVQ(dim, size, rotation_trick=False)

    def quantize(self, latents: Tensor) -> Rounded:
        """Move every latent to its nearest code; the loss pulls codes to latents, and latents, weaker, to codes."""
        indices = nearest(self.simvq.codebook, latents)
        codes = self.look_up(indices)
        commitment = F.mse_loss(latents, codes.detach())
        loss = F.mse_loss(codes, latents.detach()) + self.commitment_weight * commitment
        return Rounded(straight_through(codes, latents), indices, loss, {"commitment_loss": commitment.detach()})

    def look_up(self, indices: Tensor) -> Tensor:
        """Read the mapped codebook: mapping only what is read would round differently with every batch size."""
        return F.embedding(indices, self.simvq.codebook)
