"""LPIPS, the learned perceptual distance of images, from weight files that the user has: nothing is downloaded.

Source: Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, arXiv:1801.03924, version 0.1 of its weights.
"""

from __future__ import annotations

import hashlib
import importlib.util
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Self

import torch
from einops import rearrange, reduce
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

# Mean and spread that inputs in [-1, 1] are normalised by: ImageNet's, on that scale.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
# torchvision names a convolution features.N; the lpips package keeps the same N inside its slices.
_CONVOLUTION = re.compile(r"(?:features|net\.slice\d)\.(\d+)\.(weight|bias)")
_HEAD = re.compile(r"lin(\d)\.model\.1\.weight")


@dataclass(frozen=True)
class _Backbone:
    """Where a network's convolutions stand, by torchvision's numbers, stage by stage; a distance is taken after each stage."""

    stages: tuple[tuple[int, ...], ...]
    pooled: tuple[int, ...]  # stages that begin with max pooling
    pool: int  # its kernel; the stride is 2
    strides: Mapping[int, int]
    paddings: Mapping[int, int]  # 1 where nothing is said
    least_side: int  # pixels that leave one place after the last stage


_BACKBONES = {
    "alex": _Backbone(((0,), (3,), (6,), (8,), (10,)), (1, 2), 3, {0: 4}, {0: 2, 3: 2}, 31),
    "vgg": _Backbone(((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)), (1, 2, 3, 4), 2, {}, {}, 16),
}


class Lpips(nn.Module):
    """Measure how different two images look. Frozen, always in eval mode, in fp32 whatever surrounds it."""

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        name: str,
        convolutions: Mapping[str, Tensor],
        heads: Mapping[str, Tensor],
        checksum: str = "",
        heads_checksum: str = "",
    ) -> None:
        """Build AlexNet (alex) or VGG16 (vgg) of convolutions N.weight and N.bias, and heads 0 .. 4 of shape (1, C, 1, 1).

        checksum, heads_checksum: name the files they come from.
        """
        super().__init__()
        self.name, self.checksum, self.heads_checksum = name, checksum, heads_checksum
        self.backbone = _BACKBONES[name]
        places = chain.from_iterable(self.backbone.stages)
        self.convolutions = nn.ModuleDict({str(at): self._convolution(at, convolutions) for at in places})
        self.heads = nn.ParameterList([nn.Parameter(heads[str(number)].float()) for number in range(len(self.backbone.stages))])
        self.register_buffer("shift", rearrange(torch.tensor(SHIFT), "C -> C 1 1"))
        self.register_buffer("scale", rearrange(torch.tensor(SCALE), "C -> C 1 1"))
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, also when the module that holds this one is put in training mode."""
        return super().train(False)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Give the distance of each image from its target, (N,); both (N, 3, H, W) in [-1, 1]. Raises ValueError on small images."""
        if min(images.shape[-2:]) < self.backbone.least_side:
            raise ValueError(
                f"LPIPS got images of {images.shape[-2]}x{images.shape[-1]} pixels, its network needs {self.backbone.least_side} on both "
                "sides: use larger frames, or loss.lpips_weight=0"
            )
        with torch.autocast(images.device.type, enabled=False):
            with torch.no_grad():
                expected = self._features(targets.float())
            return sum(
                (
                    reduce(head * (found - wanted).square(), "N C H W -> N C", "mean").sum(dim=1)
                    for head, found, wanted in zip(self.heads, self._features(images.float()), expected, strict=True)
                ),
                start=images.new_zeros(len(images), dtype=torch.float32),
            )

    def of_clips(self, video: Tensor, reference: Tensor, num_frames: int | None = None) -> Tensor:
        """Give the mean distance of frames, a scalar; both (B, 3, T, H, W) in [-1, 1].

        num_frames: frames drawn at random from each clip (torch's global generator); None takes all.
        """
        if num_frames is not None and num_frames < video.shape[2]:
            # Drawn on the CPU, so that a run draws the same frames on every device.
            chosen = torch.rand(video.shape[0], video.shape[2]).argsort(dim=1)[:, :num_frames].to(video.device)
            clips = rearrange(torch.arange(len(video), device=video.device), "B -> B 1")
            # Indexing with two tensors around a slice puts their axes first.
            return self(*(rearrange(x[clips, :, chosen], "B n C H W -> (B n) C H W") for x in (video, reference))).mean()
        return self(*(rearrange(x, "B C T H W -> (B T) C H W") for x in (video, reference))).mean()

    def _features(self, images: Tensor) -> list[Tensor]:
        """Give the maps (N, C, H, W) after each stage, every place scaled to length 1."""
        hidden, found = (images - self.shift) / self.scale, []
        for number, stage in enumerate(self.backbone.stages):
            if number in self.backbone.pooled:
                hidden = F.max_pool2d(hidden, self.backbone.pool, stride=2)
            for at in stage:
                hidden = F.relu(self.convolutions[str(at)](hidden))
            # Inside the root, because a place where all channels are 0 would have an infinite derivative.
            found.append(hidden / (hidden.square().sum(dim=1, keepdim=True) + 1e-10).sqrt())
        return found

    def _convolution(self, at: int, tensors: Mapping[str, Tensor]) -> nn.Conv2d:
        weight, bias = tensors[f"{at}.weight"].float(), tensors[f"{at}.bias"].float()
        stride, padding = self.backbone.strides.get(at, 1), self.backbone.paddings.get(at, 1)
        convolution = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], stride, padding)
        convolution.load_state_dict({"weight": weight, "bias": bias})
        return convolution


def load_lpips(weights: str | Path, heads: str | Path | None = None, sha256: str | None = None) -> Lpips:
    """Build LPIPS of the files that people have: .pth (read without running code) or .safetensors.

    weights: torchvision's AlexNet or VGG16 state dict, or the lpips package's, which may hold the heads too.
    heads: the lpips package's linear heads; None takes those in `weights`, else the ones that torchmetrics brings along.
    sha256: checksum of `weights`, or its first 8 digits or more. Raises ValueError or FileNotFoundError, in one sentence.
    """
    tensors, checksum = _read(Path(weights), sha256)
    convolutions = {f"{found[1]}.{found[2]}": value for key, value in tensors.items() if (found := _CONVOLUTION.fullmatch(key))}
    name = next((name for name, backbone in _BACKBONES.items() if _fits(backbone, convolutions)), None)
    if name is None:
        raise ValueError(
            f"{weights} holds neither AlexNet's nor VGG16's convolutions (features.0.weight, ...): give torchvision's alexnet-*.pth "
            "or vgg16-*.pth, or the lpips package's state dict"
        )
    found_heads, heads_checksum = _heads(tensors), checksum
    if heads is not None or not found_heads:
        path = Path(heads) if heads is not None else _packaged_heads(name)
        tensors, heads_checksum = _read(path)
        found_heads, weights = _heads(tensors), path
    last = [stage[-1] for stage in _BACKBONES[name].stages]
    for number, at in enumerate(last):
        wanted = (1, convolutions[f"{at}.weight"].shape[0], 1, 1)
        head = found_heads.get(str(number))
        if head is None or tuple(head.shape) != wanted:
            has = "nothing" if head is None else f"shape {tuple(head.shape)}"
            raise ValueError(
                f"{weights} has {has} under lin{number}.model.1.weight, where {name} needs {wanted}: give lpips_heads=FILE, "
                f"the lpips package's {name}.pth"
            )
    return Lpips(name, convolutions, found_heads, checksum, heads_checksum)


def file_sha256(path: str | Path) -> str:
    """Give the SHA-256 checksum of a file in hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fits(backbone: _Backbone, convolutions: Mapping[str, Tensor]) -> bool:
    needed = {f"{at}.{kind}" for stage in backbone.stages for at in stage for kind in ("weight", "bias")}
    return set(convolutions) == needed


def _heads(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {found[1]: value for key, value in tensors.items() if (found := _HEAD.fullmatch(key))}


def _packaged_heads(name: str) -> Path:
    spec = importlib.util.find_spec("torchmetrics")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "functional" / "image" / "lpips_models" / f"{name}.pth"


def _read(path: Path, sha256: str | None = None) -> tuple[dict[str, Tensor], str]:
    """Give the tensors of a file, and its checksum."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file: give lpips_weights=FILE, for example torchvision's vgg16-397923af.pth")
    found = file_sha256(path)
    if sha256 is not None and not (len(sha256) >= 8 and found.startswith(sha256.lower())):
        raise ValueError(f"{path} has the SHA-256 checksum {found}, not {sha256}: get the file again, or correct lpips_sha256")
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{path} cannot be read as a state dict ({reason}): give a .pth or .safetensors file of tensors"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path} is no state dict, whose values are all tensors: give torchvision's or the lpips package's file")
    return tensors, found
