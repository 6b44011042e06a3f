"""Atari episodes with exact actions, played by the Arcade Learning Environment under a seeded random policy."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vidtok.data.cache import FrameWriter, cache_key, count_frames, open_cache, progress_bar
from vidtok.data.episodes import Episode, EpisodeSet, FrameFile, Split, hash_manifest
from vidtok.data.options import AtariOptions
from vidtok.video import stretch_frames

if TYPE_CHECKING:
    from ale_py import ALEInterface

# Screens a second of the console.
SCREEN_RATE = 60


def build(options: AtariOptions) -> EpisodeSet:
    """Play all episodes, or take them from the cache. Raises ValueError when ale-py is missing or the crop does not fit."""
    if importlib.util.find_spec("ale_py") is None:
        raise ValueError('data=atari needs ale-py, which is not installed: pip install "vidtok-vidgpt[atari]".')
    names: list[tuple[Split, int]] = [("train", index) for index in range(options.episodes)]
    names += [("validation", index) for index in range(options.validation_episodes)]
    emulator = load_game(options.game)
    _check_crop_fits(options, emulator)
    folder = open_cache(options.cache_dir)
    episodes = []
    with progress_bar() as progress:
        task = progress.add_task(f"playing {options.game}", total=len(names))
        for split, index in names:
            episodes.append(_cached_episode(emulator, options, folder, split, index))
            progress.advance(task)
    manifest = [asdict(options) | {"cache_dir": None}, _version(), [len(episode.frames) for episode in episodes]]
    return EpisodeSet(
        name="atari",
        height=options.size[0],
        width=options.size[1],
        fps=SCREEN_RATE / options.frame_skip,
        num_actions=len(emulator.getMinimalActionSet()),
        episodes=episodes,
        rejects=[],
        manifest_hash=hash_manifest(manifest),
    )


def load_game(game: str) -> ALEInterface:
    """Give an emulator with the game loaded: deterministic, silent. Raises ValueError for a game it cannot play."""
    from ale_py import ALEInterface, LoggerMode, roms

    rom = roms.get_rom_path(game)
    # Loading such a game would end the process.
    if rom is None or ALEInterface.isSupportedROM(rom) is None:
        raise ValueError(f"data.game is {game!r}, which ale-py holds but cannot play alone: choose another game.")
    ALEInterface.setLoggerMode(LoggerMode.Error)
    emulator = ALEInterface()
    emulator.setFloat("repeat_action_probability", 0.0)
    # The console's own start-up noise; the episodes differ by their idle start and their actions.
    emulator.setInt("random_seed", 0)
    emulator.loadROM(str(rom))
    return emulator


def play(emulator: ALEInterface, options: AtariOptions, actions: np.ndarray, idle: int) -> Iterator[np.ndarray]:
    """Reset the game, wait `idle` screens, and give one screen uint8 (H, W, 3) for each action until the game is over.

    actions: int64 (T,), indices into the minimal action set. The first is not played: it stands before the first frame.
    """
    minimal = emulator.getMinimalActionSet()
    emulator.reset_game()
    for _ in range(idle):
        emulator.act(0)
    yield _cropped(emulator.getScreenRGB(), options.crop)
    for action in actions[1:]:
        for _ in range(options.frame_skip - 1):
            emulator.act(minimal[action])
        before = emulator.getScreenRGB()
        emulator.act(minimal[action])
        if emulator.game_over():
            return
        screen = emulator.getScreenRGB()
        # Many games draw a sprite on every other screen only: the brighter of two shows all (arXiv:1312.5602, section 5).
        if options.frame_skip > 1:
            screen = np.maximum(screen, before)
        yield _cropped(screen, options.crop)


def choose_actions(options: AtariOptions, split: Split, index: int, num_actions: int) -> tuple[np.ndarray, int]:
    """Draw one episode's actions int64 (max_frames,), the first being 0, and its number of idle screens.

    A pure function of its arguments; each action is held for 1 to action_repeat frames.
    """
    draw = np.random.default_rng([options.seed, ("train", "validation").index(split), index])
    idle = int(draw.integers(0, options.noop_max + 1)) + (options.validation_start if split == "validation" else 0)
    choices = draw.integers(0, num_actions, options.max_frames)
    holds = draw.integers(1, options.action_repeat + 1, options.max_frames)
    actions = np.concatenate([np.zeros(1, np.int64), np.repeat(choices, holds)])
    return actions[: options.max_frames].astype(np.int64), idle


def _cropped(screen: np.ndarray, crop: list[int] | None) -> np.ndarray:
    if crop is None:
        return screen
    top, bottom, left, right = crop
    return screen[top:bottom, left:right]


def _check_crop_fits(options: AtariOptions, emulator: ALEInterface) -> None:
    height, width = emulator.getScreenRGB().shape[:2]
    if options.crop is not None and (options.crop[1] > height or options.crop[3] > width):
        raise ValueError(f"data.crop is {list(options.crop)}, and the screen of {options.game} is {height}x{width}: "
                         f"bottom may be {height} and right {width} at most.")  # fmt: skip


def _version() -> str:
    return importlib.metadata.version("ale-py")


def _cached_episode(emulator: ALEInterface, options: AtariOptions, folder: Path, split: Split, index: int) -> Episode:
    # Episodes are keyed one by one, so that asking for more of them keeps the old ones.
    settings = asdict(options) | {"episodes": None, "validation_episodes": None, "cache_dir": None}
    key = cache_key(["atari", settings, _version(), split, index])
    path = folder / f"atari-{options.game}-{key}.npy"
    actions, idle = choose_actions(options, split, index, len(emulator.getMinimalActionSet()))
    if not path.exists():
        height, width = options.size
        with FrameWriter(path, (height, width)) as writer:
            for screen in play(emulator, options, actions, idle):
                writer.append(stretch_frames(screen[None], (height, width))[0])
    count = count_frames(path)
    return Episode(
        source=f"{options.game}/{'episode' if split == 'train' else 'validation'}-{index:03d}",
        start=0.0,
        fps=SCREEN_RATE / options.frame_skip,
        frames=FrameFile(str(path), 0, count),
        actions=actions[:count],
        split=split,
    )
