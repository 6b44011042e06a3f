"""Options of vidtok-train, vidtok-encode and vidtok-reconstruct. Light to import, so that `--help` stays fast."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from vidtok.run_options import RunOptions


@dataclass(frozen=True)
class LossOptions:
    """Weights of the reconstruction loss.

    motion_weight: extra weight of a pixel that differs from its clip's mean by motion_threshold or more (full scale 2.0), so that
    small moving things are not drowned by a still background; 0 is the plain loss.
    """

    l1_weight: float = 1.0
    l2_weight: float = 1.0
    motion_weight: float = 0.0
    motion_threshold: float = 0.1


@dataclass(frozen=True)
class TrainTokenizerOptions(RunOptions):
    """Keys of vidtok-train.

    A clip is clip_frames frames, frame_gap source frames apart. unquantized_steps: the first steps let latents pass unquantised,
    which keeps a codebook from collapsing onto untrained latents.
    """

    clip_frames: int = 9
    frame_gap: int = 1
    unquantized_steps: int = 200
    evaluation_clips: int = 64
    data: Any = MISSING
    tokenizer: Any = MISSING
    loss: LossOptions = field(default_factory=LossOptions)

    def __post_init__(self) -> None:
        """Refuse what no training can have."""
        check_at_least(self, clip_frames=1, frame_gap=1, evaluation_clips=1, unquantized_steps=0)


@dataclass(frozen=True)
class EncodeOptions:
    """Keys of vidtok-encode.

    clip_frames: pixel frames of a row; null gives up to 1024 for a frame-wise tokenizer, 1 + 16 * stride_t otherwise. clip_hop: frames
    from one row's start to the next; null leaves no gap. rows_per_shard bounds what an interruption loses.
    """

    checkpoint: str = MISSING
    output: str = MISSING
    data: Any = MISSING
    clip_frames: int | None = None
    clip_hop: int | None = None
    rows_per_shard: int = 64
    batch_frames: int = 64

    def __post_init__(self) -> None:
        """Refuse what no encoding can have."""
        check_at_least(self, clip_frames=1, clip_hop=1, rows_per_shard=1, batch_frames=1)


@dataclass(frozen=True)
class ReconstructOptions:
    """Keys of vidtok-reconstruct. size: [height, width], null keeps the input's (cropped to a multiple of the stride)."""

    checkpoint: str = MISSING
    input: str = MISSING
    output: str = MISSING
    size: list[int] | None = None
    fps: float | None = None
    max_frames: int = 257

    def __post_init__(self) -> None:
        """Refuse what no reconstruction can have."""
        check_at_least(self, max_frames=1)
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ValueError(f"size={list(self.size)} is not [height, width] in pixels: for example size=[256,256]")


def check_at_least(options: object, **least: int) -> None:
    """Raise ValueError for the first of the named options that is below its least value; null passes."""
    for name, value in least.items():
        given = getattr(options, name)
        if given is not None and given < value:
            raise ValueError(f"{name}={given} is not allowed: give a whole number of {value} or more")
