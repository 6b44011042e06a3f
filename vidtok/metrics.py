"""Pixel and codebook metrics: PSNR and SSIM frame by frame, and how much of a codebook is in use."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from einops import rearrange, reduce
from torch import Tensor

from vidtok.digits import MAX_CODEBOOK, unpack_digits
from vidtok.similarity import GAUSSIAN, similarity_maps

PSNR_CAP_DB = 100.0
SSIM_WINDOW = GAUSSIAN.size
PIXELS_AT_ONCE = 1 << 20
COMPARED_PIXELS_AT_ONCE = 1 << 17  # the maps of so many stay in a processor's cache, which makes SSIM three times as fast


def psnr_by_frame(video: Tensor, reference: Tensor) -> Tensor:
    """Measure the peak signal-to-noise ratio of every frame, in dB.

    video, reference: (B, C, T, H, W) in [-1, 1], so the peak-to-peak range is 2. Gives float64 (B, T).
    A frame's mean squared error is taken over its pixels and colours; nothing is pooled over frames. Values are
    capped at PSNR_CAP_DB, which is also the value of identical frames. Raises ValueError on unlike or wrong shapes.
    """
    check_pair(video, reference)
    mean_squared_error = by_frame(_squared_error_of_images, video, reference)
    return (-10 * torch.log10(mean_squared_error / 4)).clamp(max=PSNR_CAP_DB)


def psnr(video: Tensor, reference: Tensor) -> float:
    """Average PSNR in dB: the mean over frames of psnr_by_frame, not the PSNR of a pooled error."""
    return float(psnr_by_frame(video, reference).mean())


def ssim_by_frame(video: Tensor, reference: Tensor) -> Tensor:
    """Measure the structural similarity of every frame, at most 1.

    video, reference: (B, C, T, H, W) in [-1, 1]. Gives float64 (B, T). Frames are compared as images in [0, 1] (data range 1), each
    colour by itself, then the mean over whole windows and colours: a Gaussian of 11 x 11 pixels and sigma 1.5, K1 = 0.01,
    K2 = 0.03, population covariance (Wang et al., IEEE Transactions on Image Processing, 2004).
    Raises ValueError on unlike or wrong shapes and on frames smaller than the window.
    """
    check_pair(video, reference)
    height, width = video.shape[-2:]
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM got frames of {height} x {width} pixels; its window needs at least {SSIM_WINDOW} x {SSIM_WINDOW}: "
            "use larger frames or report PSNR only"
        )
    return by_frame(_ssim_of_images, video, reference)


def ssim(video: Tensor, reference: Tensor) -> float:
    """Average SSIM: the mean over frames of ssim_by_frame."""
    return float(ssim_by_frame(video, reference).mean())


def frames_at_once(height: int, width: int) -> int:
    """Give how many frames to work on at a time, so that memory is bounded by PIXELS_AT_ONCE or one frame, not by a clip's length."""
    return max(1, PIXELS_AT_ONCE // (height * width))


def by_frame(compare: Callable[..., Tensor], *clips: Tensor) -> Tensor:
    """Apply compare to clips (B, C, T, H, W) of one shape as images (N, C, H, W), a few at a time, so that memory is bounded.

    compare: gives (N,) or (N, figures) of one image of each clip. Gives float64 (B, T) or (B, T, figures).
    """
    batch, _, frames, height, width = clips[0].shape
    parts = []
    # Time goes into the batch: a rank-5 input would silently give the three-dimensional SSIM, another number.
    for places in torch.arange(batch * frames).split(max(1, COMPARED_PIXELS_AT_ONCE // (height * width))):
        clip, frame = places // frames, places % frames
        parts.append(compare(*(video[clip, :, frame] for video in clips)).double())
    return rearrange(torch.cat(parts), "(B T) ... -> B T ...", B=batch)


def _squared_error_of_images(images: Tensor, targets: Tensor) -> Tensor:
    """Compare images (N, C, H, W); gives (N,)."""
    return reduce((images.double() - targets.double()).square(), "N C H W -> N", "mean")


def _ssim_of_images(images: Tensor, targets: Tensor) -> Tensor:
    """Compare images (N, C, H, W) in [-1, 1]; gives (N,)."""
    similarity, _ = similarity_maps((images + 1) / 2, (targets + 1) / 2, GAUSSIAN)
    return reduce(similarity, "N C h w -> N", "mean")


def check_pair(video: Tensor, reference: Tensor) -> None:
    """Raise ValueError unless both are float clips (B, C, T, H, W) of one shape."""
    if video.shape != reference.shape or video.ndim != 5 or 0 in video.shape:
        raise ValueError(
            f"got videos of shapes {tuple(video.shape)} and {tuple(reference.shape)}; both must be one (B, C, T, H, W): "
            "crop or resize one to the other"
        )
    if not (video.is_floating_point() and reference.is_floating_point()):
        raise ValueError(
            f"got videos of types {video.dtype} and {reference.dtype}; metrics take floats in [-1, 1]: "
            "convert uint8 frames with vidtok.video.to_video"
        )


class FrameMeter:
    """Average a figure by frame index and over all frames, across clips of any length; every frame weighs the same."""

    def __init__(self) -> None:
        self.sums = torch.zeros(0, dtype=torch.float64)
        self.counts = torch.zeros(0, dtype=torch.int64)

    def update(self, values: Tensor) -> None:
        """Add values (B, T) of frames 0 .. T-1 of B clips."""
        batch, frames = values.shape
        missing = max(0, frames - len(self.sums))
        self.sums = torch.cat([self.sums, self.sums.new_zeros(missing)])
        self.counts = torch.cat([self.counts, self.counts.new_zeros(missing)])
        self.sums[:frames] += values.detach().cpu().double().sum(0)
        self.counts[:frames] += batch

    def by_frame(self) -> list[float]:
        """Give the mean of each frame index."""
        return (self.sums / self.counts).tolist()

    def mean(self) -> float:
        """Give the mean over all frames; raises ValueError before the first update."""
        if not len(self.counts):
            raise ValueError("no frame was measured; an average needs at least one: call update first")
        return float(self.sums.sum() / self.counts.sum())


def code_figures(counts: Tensor) -> dict[str, float]:
    """Give how a codebook is used, from how often each of its entries was seen, under keys that name the unit.

    Perplexity is the effective number of entries in use, exp(entropy): 1 .. codebook size; 0 where nothing was seen.
    """
    size, used = len(counts), int((counts > 0).sum())
    perplexity = math.exp(_entropy_nats(counts)) if used else 0.0
    return {
        "size_codes": size,
        "used_codes": used,
        "used_fraction": used / size,
        "dead_codes": size - used,
        "perplexity_codes": perplexity,
    }


def _entropy_nats(counts: Tensor) -> float:
    seen = counts[counts > 0].double()
    shares = seen / seen.sum()
    return float((shares * -shares.log()).sum())


class CodeMeter:
    """Count which codebook entries are used over any number of batches.

    codebooks: the size of one codebook, or the codebook_factors of several, each of which is counted by itself.
    Raises ValueError on a size below 1, and on one too large to count.
    """

    def __init__(self, codebooks: int | Sequence[int]) -> None:
        self.factors = [codebooks] if isinstance(codebooks, int) else list(codebooks)
        if not self.factors or min(self.factors) < 1 or max(self.factors) > MAX_CODEBOOK:
            raise ValueError(
                f"got codebook sizes {self.factors}; each must be at least 1 and at most 2**24: "
                "pass the tokenizer's codebook_factors"
            )
        self.digit_counts = [torch.zeros(factor, dtype=torch.int64) for factor in self.factors]

    @property
    def counts(self) -> Tensor:
        """Give how often each entry was seen; of several codebooks one after the other."""
        return torch.cat(self.digit_counts)

    def update(self, indices: Tensor) -> None:
        """Add integer ids of any shape; raises ValueError on one outside the codebooks."""
        flat = indices.detach().reshape(-1).cpu().long()
        if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < math.prod(self.factors):
            raise ValueError(
                f"got indices from {int(flat.min())} to {int(flat.max())}; the codebook has 0 to {math.prod(self.factors) - 1}: "
                "use the codebook size of the tokenizer that wrote them"
            )
        for counts, digits in zip(self.digit_counts, unpack_digits(flat, self.factors).unbind(-1), strict=True):
            counts += torch.bincount(digits, minlength=len(counts))

    def used(self) -> int:
        """Count the entries seen at least once, in all codebooks."""
        return int((self.counts > 0).sum())

    def dead(self) -> int:
        """Count the entries never seen, in all codebooks."""
        return sum(self.factors) - self.used()

    def perplexity(self) -> float:
        """Give the effective number of entries in use, exp(entropy), of several codebooks the geometric mean; 0 before the first update."""
        figures = [code_figures(counts)["perplexity_codes"] for counts in self.digit_counts]
        return math.prod(figures) ** (1 / len(figures))

    def entropy_bits(self) -> float:
        """Give the entropy of a token in bits; of several codebooks the sum, which the joint entropy cannot exceed."""
        return sum(_entropy_nats(counts) for counts in self.digit_counts) / math.log(2)

    def summary(self) -> dict[str, float]:
        """Give every figure under a key that names its unit, ready for metrics.json.

        Entries of several codebooks are counted together, and then codebook by codebook with its number at the end of the key.
        raw_bits_per_token: what an id takes; entropy_bits_per_token: what a coder that knows the counts alone would take.
        """
        figures = {
            "codes_seen_tokens": int(self.digit_counts[0].sum()),
            "codebook_size_codes": sum(self.factors),
            "codebook_used_codes": self.used(),
            "codebook_used_fraction": self.used() / sum(self.factors),
            "codebook_dead_codes": self.dead(),
            "codebook_perplexity_codes": self.perplexity(),
            "raw_bits_per_token": math.log2(math.prod(self.factors)),
            "entropy_bits_per_token": self.entropy_bits(),
        }
        if len(self.factors) > 1:
            for number, counts in enumerate(self.digit_counts):
                figures |= {f"codebook_{key}_{number}": value for key, value in code_figures(counts).items()}
        return figures
