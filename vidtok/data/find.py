"""Find the videos below a folder: files, and folders of images."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from vidtok.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES


@dataclass(frozen=True)
class Source:
    """A video found below the root. name: its path below the root, or its file name. state: changes when it is rewritten."""

    name: str
    path: Path
    state: tuple[int, int]


def find_sources(root: Path, pattern: str | None) -> list[Source]:
    """Find every video at or below `root`: files by suffix (or by pattern, a glob), and folders of images without videos.

    Raises ValueError with the first names seen when there is none.
    """
    if root.is_file():
        return [_source(root.name, root)]
    found: list[Source] = []
    seen: list[str] = []
    visited: set[str] = set()
    for place, folders, files in os.walk(root, followlinks=True):
        # A link to a folder above would never end.
        real = os.path.realpath(place)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = Path(place)
        names = sorted(name for name in files if not name.startswith("."))
        seen += [(here / name).relative_to(root).as_posix() for name in [*folders, *names]]
        found += _sources_in(here, root, names, pattern)
    if not found:
        raise ValueError(_nothing_found(root, pattern, seen))
    return sorted(found, key=lambda source: source.name)


def _sources_in(here: Path, root: Path, names: list[str], pattern: str | None) -> list[Source]:
    def is_wanted(path: Path) -> bool:
        below = path.relative_to(root).as_posix()
        return pattern is None or fnmatch.fnmatch(below, pattern) or fnmatch.fnmatch(path.name, pattern)

    videos = [here / name for name in names if Path(name).suffix.lower() not in IMAGE_SUFFIXES]
    # With a pattern, the user says what is a video.
    videos = [path for path in videos if is_wanted(path) and (pattern or path.suffix.lower() in VIDEO_SUFFIXES)]
    if not videos and is_wanted(here) and any(Path(name).suffix.lower() in IMAGE_SUFFIXES for name in names):
        videos = [here]
    return [_source(path.relative_to(root).as_posix() if path != root else root.name, path) for path in videos]


def _source(name: str, path: Path) -> Source:
    if path.is_dir():
        parts = sorted(child for child in path.iterdir() if child.suffix.lower() in IMAGE_SUFFIXES)
        listing = json.dumps([[child.name, child.stat().st_mtime_ns] for child in parts])
        digest = int(hashlib.sha256(listing.encode()).hexdigest()[:12], 16)
        return Source(name, path, (sum(child.stat().st_size for child in parts), digest))
    # A broken link has no state; probing says so.
    state = path.stat() if path.exists() else None
    return Source(name, path, (state.st_size, state.st_mtime_ns) if state else (0, 0))


def _nothing_found(root: Path, pattern: str | None, seen: list[str]) -> str:
    tried = f"the pattern {pattern!r}" if pattern else f"{', '.join(VIDEO_SUFFIXES)} and folders of images"
    if not seen:
        return f"{root} is empty: data.root must hold videos ({tried})."
    shown = f"{'the first ten of ' if len(seen) > 10 else ''}{len(seen)} names there"
    return f"No video found in {root}: tried {tried}; {shown}: {', '.join(seen[:10])}."
