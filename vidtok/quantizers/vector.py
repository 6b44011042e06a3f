"""Vector quantization with a codebook of running averages. Source: arXiv:1711.00937, 1906.00446."""

import torch
from torch import Tensor, distributed
from torch.nn import functional as F
from vector_quantize_pytorch import VectorQuantize

from vidtok.config import VidTokConfig
from vidtok.quantizers.base import Quantizer, Rounded, is_distributed, straight_through

# Few enough to stay in a CPU's cache.
DISTANCES_AT_ONCE = 1 << 19
# Of k-means; more latents a code move its means by less than the next training steps do.
SAMPLES_PER_CODE, ROUNDS = 32, 10


class VQuantizer(Quantizer):
    """Move every latent to its nearest code; codes are moving averages of theirs, start as k-means of data, and revive when unused.

    The library owns the codebook and the revival of codes; k-means, nearest codes and sums of latents are computed here, without its
    matrices of N x codebook_size.
    """

    def __init__(self, config: VidTokConfig) -> None:
        super().__init__()
        self.dead_code_ratio = config.dead_code_ratio
        self.commitment_weight = config.commitment_weight
        size, dim = config.codebook_shape
        self.factors = [size]
        self.channels_in = self.channels_out = dim
        self.vq = VectorQuantize(
            dim=dim,
            codebook_size=size,
            decay=config.vq_decay,
            kmeans_init=config.vq_kmeans_init,
            threshold_ema_dead_code=1,
            rotation_trick=False,
            # Left to the library, the first answer of the process would hold for every later quantizer.
            sync_codebook=is_distributed(),
        )

    @property
    def is_filled(self) -> bool:
        """Tell whether k-means has run."""
        return bool(self.vq._codebook.initted)

    def quantize(self, latents: Tensor) -> Rounded:
        """Move every latent to its nearest code; in training mode the codebook follows."""
        if self.training:
            self._start(latents.detach())
        elif not self.is_filled:
            # The library would fill the codebook from whatever is encoded first, even in eval mode.
            raise ValueError(
                "the codebook was never filled: train on, past unquantized_steps, before encoding with this tokenizer"
            )
        indices = nearest(self.vq.codebook, latents)
        codes = self.look_up(indices)
        if self.training:
            self._follow(latents.detach(), indices)
        commitment = F.mse_loss(latents, codes)
        loss = self.commitment_weight * commitment
        return Rounded(straight_through(codes, latents), indices, loss, {"commitment_loss": commitment.detach()})

    def look_up(self, indices: Tensor) -> Tensor:
        """Read the codebook."""
        return F.embedding(indices, self.vq.codebook)

    @torch.no_grad()
    def _start(self, latents: Tensor) -> None:
        """Fill an empty codebook; outside of autograd, which would keep every distance of every round of k-means."""
        if self.vq._codebook.use_ddp != is_distributed():
            raise ValueError(
                "the quantizer was built before the processes were connected, or after they parted, so that their codebooks would "
                "drift apart: build the model after Accelerator() or init_process_group"
            )
        if not self.is_filled:
            codebook = self.vq._codebook
            codes, shares = k_means(latents, self.factors[0])
            # Running counts are those of a step's latents, of which k-means took a sample.
            counts = shares * self._expected(latents) * self.factors[0]
            codebook.cluster_size.copy_(counts[None])
            codebook.embed_avg.copy_((codes * counts[:, None])[None])
            codebook.update_ema()
            codebook.initted.fill_(True)

    @torch.no_grad()
    def _follow(self, latents: Tensor, indices: Tensor) -> None:
        """Move the averages towards the latents (N, D) of their codes, and put codes that fell out of use onto latents."""
        expected = self._expected(latents)
        codebook = self.vq._codebook
        # A revived code restarts at the expected count: the library's default would let it die again in the next step.
        codebook.threshold_ema_dead_code = self.dead_code_ratio * expected
        codebook.reset_cluster_size = expected
        counts = summed(torch.bincount(indices, minlength=self.factors[0]).float())
        sums = summed(torch.zeros_like(codebook.embed_avg[0]).index_add_(0, indices, latents))
        codebook.cluster_size.lerp_(counts[None], 1 - codebook.decay)
        codebook.embed_avg.lerp_(sums[None], 1 - codebook.decay)
        codebook.update_ema()
        codebook.expire_codes_(latents[None])

    def _expected(self, latents: Tensor) -> float:
        """Give how many of a step's latents, in all processes, fall on a code if all are used alike."""
        return float(summed(torch.tensor(float(len(latents)), device=latents.device))) / self.factors[0]


@torch.no_grad()
def k_means(latents: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Give codes (C, D), each the mean of the latents (N, D) nearest to it, and the share (C,) of latents that these are.

    The same in all processes, of the latents of all: of SAMPLES_PER_CODE latents a code, drawn by torch's global generator.
    """
    ranks = distributed.get_world_size() if is_distributed() else 1
    samples = latents[torch.randperm(len(latents), device=latents.device)[: -(-SAMPLES_PER_CODE * num_codes // ranks)]]
    # Each process's part of the first codes; latents that are fewer come again.
    start = samples[torch.arange(-(-num_codes // ranks), device=latents.device) % len(samples)]
    codes, counts = gathered(start)[:num_codes], latents.new_zeros(num_codes)
    for _ in range(ROUNDS):
        indices = nearest(codes, samples)
        counts = summed(torch.bincount(indices, minlength=num_codes).to(codes.dtype))
        sums = summed(torch.zeros_like(codes).index_add_(0, indices, samples))
        codes = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), codes)
    return codes, counts / counts.sum()


def gathered(rows: Tensor) -> Tensor:
    """Give the rows of all processes, each of which gives as many."""
    if not is_distributed():
        return rows
    parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, rows)
    return torch.cat(parts)


def summed(tensor: Tensor) -> Tensor:
    """Give the sum over all processes."""
    if is_distributed():
        distributed.all_reduce(tensor)
    return tensor


@torch.no_grad()
def nearest(codebook: Tensor, latents: Tensor) -> Tensor:
    """Give the indices (N,) of the codes (C, D) nearest to latents (N, D), a part at a time; of equally near ones any."""
    # |z - c|^2 without |z|^2, which is the same for every code: one matrix product, where a distance matrix takes several passes.
    offsets = -0.5 * codebook.square().sum(dim=1)
    parts = latents.split(max(1, DISTANCES_AT_ONCE // len(codebook)))
    return torch.cat([torch.addmm(offsets, part, codebook.T).argmax(dim=1) for part in parts])
