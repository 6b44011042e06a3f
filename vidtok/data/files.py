"""Episodes from the user's video files, each decoded once into the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

from vidtok.data.cache import FrameWriter, cache_key, count_frames, open_cache, progress_bar, recall
from vidtok.data.episodes import Episode, EpisodeSet, FrameFile, Reject, hash_manifest
from vidtok.data.find import Source, find_sources
from vidtok.data.options import FilesOptions
from vidtok.video import IMAGE_SUFFIXES, VideoError, VideoInfo, iter_frames, probe, resize_frames, stretch_frames

# From this number on whole files are held out; below it the end of every file is.
MIN_FILES_TO_HOLD_OUT = 10
LEAST_HELD_OUT = 24  # frames of a single video, where a quarter of it has as many
# A video file has its index and its first frames in one of its ends.
_DIGEST_BYTES = 2**20
_RATE_TOLERANCE = 1e-3


def build(options: FilesOptions) -> EpisodeSet:
    """Find, probe and decode all videos, and split them; a file that cannot be read becomes a Reject.

    Raises ValueError when nothing is found, too many files are unreadable, or the cache would grow too large.
    """
    root = _root(options)
    sources = find_sources(root, options.pattern)
    held_out = _held_out_sources(options, root)
    sources += held_out
    folder = open_cache(options.cache_dir)
    rejects: list[Reject] = []
    infos = _probe_all(sources, folder, rejects)
    _check_rejects(rejects, len(sources), options)
    fps = options.fps or next(iter(infos.values())).fps
    _say_rate(root, next(iter(infos)).name if options.fps is None else None, fps, _count_slower(infos.values(), fps))
    _check_space(infos, options, fps)
    paths = _decode_all(infos, options, fps, folder, rejects)
    _check_rejects(rejects, len(sources), options)
    if rejects:
        print(f"data: {len(rejects)} of {len(sources)} files rejected: see rejects.csv")
    episodes = _split_given(paths, fps, held_out) if held_out else _split(paths, fps, options.validation)
    contents = [_content(source, folder) for source in paths]
    manifest = [[e.source, e.start, len(e.frames), e.split] for e in episodes]
    return EpisodeSet(
        name="files",
        height=options.size[0],
        width=options.size[1],
        fps=fps,
        num_actions=0,
        episodes=episodes,
        rejects=rejects,
        manifest_hash=hash_manifest([manifest, fps, list(options.size), contents, *_mark(options)]),
        is_stretched=options.stretch,
    )


def _mark(options: FilesOptions) -> list[str]:
    """Give what the cache and the manifest say of stretched frames: nothing of cropped ones, so that older caches and tokens count."""
    return ["stretch"] if options.stretch else []


def _count_slower(infos: Iterable[VideoInfo], fps: float) -> int:
    """Count the sources that have not as many frames a second; the rates of containers are rounded."""
    return sum(info.fps < fps * (1 - _RATE_TOLERANCE) for info in infos)


@cache  # every stage of a demo builds the same data anew
def _say_rate(root: Path, name: str | None, fps: float, slower: int) -> None:
    """Say, once a process for the same data, which rate was taken from the first file, and how many others it makes repeat frames."""
    taken = "" if name is None else f"{fps:.5g} frames a second, the rate of {name}, is used for all: data.fps sets another"
    repeated = f"frames of {slower} slower file{'s' * (slower != 1)} are repeated" if slower else ""
    if slower and name is None:
        repeated += f" to make {fps:.5g} a second, as data.fps says"
    if taken or repeated:
        print(f"data: {'; '.join(filter(None, [taken, repeated]))}")


def _root(options: FilesOptions) -> Path:
    if not options.root:
        raise ValueError("data.root is not given: set data.root=DIR, a folder of videos or one video file.")
    root = Path(options.root).expanduser()
    if not root.exists():
        raise ValueError(f"data.root is {root}, which does not exist.")
    return root.resolve()


def _held_out_sources(options: FilesOptions, root: Path) -> list[Source]:
    """Find the videos of data.validation_root; none without it. Raises ValueError where they would be trained on too."""
    if options.validation_root is None:
        return []
    folder = Path(options.validation_root).expanduser().resolve()
    if not folder.exists():
        raise ValueError(f"data.validation_root is {folder}, which does not exist.")
    if folder.is_relative_to(root) or root.is_relative_to(folder):
        raise ValueError(f"data.validation_root is {folder} and data.root {root}: one lies in the other, so the held-out videos would be "
                         "trained on too; give two folders side by side.")  # fmt: skip
    return [replace(source, name=f"validation_root:{source.name}") for source in find_sources(folder, options.pattern)]


def _probe_all(sources: list[Source], folder: Path, rejects: list[Reject]) -> dict[Source, VideoInfo]:
    infos = {}
    with progress_bar() as progress:
        for source in progress.track(sources, description="probing"):
            try:
                infos[source] = _probe(source, folder)
            except (VideoError, FileNotFoundError) as error:
                rejects.append(Reject(source.name, str(error)))
    return infos


def _probe(source: Source, folder: Path) -> VideoInfo:
    """Probe a source, or recall what an earlier run found: probing reads the whole file."""
    path = folder / f"probe-{cache_key([str(source.path), source.state])}.json"
    return VideoInfo(**recall(path, lambda: asdict(probe(source.path))))


def _content(source: Source, folder: Path) -> str:
    """Hash what is in a source, so that a copy with another date is the same and a rewritten file of equal size is not."""
    path = folder / f"content-{cache_key([str(source.path), source.state])}.json"
    return recall(path, lambda: _digest(source.path))


def _digest(path: Path) -> str:
    """Hash the size and both ends of a file, or of each image of a folder."""
    digest = hashlib.sha256()
    parts = sorted(child for child in path.iterdir() if child.suffix.lower() in IMAGE_SUFFIXES) if path.is_dir() else [path]
    for part in parts:
        size = part.stat().st_size
        digest.update(f"{part.name if path.is_dir() else ''} {size}\n".encode())
        with part.open("rb") as file:
            digest.update(file.read(_DIGEST_BYTES))
            file.seek(max(_DIGEST_BYTES, size - _DIGEST_BYTES))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def _decode_all(
    infos: dict[Source, VideoInfo], options: FilesOptions, fps: float, folder: Path, rejects: list[Reject]
) -> dict[Source, Path]:
    size = (options.size[0], options.size[1])
    fitted = stretch_frames if options.stretch else resize_frames
    paths = {}
    with progress_bar() as progress:
        task = progress.add_task("decoding", total=sum(info.seconds for info in infos.values()))
        for source in infos:
            path = folder / f"files-{cache_key([str(source.path), source.state, fps, *size, *_mark(options)])}.npy"
            try:
                if not path.exists():
                    with FrameWriter(path, size) as writer:
                        for frame in iter_frames(source.path, fps=fps):
                            writer.append(fitted(frame[None], size)[0])
                            progress.advance(task, 1 / fps)
                paths[source] = path
            except (VideoError, FileNotFoundError) as error:
                rejects.append(Reject(source.name, str(error)))
    return paths


def _check_rejects(rejects: list[Reject], count: int, options: FilesOptions) -> None:
    if not rejects:
        return
    if len(rejects) == count:
        raise ValueError(f"None of the {count} files can be used; the first: {rejects[0].reason}")
    if len(rejects) > options.max_rejected * count:
        raise ValueError(f"{len(rejects)} of {count} files cannot be used, more than data.max_rejected={options.max_rejected} "
                         f"allows; the first: {rejects[0].reason}")  # fmt: skip


def _check_space(infos: dict[Source, VideoInfo], options: FilesOptions, fps: float) -> None:
    height, width = options.size
    needed = sum(info.seconds for info in infos.values()) * fps * height * width * 3 / 1e9
    if needed > options.cache_gb:
        raise ValueError(f"The decoded frames need about {needed:.3g} GB and data.cache_gb allows {options.cache_gb:g}: "
                         "lower data.size or data.fps, or raise data.cache_gb.")  # fmt: skip


def _split(paths: dict[Source, Path], fps: float, validation: float) -> list[Episode]:
    """Hold out whole files when there are many, else the end of every file."""
    if len(paths) >= MIN_FILES_TO_HOLD_OUT:
        held_out = _held_out([source.name for source in paths], validation)
        return [
            Episode(source.name, 0.0, fps, FrameFile(str(path), 0, count_frames(path)), None,
                    "validation" if source.name in held_out else "train")
            for source, path in paths.items()
        ]  # fmt: skip
    episodes = []
    for source, path in paths.items():
        count = count_frames(path)
        is_divided = validation > 0 and count > 1
        # A tenth of a short video would be too short to predict anything in.
        kept_back = max(round(count * validation), min(LEAST_HELD_OUT, count // 4))
        middle = min(count - 1, max(1, count - kept_back)) if is_divided else count
        episodes.append(Episode(source.name, 0.0, fps, FrameFile(str(path), 0, middle), None, "train"))
        if is_divided:
            episodes.append(Episode(source.name, middle / fps, fps, FrameFile(str(path), middle, count), None, "validation"))
    return episodes


def _split_given(paths: dict[Source, Path], fps: float, held_out: list[Source]) -> list[Episode]:
    """Make every file an episode, on the side it was given for. Raises ValueError where a side has none that can be read."""
    names = {source.name for source in held_out}
    episodes = [
        Episode(source.name, 0.0, fps, FrameFile(str(path), 0, count_frames(path)), None,
                "validation" if source.name in names else "train")
        for source, path in paths.items()
    ]  # fmt: skip
    if len({episode.split for episode in episodes}) < 2:
        raise ValueError(
            "No file of one of data.root and data.validation_root can be used: see the reasons with data.validation_root=null."
        )
    return episodes


def _held_out(names: list[str], validation: float) -> set[str]:
    """Choose names by their hash: a file stays on its side when others are added. Never none (unless asked) and never all."""
    share = {name: int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 16**8 for name in names}
    ordered = sorted(names, key=share.__getitem__)
    count = sum(value < validation for value in share.values())
    return set(ordered[: min(len(names) - 1, max(1, count))]) if validation > 0 else set()
