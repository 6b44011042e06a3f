"""Options of vidtok-train, -encode, -reconstruct, -evaluate and -bench. Light to import, so that `--help` stays fast."""

import math
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from vidtok.run_options import RunOptions, check_trackers


@dataclass(frozen=True)
class LossOptions:
    """Weights of the reconstruction loss; every term is a mean, so weights hold for every size of frame, and 0 leaves a term out.

    The squared error alone is what PSNR measures; it also trains faster than the absolute one (+0.9 dB after 700 steps).
    l1, l2, charbonnier (a root of l2 that is smooth at 0): error of each pixel. multiscale: l1 of pictures halved up to
    multiscale_levels times. gradient: l1 of differences between neighbouring pixels; temporal: between neighbouring frames.
    motion_weight: extra weight, in the terms of each pixel, of one that differs from its clip's mean by motion_threshold or more
    (full scale 2.0), so that small moving things are not drowned by a still background; 0 is the plain loss.
    lpips_weights: file of a VGG16 or AlexNet, which switches LPIPS on, with lpips_weight null: 1; lpips_heads: file of its linear heads,
    null takes those in lpips_weights, else those that torchmetrics brings. lpips_sha256: checksum of lpips_weights, or its first 8
    digits or more.
    lpips_frames: frames of a clip that it looks at, drawn anew each step; null: all.
    """

    l1_weight: float = 0.0
    l2_weight: float = 4.0
    charbonnier_weight: float = 0.0
    multiscale_weight: float = 0.0
    multiscale_levels: int = 3
    gradient_weight: float = 0.0
    temporal_weight: float = 0.0
    motion_weight: float = 0.0
    motion_threshold: float = 0.1
    lpips_weight: float | None = None
    lpips_weights: str | None = None
    lpips_heads: str | None = None
    lpips_sha256: str | None = None
    lpips_frames: int | None = None

    def __post_init__(self) -> None:
        """Refuse what no loss can have."""
        pixels = ("l1_weight", "l2_weight", "charbonnier_weight", "multiscale_weight")
        check_weights(self, "loss", *pixels, "gradient_weight", "temporal_weight", "motion_weight", "lpips_weight")
        check_at_least(self, multiscale_levels=1, lpips_frames=1)
        if not any(getattr(self, name) for name in pixels):
            raise ValueError(
                f"{', '.join('loss.' + name for name in pixels)} are all 0: give one of them, nothing else holds the colours"
            )
        if self.lpips_weight and self.lpips_weights is None:
            raise ValueError(
                f"loss.lpips_weight={self.lpips_weight} weighs nothing without a network: give loss.lpips_weights=FILE, of a VGG16 or "
                "AlexNet, or leave lpips_weight out"
            )


@dataclass(frozen=True)
class GanOptions:
    """Keys of adversarial training, which sharpens a tokenizer that reconstructs already; weight=0 leaves it out.

    The discriminator trains after step `start`. Its gradient reaches the tokenizer warmup_steps later, on a ramp over ramp_steps.
    dimensions: 2 judges frames, 3 clips. lr follows the run's schedule. is_adaptive: weight is relative to the reconstruction's gradient
    at the decoder's last layer, by a factor of at most max_adaptive_weight. lecam_weight, r1_weight: regularisation of the discriminator.
    patience: evaluations in a row that may reconstruct worse than before it began until a warning says so.
    """

    weight: float = 0.0
    start: int = 2000
    warmup_steps: int = 1000
    ramp_steps: int = 1000
    dimensions: int = 2
    width: int = 64
    layers: int = 3
    lr: float = 2e-4
    betas: list[float] = field(default_factory=lambda: [0.5, 0.9])
    is_adaptive: bool = True
    max_adaptive_weight: float = 100.0
    lecam_weight: float = 0.01
    r1_weight: float = 0.0
    patience: int = 3

    def __post_init__(self) -> None:
        """Refuse what no adversarial training can have."""
        check_weights(self, "gan", "weight", "max_adaptive_weight", "lecam_weight", "r1_weight")
        check_at_least(self, start=0, warmup_steps=0, ramp_steps=1, width=1, layers=1, patience=1)
        if self.dimensions not in (2, 3):
            raise ValueError(f"gan.dimensions={self.dimensions} is not known: give 2 (judges frames) or 3 (judges clips)")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"gan.lr={self.lr} is not allowed: give a number above 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"gan.betas={list(self.betas)} is not allowed: give AdamW's two decay rates, for example [0.5,0.9]")


@dataclass(frozen=True)
class TrainTokenizerOptions(RunOptions):
    """Keys of vidtok-train.

    A clip is clip_frames frames, frame_gap source frames apart. unquantized_steps: the first steps let latents pass unquantised, which
    keeps a codebook from collapsing onto untrained latents; none with init_from. init_from: a trained tokenizer to start from; keys of
    tokenizer= that shape the network must then agree with it. train_only=decoder keeps its encoder and codebook, and so every token, as
    they are.
    """

    optimizer: str = "muon"
    lr: float = 3e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    weight_decay: float = 1e-4
    warmup_steps: int = 50
    min_lr_ratio: float = 0.02
    clip_frames: int = 9
    frame_gap: int = 1
    unquantized_steps: int = 100
    evaluation_clips: int = 64
    init_from: str | None = None
    train_only: str | None = None
    data: Any = MISSING
    tokenizer: Any = MISSING
    loss: LossOptions = field(default_factory=LossOptions)
    gan: GanOptions = field(default_factory=GanOptions)

    def __post_init__(self) -> None:
        """Refuse what no training can have."""
        check_at_least(self, clip_frames=1, frame_gap=1, evaluation_clips=1, unquantized_steps=0)
        check_trackers(self.trackers)
        if self.train_only not in (None, "decoder"):
            raise ValueError(f"train_only={self.train_only} is not known: give decoder, or null to train the whole tokenizer")
        if self.train_only is not None and self.init_from is None:
            raise ValueError("train_only=decoder keeps an encoder that is trained already: say which with init_from=DIR")
        if self.gan.weight and self.gan.is_adaptive and self.compile:
            raise ValueError(
                "gan.is_adaptive=true asks for gradients inside the tokenizer, which compile=true hides: set one of them to false"
            )


@dataclass(frozen=True)
class PretrainedOptions:
    """Keys of tokenizer= in vidtok-encode, vidtok-reconstruct and vidtok-evaluate: another project's tokenizer.

    path: a local folder with its files.
    """

    name: str = MISSING
    path: str = MISSING


@dataclass(frozen=True)
class CosmosOptions(PretrainedOptions):
    """Keys of tokenizer=cosmos. path holds encoder.jit and decoder.jit, which are code: allow_torchscript=true says you trust them.

    stride_t, stride_s: frames and pixels a token covers. levels: of its FSQ quantiser. null takes them from tokenizer.json in path,
    or measures them. usual_levels: where neither says the levels.
    """

    allow_torchscript: bool = False
    stride_t: int | None = None
    stride_s: int | None = None
    levels: list[int] | None = None
    usual_levels: list[int] | None = None


@dataclass(frozen=True)
class EncodeOptions:
    """Keys of vidtok-encode.

    checkpoint: a tokenizer that vidtok-train wrote; or else tokenizer=emu3 tokenizer.path=DIR, another project's.
    clip_frames: pixel frames of a row; null gives whole episodes, up to 1024 latent frames, and 16 latent frames after the first one
    for another project's tokenizer that cannot carry its state on. clip_hop: frames from one row's start to the next; null leaves no gap.
    rows_per_shard bounds what an interruption loses. chunk_frames: frames worked on at a time, null: up to 64, as memory allows; tile:
    pixels a side of the parts of a frame worked on at a time, null works on whole ones; neither changes tokens. precision: fp32, bf16, or
    auto as in training; in bf16 some latents fall to a neighbouring token, so the card says which it was.
    """

    checkpoint: str | None = None
    output: str = MISSING
    data: Any = MISSING
    tokenizer: Any = None
    clip_frames: int | None = None
    clip_hop: int | None = None
    rows_per_shard: int = 64
    chunk_frames: int | None = None
    tile: int | None = None
    precision: str = "fp32"

    def __post_init__(self) -> None:
        """Refuse what no encoding can have."""
        check_at_least(self, clip_frames=1, clip_hop=1, rows_per_shard=1, chunk_frames=1, tile=1)
        check_precision(self.precision)


@dataclass(frozen=True)
class ReconstructOptions:
    """Keys of vidtok-reconstruct.

    checkpoint: a tokenizer that vidtok-train wrote; or else tokenizer=emu3 tokenizer.path=DIR, another project's.
    size: [height, width], null keeps the input's. chunk_frames: frames worked on at a time, null goes by their size; tile: pixels a
    side of the parts of a frame worked on at a time, null works on whole ones. precision: fp32, bf16, or auto as in training.
    """

    checkpoint: str | None = None
    input: str = MISSING
    output: str = MISSING
    tokenizer: Any = None
    size: list[int] | None = None
    fps: float | None = None
    max_frames: int = 257
    chunk_frames: int | None = None
    tile: int | None = None
    precision: str = "fp32"

    def __post_init__(self) -> None:
        """Refuse what no reconstruction can have."""
        check_at_least(self, max_frames=1, chunk_frames=1, tile=1)
        check_precision(self.precision)
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ValueError(f"size={list(self.size)} is not [height, width] in pixels: for example size=[256,256]")


@dataclass(frozen=True)
class EvaluateTokenizerOptions:
    """Keys of vidtok-evaluate.

    checkpoint: a tokenizer that vidtok-train wrote; or else tokenizer=emu3 tokenizer.path=DIR, another project's.
    clips: at most so many, drawn by seed and evenly over the data. clip_frames: null takes 17, or the nearest count that tokenizer
    and data allow. split: train, validation or all; null takes validation where there is one. chunk_frames: where the test of seams
    cuts; null cuts in the middle. tile, overlap: pixels, for the test of seams between tiles. worst: clips to show, beside two
    typical ones.
    """

    checkpoint: str | None = None
    output: str = MISSING
    data: Any = MISSING
    tokenizer: Any = None
    clips: int = 64
    clip_frames: int | None = None
    split: str | None = None
    batch_size: int = 4
    chunk_frames: int | None = None
    tile: int | None = None
    overlap: int | None = None
    worst: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what no evaluation can have."""
        check_at_least(self, clips=1, clip_frames=1, batch_size=1, chunk_frames=1, tile=1, overlap=0, worst=0, seed=0)
        if self.split not in (None, "train", "validation", "all"):
            raise ValueError(
                f"split={self.split} is no split: give train, validation or all, or null for validation where there is one"
            )


@dataclass(frozen=True)
class BenchTokenizerOptions:
    """Keys of vidtok-bench.

    tokenizer: a preset, which is measured untrained; or else checkpoint, one that vidtok-train wrote. frames, size ([height, width])
    and batch_size: the clips of noise it works on. precision (fp32 or bf16), channels_last, compile: how it runs, by default as in the
    other commands. compare: those of these three keys of which the other value gets a row too. repeats: rounds, in each of which every
    row has its turn.
    """

    checkpoint: str | None = None
    tokenizer: Any = None
    output: str = "runs/bench"
    frames: int = 17
    size: list[int] = field(default_factory=lambda: [64, 64])
    batch_size: int = 1
    precision: str = "fp32"
    channels_last: bool = False
    compile: bool = False
    compare: list[str] = field(default_factory=lambda: ["precision", "channels_last"])
    repeats: int = 10

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        check_at_least(self, frames=1, batch_size=1, repeats=1)
        if (self.checkpoint is None) == (self.tokenizer is None):
            found = "neither" if self.checkpoint is None else "both"
            raise ValueError(
                f"{found} of checkpoint and tokenizer is given: give checkpoint=DIR or tokenizer=tiny, one of the two"
            )
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size={list(self.size)} is not [height, width] in pixels: for example size=[64,64]")
        check_precision(self.precision, "fp32", "bf16")
        unknown = [key for key in self.compare if key not in ("precision", "channels_last", "compile")]
        if unknown:
            raise ValueError(f"compare={list(self.compare)} names {unknown[0]}: it can name precision, channels_last and compile")


def check_at_least(options: object, **least: int) -> None:
    """Raise ValueError for the first of the named options that is below its least value; null passes."""
    for name, value in least.items():
        given = getattr(options, name)
        if given is not None and given < value:
            raise ValueError(f"{name}={given} is not allowed: give a whole number of {value} or more")


def check_precision(given: str, *known: str) -> None:
    """Raise ValueError for a precision that is none of the known ones, by default those of training."""
    known = known or ("auto", "fp32", "bf16")
    if given not in known:
        raise ValueError(f"precision={given} is not known: give {', '.join(known[:-1])} or {known[-1]}")


def check_weights(options: object, group: str, *names: str) -> None:
    """Raise ValueError for the first of the named options of a group that is no finite number of 0 or more; null passes."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{group}.{name}={value} is not allowed: give a number of 0 or more, 0 leaves it out")
