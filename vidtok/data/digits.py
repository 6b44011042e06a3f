"""Moving digits: a toy world with a known next frame, computed on demand as a pure function of (seed, split, index)."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from einops import repeat

from vidtok.data.episodes import Episode, EpisodeSet, Frames, Split, hash_manifest
from vidtok.data.options import DigitsOptions

# Side of a digit in pixels.
DIGIT = 28

# A ready-made clip carries no rate; the rate only names the playing speed.
FPS = 10.0

# Step a frame, as a part of the way from wall to wall (Moving MNIST, arXiv:1502.04681).
SPEED = 0.1

IMAGES_MAGIC = 2051


def build(options: DigitsOptions) -> EpisodeSet:
    """Make the episodes; nothing is drawn before it is read. Raises ValueError when the file is not one of digits."""
    path = Path(options.file).expanduser() if options.file else Path(__file__).with_name("mnist_digits.npz")
    frames, content = _all_frames(path, options)
    episodes: list[Episode] = []
    for split, index in _numbered(options):
        source = f"digits/{'episode' if split == 'train' else 'validation'}-{index:05d}"
        episodes.append(Episode(source, 0.0, FPS, frames[len(episodes)], None, split))
    return EpisodeSet(
        name="digits",
        height=options.size,
        width=options.size,
        fps=FPS,
        num_actions=0,
        episodes=episodes,
        rejects=[],
        # Paths say nothing of what is in the files, and older manifests do not know the second one.
        manifest_hash=hash_manifest(
            [{name: value for name, value in asdict(options).items() if name != "validation_file"} | {"file": None}, content]
        ),
    )


def _all_frames(path: Path, options: DigitsOptions) -> tuple[list[Frames], str]:
    """Give the frames of every episode, those of the training split first, and a hash of what they are made of."""
    if options.validation_file is None:
        numbered = _numbered(options)
        return _ready_made(path, options, len(numbered)) if path.suffix == ".npy" else _drawn(path, options, numbered)
    held_out = Path(options.validation_file).expanduser()
    if held_out.suffix != ".npy":
        raise ValueError(
            f"data.validation_file is {held_out}: give sequences as .npy, such as mnist_test_seq.npy, or leave it away."
        )
    train = _numbered(options)[: options.episodes]
    first, ours = _ready_made(path, options, len(train)) if path.suffix == ".npy" else _drawn(path, options, train)
    last, theirs = _ready_made(held_out, options, options.validation_episodes)
    return first + last, ours + theirs


def _numbered(options: DigitsOptions) -> list[tuple[Split, int]]:
    train: list[tuple[Split, int]] = [("train", index) for index in range(options.episodes)]
    return train + [("validation", index) for index in range(options.validation_episodes)]


def _drawn(path: Path, options: DigitsOptions, numbered: list[tuple[Split, int]]) -> tuple[list[Frames], str]:
    images = load_digits(path)
    # Every fifth image, so that both splits hold all ten digits even in a file sorted by label.
    is_held_out = np.arange(len(images)) % 5 == 4
    banks = {"train": images[~is_held_out], "validation": images[is_held_out]}
    frames: list[Frames] = [DigitFrames(banks[split], options, split, index) for split, index in numbered]
    return frames, hashlib.sha256(images.tobytes()).hexdigest()


def load_digits(path: Path) -> np.ndarray:
    """Load digit images uint8 (N, 28, 28) from an .npz with `images` or from MNIST's train-images-idx3-ubyte[.gz]."""
    if not path.is_file():
        raise ValueError(f"data.file is {path}, which does not exist.")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                images = archive["images"]
        else:
            images = _read_idx(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
    except (OSError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a file of digits ({error}): give train-images-idx3-ubyte, the same as .gz, "
                         "or mnist_test_seq.npy.") from error  # fmt: skip
    if images.dtype != np.uint8 or images.ndim != 3 or images.shape[1:] != (DIGIT, DIGIT) or len(images) < 5:
        raise ValueError(f"{path} holds {images.dtype} {images.shape}: digits are uint8 (N, 28, 28), at least 5 of them.")
    return images


def _read_idx(content: bytes) -> np.ndarray:
    magic, count, height, width = (int.from_bytes(content[at : at + 4], "big") for at in (0, 4, 8, 12))
    if magic != IMAGES_MAGIC:
        raise ValueError(f"it starts with {magic} instead of {IMAGES_MAGIC}")
    return np.frombuffer(content, np.uint8, offset=16).reshape(count, height, width)


def _ready_made(path: Path, options: DigitsOptions, needed: int) -> tuple[list[Frames], str]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as sequences: {error}.") from error
    if array.dtype != np.uint8 or array.ndim != 4:
        raise ValueError(f"{path} holds {array.dtype} {array.shape}: sequences are uint8 (T, N, H, W).")
    if array.shape[2:] != (options.size, options.size) or array.shape[0] < options.frames or array.shape[1] < needed:
        raise ValueError(f"{path} holds {array.shape[1]} sequences of {array.shape[0]} frames {array.shape[2]}x{array.shape[3]}, "
                         f"and data asks for {needed} of {options.frames} frames with data.size={options.size}.")  # fmt: skip
    frames: list[Frames] = [SequenceFrames(str(path), index, options.frames) for index in range(needed)]
    return frames, hashlib.sha256(array[:, :needed].tobytes()).hexdigest()


def positions(options: DigitsOptions, split: Split, index: int) -> np.ndarray:
    """Give the top left corners of all digits of an episode: float64 (T, num_digits, 2), rows and columns in pixels.

    Each digit moves at constant speed along a straight line, mirrored at the walls 0 and size - 28.
    """
    draw = _draw(options, split, index)
    way = options.size - DIGIT
    first = draw.uniform(0, way, (options.num_digits, 2))
    angle = draw.uniform(0, 2 * np.pi, options.num_digits)
    velocity = SPEED * way * np.stack([np.sin(angle), np.cos(angle)], axis=-1)
    straight = first + np.arange(options.frames)[:, None, None] * velocity
    # A mirrored line is a straight one folded at multiples of the way.
    folded = np.mod(straight, 2 * max(way, 1))
    return np.where(folded > way, 2 * way - folded, folded) if way else np.zeros_like(straight)


def _draw(options: DigitsOptions, split: Split, index: int) -> np.random.Generator:
    return np.random.default_rng([options.seed, ("train", "validation").index(split), index])


@dataclass(frozen=True)
class DigitFrames:
    """The frames of one drawn episode. images: uint8 (N, 28, 28), those of the split."""

    images: np.ndarray
    options: DigitsOptions
    split: Split
    index: int

    def __len__(self) -> int:
        return self.options.frames

    def __getitem__(self, index: slice) -> np.ndarray:
        options = self.options
        corners = np.rint(positions(options, self.split, self.index)[index]).astype(int)
        # Of its own stream, so that the choice of digits does not shift the positions.
        chosen = _draw(options, self.split, self.index).spawn(1)[0].integers(0, len(self.images), options.num_digits)
        canvas = np.zeros((len(corners), options.size, options.size), np.uint8)
        for frame, places in zip(canvas, corners, strict=True):
            for digit, (top, left) in zip(self.images[chosen], places, strict=True):
                region = frame[top : top + DIGIT, left : left + DIGIT]
                np.maximum(region, digit, out=region)
        return repeat(canvas, "T H W -> T H W C", C=3)


@dataclass(frozen=True)
class SequenceFrames:
    """The first `frames` frames of sequence `index` in a .npy file uint8 (T, N, H, W)."""

    path: str
    index: int
    frames: int

    def __len__(self) -> int:
        return self.frames

    def __getitem__(self, index: slice) -> np.ndarray:
        grey = np.load(self.path, mmap_mode="r")[: self.frames, self.index]
        return repeat(np.array(grey[index]), "T H W -> T H W C", C=3)
