"""Options of every data source: the only home of their defaults, and the schema of Hydra's group `data`."""

# No `from __future__ import annotations` here: OmegaConf reads the annotations as types.
import difflib
import importlib.util
import math
from dataclasses import dataclass, field

_LONGER = {
    "files": "a larger data.validation or a higher data.fps",
    "atari": "a larger data.max_frames",
    "digits": "a larger data.frames",
}


def how_to_lengthen(source: str, is_end_held_out: bool = True) -> str:
    """Name the keys that make episodes of a source longer. is_end_held_out: is an episode the held-out end of a file?"""
    return _LONGER.get(source, "longer videos") if is_end_held_out or source != "files" else "a higher data.fps or longer videos"


def _check_size(name: str, size: list[int]) -> None:
    if len(size) != 2 or any(side < 1 for side in size):
        raise ValueError(f"{name} is {list(size)}: it must be [height, width] in pixels, for example [64, 64].")


def _check_at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}: it must be {least} or more.")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**31:
        raise ValueError(f"data.seed is {seed}: it must be between 0 and 2147483647.")


@dataclass(frozen=True)
class FilesOptions:
    """Video files of the user: a folder, searched recursively, or one file."""

    name: str = "files"
    root: str | None = ""  # null where a benchmark asks for it
    fps: float | None = None  # frames a second; null takes the first video's rate
    size: list[int] = field(default_factory=lambda: [64, 64])  # height, width in pixels
    stretch: bool = False  # scale other shapes to that size without keeping the aspect; false covers it and crops the middle
    validation: float = 0.1  # fraction held out; of few videos the end of each, at least 24 frames or a quarter
    validation_root: str | None = None  # the held-out videos, in a folder of their own; null holds out that fraction of root
    pattern: str | None = None  # glob on the path below root, such as "*.mp4"
    cache_dir: str | None = None  # null is the platform's user cache
    cache_gb: float = 20.0
    max_rejected: float = 0.5  # fraction of unreadable files that is still accepted

    def __post_init__(self) -> None:
        _check_size("data.size", self.size)
        if self.fps is not None and not (math.isfinite(self.fps) and 0 < self.fps <= 1000):
            raise ValueError(f"data.fps is {self.fps}: it must be above 0 and at most 1000 frames a second, or null.")
        if not 0 <= self.validation < 1:
            raise ValueError(f"data.validation is {self.validation}: it is the fraction held out, 0 <= validation < 1.")
        if not 0 <= self.max_rejected <= 1:
            raise ValueError(f"data.max_rejected is {self.max_rejected}: it is a fraction of the files, between 0 and 1.")
        if not self.cache_gb > 0:
            raise ValueError(f"data.cache_gb is {self.cache_gb}: it must be above 0.")


@dataclass(frozen=True)
class AtariOptions:
    """Episodes of an Atari game under a random policy that holds each action for a while."""

    name: str = "atari"
    game: str = "freeway"
    episodes: int = 10
    validation_episodes: int = 2
    max_frames: int = 600  # a recorded episode is cut here; counted after frame_skip
    frame_skip: int = 4  # screens of the console (60 a second) for one recorded frame
    size: list[int] = field(default_factory=lambda: [64, 64])  # height, width in pixels
    crop: list[int] | None = None  # top, bottom, left, right in pixels of the screen
    action_repeat: int = 8  # each action is held for 1 to this many recorded frames
    noop_max: int = 30  # up to this many idle screens first, so that episodes differ
    validation_start: int = 0  # idle screens more before a validation episode: a game that starts alike each time is met later
    seed: int = 0
    cache_dir: str | None = None  # null is the platform's user cache

    def __post_init__(self) -> None:
        _check_size("data.size", self.size)
        _check_seed(self.seed)
        for name, least in (("episodes", 1), ("validation_episodes", 0), ("max_frames", 1), ("frame_skip", 1),
                            ("action_repeat", 1), ("noop_max", 0),
                            ("validation_start", 0)):  # fmt: skip
            _check_at_least(f"data.{name}", getattr(self, name), least)
        if self.crop is not None:
            _check_crop(self.crop)
        # Without ale-py the names are unknown; the source itself then says what to install.
        if importlib.util.find_spec("ale_py") is not None:
            _check_game(self.game)


def _check_crop(crop: list[int]) -> None:
    if len(crop) != 4 or not (0 <= crop[0] < crop[1] and 0 <= crop[2] < crop[3]):
        raise ValueError(f"data.crop is {list(crop)}: it must be [top, bottom, left, right] in pixels of the screen, "
                         "with top < bottom and left < right.")  # fmt: skip


def _check_game(game: str) -> None:
    from ale_py import roms

    known = roms.get_all_rom_ids()
    if game in known:
        return
    nearest = difflib.get_close_matches(game.lower(), known, n=3)
    advice = f"did you mean {' or '.join(nearest)}?" if nearest else f"one of {len(known)} names, such as {known[0]}."
    raise ValueError(f"data.game is {game!r}, which is not a game of ale-py: {advice}")


@dataclass(frozen=True)
class DigitsOptions:
    """Digits that move at constant speed and bounce off the walls of a square canvas."""

    name: str = "digits"
    file: str | None = None  # null is the packaged set; or train-images-idx3-ubyte[.gz], mnist_test_seq.npy
    validation_file: str | None = None  # held-out sequences that are ready-made: mnist_test_seq.npy; null draws them
    num_digits: int = 2
    frames: int = 20  # of every episode
    size: int = 64  # side of the canvas in pixels
    episodes: int = 2000
    validation_episodes: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        _check_seed(self.seed)
        for name, least in (("num_digits", 1), ("frames", 1), ("size", 28), ("episodes", 1), ("validation_episodes", 0)):
            _check_at_least(f"data.{name}", getattr(self, name), least)
