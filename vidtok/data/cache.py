"""The cache of decoded frames: memory-mapped .npy files that appear complete or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.lib import format as npy
from rich.console import Console
from rich.progress import Progress


def open_cache(cache_dir: str | None) -> Path:
    """Create and give the cache folder: the given one, or `vidtok` in the platform's user cache.

    Raises ValueError when it cannot be created.
    """
    folder = Path(cache_dir).expanduser() if cache_dir else _user_cache() / "vidtok"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"The cache folder {folder} cannot be made ({error.strerror}): set data.cache_dir.") from error
    return folder


def _user_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def cache_key(content: Any) -> str:
    """Hash anything that JSON can hold to a file name of 32 hex digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def recall(path: Path, make: Callable[[], Any]) -> Any:
    """Give the JSON content of a cache file, made and written first where there is none."""
    if path.exists():
        return json.loads(path.read_text())
    content = make()
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content))
    temporary.replace(path)
    return content


class FrameWriter:
    """Write frames uint8 (H, W, 3) one by one into a .npy file (T, H, W, 3), in a `with` block.

    The file takes its name when the block ends well; after an error nothing is left. Raises ValueError when the disk is full.
    """

    def __init__(self, path: Path, size: tuple[int, int]) -> None:
        self.path = path
        self.size = size
        self.count = 0
        self.temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Self:
        self.file: BinaryIO = self.temporary.open("wb")
        self._write_header()
        return self

    def append(self, frame: np.ndarray) -> None:
        """Add one frame uint8 (H, W, 3)."""
        assert frame.dtype == np.uint8 and frame.shape == (*self.size, 3), (frame.dtype, frame.shape)
        try:
            self.file.write(np.ascontiguousarray(frame).data)
        except OSError as error:
            raise self._write_error(error) from error
        self.count += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.file.seek(0)
                self._write_header()
            self.file.close()
            if kind is None:
                self.temporary.replace(self.path)
        except OSError as failure:
            raise self._write_error(failure) from failure
        finally:
            self.temporary.unlink(missing_ok=True)

    def _write_header(self) -> None:
        # NumPy pads the header so that the first axis can grow without moving the data.
        header = {"descr": npy.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": (self.count, *self.size, 3)}
        npy.write_array_header_1_0(self.file, header)

    def _write_error(self, error: OSError) -> ValueError:
        return ValueError(f"The frame cache {self.path.parent} cannot be written ({error.strerror}): "
                          "free space there or set data.cache_dir.")  # fmt: skip


def count_frames(path: Path) -> int:
    """Give the number of frames in a cached file."""
    return int(np.load(path, mmap_mode="r").shape[0])


def progress_bar() -> Progress:
    """Make a progress bar on stderr that leaves no trace, and none at all where there is no terminal."""
    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)
