"""What turns clips into the feature vectors of a Fréchet distance: a detector file for FVD, fixed random filters for the proxy."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

from vidtok.metrics import check_pair
from vidtok.perceptual import file_sha256
from vidtok.video_metrics.frechet import FeatureStatistics, frechet_distance
from vidtok.video_metrics.protocol import ProtocolCard

PIXELS_AT_ONCE = 1 << 20  # resized pixels of the clips that a detector sees together


class Detector(Protocol):
    """A fixed function from clips to vectors."""

    figure: str  # the name of the distance made with it
    name: str
    sha256: str
    side: int  # pixels that clips are resized to, the shorter side first, then the middle is cut out
    least_frames: int

    def features(self, video: Tensor) -> Tensor:
        """Give (B, d) for clips (B, 3, T, side, side) in [-1, 1]."""


class TorchScriptDetector:
    """A TorchScript file, for example the I3D network that published FVD figures were made with.

    It gets clips (B, 3, T, side, side) in [-1, 1] and gives (B, d). Where its forward knows them it also gets rescale=False, resize=False
    and return_features=True, which the widespread I3D file understands. Loading runs what is in the file: take it from whom you trust,
    which the checksum makes sure of.
    """

    figure = "fvd"

    def __init__(self, path: str | Path, sha256: str, side: int = 224, least_frames: int = 10, device: str = "cpu") -> None:
        """Load a detector file whose SHA-256 checksum must begin with sha256, 8 digits or more; raises FileNotFoundError or ValueError."""
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is no file: give the TorchScript file of a video network, such as I3D on Kinetics-400."
            )
        self.sha256 = file_sha256(file)
        if len(sha256) < 8 or not self.sha256.startswith(sha256.lower()):
            raise ValueError(
                f"{file} has the SHA-256 checksum {self.sha256}, not {sha256!r}: get the file again, or correct the checksum."
            )
        try:
            self.network = torch.jit.load(str(file), map_location=device).eval()
            known = {argument.name for argument in self.network.forward.schema.arguments}
        except (RuntimeError, AttributeError) as error:  # the second where it has no forward
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"{file} cannot be read as TorchScript ({reason}): give a network that torch.jit.save wrote."
            ) from error
        self.name, self.side, self.least_frames, self.device = file.name, side, least_frames, device
        self._options = {name: value for name, value in _I3D_OPTIONS.items() if name in known}

    @torch.no_grad()
    def features(self, video: Tensor) -> Tensor:
        """Give (B, d) for clips (B, 3, T, side, side) in [-1, 1]."""
        try:
            found = self.network(video.to(self.device), **self._options)
        except (RuntimeError, torch.jit.Error) as error:  # the second where the network itself raises
            reason = str(error).strip().split("\n")[-1]
            raise ValueError(
                f"{self.name} fails on clips of shape {tuple(video.shape)} ({reason}): give a network of clips (B, 3, T, H, W) in [-1, 1]."
            ) from error
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(video):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"{self.name} gave {shape} for {len(video)} clips: a detector gives a tensor (clips, features).")
        return found


_I3D_OPTIONS: Mapping[str, bool] = {"rescale": False, "resize": False, "return_features": True}


def try_detector(detector: Detector, frames: int) -> int:
    """Run a detector on two clips of noise, of so many frames; gives how many features it tells. Raises ValueError where it fails."""
    noise = torch.rand(2, 3, frames, detector.side, detector.side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = detector.features(noise)
    if not features.isfinite().all():
        raise ValueError(f"{detector.name} gave features that are no numbers for clips of noise: give another detector.")
    return features.shape[1]


class RandomConvDetector:
    """Fixed filters in space and time with weights from a seed, two layers of 16, averaged over the clip: a proxy that needs no file.

    It sees colours, edges and how they change, but knows nothing of the world: it ranks damage of one kind and is no FVD.
    """

    figure = "frechet_random_conv3d_proxy"
    name = "random_conv3d_32"
    side = 64
    least_frames = 5

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        first = torch.randn(16, 3, 3, 5, 5, generator=generator) / (3 * 3 * 5 * 5) ** 0.5
        # Four filters see brightness, four only differences in space or time, eight only changes in time, which are small and so enlarged.
        first[4:8] -= first[4:8].mean(dim=(1, 2, 3, 4), keepdim=True)
        first[8:] = 4 * (first[8:] - first[8:].mean(dim=2, keepdim=True))
        self.first = first
        self.second = torch.randn(16, 16, 3, 3, 3, generator=generator) / (16 * 27) ** 0.5
        weights = b"".join(weight.numpy().tobytes() for weight in (self.first, self.second))
        # A release of torch may draw other numbers of the same seed, so the card names the numbers.
        self.sha256 = hashlib.sha256(weights).hexdigest()

    @torch.no_grad()
    def features(self, video: Tensor) -> Tensor:
        """Give (B, 32) for clips (B, 3, T, side, side) in [-1, 1]."""
        first, second = (weight.to(video.device) for weight in (self.first, self.second))
        hidden = F.relu(F.conv3d(video.float(), first, stride=(1, 2, 2)))
        deeper = F.relu(F.conv3d(hidden, second, stride=(1, 2, 2)))
        return torch.cat([reduce(maps, "B D T H W -> B D", "mean") for maps in (hidden, deeper)], dim=1)


class FrechetMeter:
    """Gather the features of real clips and of the rows of a table, and give each row's Fréchet distance with its protocol card.

    fps: of the frames that are added. is_context_included: whether the given frames are among them.
    """

    def __init__(self, detector: Detector, fps: float | None, is_context_included: bool) -> None:
        self.detector, self.fps, self.is_context_included = detector, fps, is_context_included
        self._real: FeatureStatistics | None = None
        self._rows: dict[str, FeatureStatistics] = {}
        self._frames: int | None = None

    def add_real(self, video: Tensor) -> None:
        """Add real clips (B, C, T, H, W) in [-1, 1]; C = 1 counts as grey."""
        self._real = self._add(self._real, video)

    def add_generated(self, video: Tensor, row: str = "prediction") -> None:
        """Add generated clips (B, C, T, H, W) in [-1, 1] of a row, as long as the real ones; several samples one after another."""
        self._rows[row] = self._add(self._rows.get(row), video)

    def card(self, row: str = "prediction") -> ProtocolCard:
        """Give the protocol of a row's distance so far."""
        generated = self._rows.get(row)
        return ProtocolCard(
            figure=self.detector.figure,
            detector=self.detector.name,
            detector_sha256=self.detector.sha256,
            frames=self._frames or 0,
            fps=self.fps,
            resize=f"shorter side to {self.detector.side} pixels, the longer one rounded up, bilinear without antialiasing, middle square",
            num_real=self._real.count if self._real else 0,
            num_generated=generated.count if generated else 0,
            num_features=len(self._real.mean) if self._real else 0,
            is_context_included=self.is_context_included,
        )

    def distance(self, row: str = "prediction") -> float:
        """Give a row's distance; raises ValueError below two clips of a kind. Of no more clips than features the card says so."""
        real, generated, card = self._real, self._rows.get(row), self.card(row)
        if real is None or generated is None:
            raise ValueError(f"{card.num_real} real and {card.num_generated} clips of {row} were added: a distance needs both.")
        if min(real.count, generated.count) < 2:
            raise ValueError(
                f"{card.figure} got {card.num_real} real clips and {card.num_generated} of {row}: a covariance needs 2 or more of each."
            )
        return frechet_distance(real.mean, real.covariance, generated.mean, generated.covariance)

    def _add(self, statistics: FeatureStatistics | None, video: Tensor) -> FeatureStatistics:
        check_pair(video, video)
        frames = video.shape[2]
        if frames < self.detector.least_frames:
            raise ValueError(
                f"Clips of {frames} frames came, {self.detector.name} needs {self.detector.least_frames}: predict more."
            )
        if self._frames not in (None, frames):
            raise ValueError(f"Clips of {frames} frames came after clips of {self._frames}: give all the same length.")
        self._frames = frames
        for clips in video.split(max(1, PIXELS_AT_ONCE // (frames * self.detector.side**2))):
            features = self.detector.features(resized(clips, self.detector.side))
            statistics = statistics or FeatureStatistics(features.shape[1])
            statistics.update(features)
        assert statistics is not None
        return statistics


def resized(video: Tensor, side: int) -> Tensor:
    """Scale clips (B, C, T, H, W) until the shorter side is `side` pixels, and cut out the middle: (B, 3, T, side, side).

    Bilinear without antialiasing, the longer side rounded up: as `preprocess_single` of the FVD code by StyleGAN-V's authors has it
    (universome/fvd-comparison), which most published figures follow.
    """
    frames, (height, width) = video.shape[2], video.shape[-2:]
    scale = side / min(height, width)
    # In fp64 as there, where 50 pixels times 224 / 50 are a little more than 224, and so rounded up to 225.
    covering = (side, math.ceil(width * scale)) if height < width else (math.ceil(height * scale), side)
    images = rearrange(video.float(), "B C T H W -> (B T) C H W")
    if covering != (height, width):
        images = F.interpolate(images, size=covering, mode="bilinear", align_corners=False)
    top, left = (covering[0] - side) // 2, (covering[1] - side) // 2
    images = images[..., top : top + side, left : left + side].expand(-1, 3, -1, -1)
    return rearrange(images, "(B T) C H W -> B C T H W", T=frames)
