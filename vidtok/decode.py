"""Probe any video source and decode it exactly by timestamp: containers through PyAV, folders of images, .npy arrays."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

CONTAINER_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".webm", ".mkv", ".gif", ".mpg", ".mpeg", ".ts", ".mts", ".wmv", ".flv",
                      ".ogv", ".3gp")  # fmt: skip
VIDEO_SUFFIXES = (*CONTAINER_SUFFIXES, ".npy")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")

# Folders of images and arrays carry no rate of their own.
DEFAULT_FPS = 25.0

# Seconds. Matroska rounds times to whole milliseconds: without it, resampling to the own rate would drop frames.
TOLERANCE = Fraction(6, 10_000)


class VideoError(ValueError):
    """A source that cannot be read as a video; the message names the path and the reason."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video source holds.

    frames: 0 when unknown. fps: average rate. seconds: from the first frame's appearance to the last one's end.
    """

    path: str
    frames: int
    fps: float
    height: int
    width: int
    seconds: float


@dataclass(frozen=True)
class Shown:
    """One frame on screen over [time, end) seconds after the first; picture() gives it as uint8 (H, W, 3) RGB."""

    time: Fraction
    end: Fraction
    picture: Callable[[], np.ndarray]


def probe(path: str | Path) -> VideoInfo:
    """Count and measure a video source: reads a file once without decoding more than its first frame.

    Raises FileNotFoundError when there is none, ValueError when it is not a video, damaged or cut off.
    """
    path = _existing(path)
    if path.is_dir():
        images = list_images(path)
        height, width = _read_image(images[0]).shape[:2]
        return VideoInfo(str(path), len(images), DEFAULT_FPS, height, width, len(images) / DEFAULT_FPS)
    if path.suffix.lower() == ".npy":
        frames, height, width = _open_array(path).shape[:3]
        return VideoInfo(str(path), frames, DEFAULT_FPS, height, width, frames / DEFAULT_FPS)
    return _probe_container(path)


def iter_shown(path: str | Path, start: Fraction = Fraction(0)) -> Iterator[Shown]:
    """Give the frames of a source in order of appearance, beginning at or before `start` seconds.

    Raises as `probe` does, at the frame where the damage is met.
    """
    path = _existing(path)
    if path.is_dir():
        return _shown_images(path, start)
    if path.suffix.lower() == ".npy":
        return _shown_array(path, start)
    return _shown_container(path, start)


def list_images(folder: Path) -> list[Path]:
    """Give the images directly in a folder in natural order (frame2 before frame10). Raises VideoError when there are none."""
    images = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")]
    if not images:
        raise VideoError(f"{folder} is a folder without images: a folder is one video when it holds {', '.join(IMAGE_SUFFIXES)}.")
    return sorted(images, key=lambda path: natural_key(path.name))


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which numbers in names count as numbers."""
    parts = re.split(r"(\d+)", name.lower())
    return tuple((1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts)


def _existing(path: str | Path) -> Path:
    path = Path(path)
    try:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist.")
        if path.is_file() and path.stat().st_size == 0:
            raise VideoError(f"{path} is empty (0 bytes).")
    except PermissionError as error:
        raise VideoError(f"{path} cannot be read: {error.strerror}.") from error
    return path


# Folders of images, arrays


def _read_image(path: Path) -> np.ndarray:
    with _opened(path) as (container, stream):
        for frame in container.decode(stream):
            return _to_rgb(frame, frame.height, frame.width)
    raise VideoError(f"{path} cannot be read as an image: it holds no picture.")


def _shown_images(folder: Path, start: Fraction) -> Iterator[Shown]:
    images = list_images(folder)
    shape = _read_image(images[0]).shape

    def picture(path: Path) -> np.ndarray:
        image = _read_image(path)
        if image.shape != shape:
            raise VideoError(f"{path} is {image.shape[0]}x{image.shape[1]} and the first image of the folder is "
                             f"{shape[0]}x{shape[1]}: all images of a video must have one size.")  # fmt: skip
        return image

    for index in range(_first_index(start, len(images)), len(images)):
        yield _at_default_rate(index, lambda index=index: picture(images[index]))  # type: ignore[misc]


def _open_array(path: Path) -> np.ndarray:
    """Map a .npy file as uint8 (T, H, W, 3 or 4) or (T, H, W, 1)."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise VideoError(f"{path} cannot be read as a .npy array: {error}.") from error
    if array.ndim == 3:
        array = array[..., None]
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        raise VideoError(f"{path} holds {array.dtype} {array.shape}: a video is uint8 (T, H, W, 3), or (T, H, W) for grey.")
    return array


def _shown_array(path: Path, start: Fraction) -> Iterator[Shown]:
    array = _open_array(path)

    def picture(index: int) -> np.ndarray:
        frame = np.array(array[index])
        return np.repeat(frame, 3, axis=-1) if frame.shape[-1] == 1 else np.ascontiguousarray(frame[..., :3])

    for index in range(_first_index(start, len(array)), len(array)):
        yield _at_default_rate(index, lambda index=index: picture(index))  # type: ignore[misc]


def _first_index(start: Fraction, count: int) -> int:
    return min(int((start + TOLERANCE) * Fraction(DEFAULT_FPS)), count - 1)


def _at_default_rate(index: int, picture: Callable[[], np.ndarray]) -> Shown:
    return Shown(index / Fraction(DEFAULT_FPS), (index + 1) / Fraction(DEFAULT_FPS), picture)


# Containers


@dataclass
class _Ending:
    """Watches the packets of all streams go by, to tell at the end whether the file was cut off."""

    end: Fraction = Fraction(0)
    is_incomplete: bool = False

    def see(self, packet: Packet) -> None:
        if packet.size and packet.pts is not None and packet.time_base is not None:
            self.is_incomplete = packet.is_corrupt
            self.end = max(self.end, (packet.pts + (packet.duration or 0)) * packet.time_base)

    def refuse_cut(self, path: Path, container: InputContainer) -> None:
        """Raise VideoError when the last packet is incomplete or the data ends well before the length in the header."""
        # Other containers have no length of their own: ffmpeg estimates it from the bit rate.
        has_length = container.format.name.startswith(("matroska", "mov"))
        promised = Fraction(container.duration or 0, 1_000_000) if has_length else Fraction(0)
        if self.is_incomplete or self.end < promised * Fraction(95, 100) - Fraction(1, 10):
            raise VideoError(f"{path} is cut off: its data ends at {float(self.end):.2f} s"
                             f"{f' of {float(promised):.2f} s' if promised else ''}; copy it again from its source.")  # fmt: skip


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file and its first moving stream; every error of ffmpeg inside becomes a VideoError."""
    # Imported here: ffmpeg beside another copy of itself (opencv, TorchCodec) is only loaded where it is used.
    import av

    # A file name such as frame%03d.png is a name, not a pattern.
    options = {"pattern_type": "none"} if path.suffix.lower() in IMAGE_SUFFIXES else {}
    try:
        # "file:" keeps a name with a colon from being taken for a protocol.
        with av.open(f"file:{path}", options=options, metadata_errors="ignore") as container:
            # Songs carry their cover as a video stream.
            covers = av.stream.Disposition.attached_pic
            streams = [stream for stream in container.streams.video if not stream.disposition & covers]
            if not streams:
                raise VideoError(f"{path} cannot be read as a video: it holds no video stream.")
            stream = streams[0]
            if stream.codec_context is None:
                raise VideoError(f"{path} cannot be read as a video: its codec has no decoder here.")
            # Threads of ffmpeg hang in loader workers.
            stream.codec_context.thread_count = 1
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{path} cannot be read as a video: {error.strerror or 'unknown error of ffmpeg'}.") from error


def _to_rgb(frame: VideoFrame, height: int, width: int) -> np.ndarray:
    """Convert to uint8 (height, width, 3); a stream that changes its size is scaled to that of its first frame."""
    return frame.reformat(width=width, height=height, format="rgb24").to_ndarray()


def _shown_container(path: Path, start: Fraction) -> Iterator[Shown]:
    if start > 0:
        frames = _decode_from(path, start)
        first = next(frames, None)
        # Some containers seek past the target: then only decoding from the beginning is exact.
        if first is not None and first.time <= start + TOLERANCE:
            yield first
            yield from frames
            return
    yield from _decode_from(path, Fraction(0))


def _decode_from(path: Path, start: Fraction) -> Iterator[Shown]:
    """Decode from the keyframe at or before `start`, or from the first frame when start is 0."""
    with _opened(path) as (container, stream):
        base = _time_base(path, stream)
        origin, step = stream.start_time, 1 / _rate(stream)
        is_waiting = start > 0
        if is_waiting:
            container.seek((origin or 0) + math.floor(start / base), stream=stream)
        size: tuple[int, int] | None = None
        time = -step
        ending = _Ending()
        for frame in _decode_packets(container, stream, ending):
            # After a seek, frames that need pictures before the keyframe come out broken.
            is_waiting = is_waiting and not frame.key_frame
            if is_waiting:
                continue
            if frame.is_corrupt:
                raise VideoError(f"{path} is damaged: the frame after {float(max(time, Fraction(0))):.3f} s cannot be decoded.")
            if origin is None:
                origin = frame.pts or 0
            time = time + step if frame.pts is None else (frame.pts - origin) * base
            size = size or (frame.height, frame.width)
            end = time + (frame.duration * base if frame.duration else step)
            yield Shown(time, end, lambda frame=frame, size=size: _to_rgb(frame, *size))  # type: ignore[misc]
        if size is None and start == 0:
            raise VideoError(f"{path} cannot be read as a video: no frame can be decoded.")
        ending.refuse_cut(path, container)


def _decode_packets(container: InputContainer, stream: VideoStream, ending: _Ending) -> Iterator[VideoFrame]:
    for packet in container.demux():
        ending.see(packet)
        # An empty packet would end the decoding: PyAV sends one for each stream, sound included.
        if packet.size and packet.stream_index == stream.index:
            yield from stream.decode(packet)
    yield from stream.decode(None)


def _time_base(path: Path, stream: VideoStream) -> Fraction:
    if not stream.time_base:
        raise VideoError(f"{path} cannot be read as a video: its stream has no time base.")
    return stream.time_base


def _rate(stream: VideoStream) -> Fraction:
    return stream.average_rate or stream.guessed_rate or Fraction(DEFAULT_FPS)


def _probe_container(path: Path) -> VideoInfo:
    first = next(_decode_from(path, Fraction(0)))
    height, width = first.picture().shape[:2]
    with _opened(path) as (container, stream):
        base, step = _time_base(path, stream), 1 / _rate(stream)
        times: list[int] = []
        end = Fraction(0)
        ending = _Ending()
        for packet in container.demux():
            ending.see(packet)
            if packet.stream_index == stream.index and packet.size and packet.pts is not None and not packet.is_discard:
                times.append(packet.pts)
                end = max(end, packet.pts * base + (packet.duration * base if packet.duration else step))
        ending.refuse_cut(path, container)
        count = len(times) or stream.frames
        seconds = end - min(times) * base if times else count * step
        counted = count / seconds if seconds > 0 else 1 / step
        # The header's rate is exact when it is right; for variable rates it can be far off.
        fps = 1 / step if abs(1 / step - counted) <= counted / 50 else counted
        return VideoInfo(str(path), count, float(fps), height, width, float(seconds))
