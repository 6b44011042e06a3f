"""Videos in and out: frames as uint8 arrays (T, H, W, 3), tensors as float32 in [-1, 1]."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vidtok.decode import (
    DEFAULT_FPS,
    IMAGE_SUFFIXES,
    TOLERANCE,
    VIDEO_SUFFIXES,
    Shown,
    VideoError,
    VideoInfo,
    iter_shown,
    probe,
)

if TYPE_CHECKING:
    from av.video.stream import VideoStream

__all__ = [
    "DEFAULT_FPS",
    "IMAGE_SUFFIXES",
    "VIDEO_SUFFIXES",
    "VideoError",
    "VideoInfo",
    "check_video",
    "iter_frames",
    "open_video",
    "probe",
    "read_frames",
    "read_video",
    "resize_frames",
    "stretch_frames",
    "to_frames",
    "to_video",
    "write_png",
    "write_video",
]


def iter_frames(path: str | Path, *, start: float = 0.0, fps: float | None = None) -> Iterator[np.ndarray]:
    """Give frames uint8 (H, W, 3) RGB one by one, from the frame that is on screen at `start` seconds.

    fps: None gives every frame; a rate gives, as frame k, the one on screen at start + k / fps, until the video ends.
    Raises FileNotFoundError or ValueError with one sentence; a damaged file does so at the frame where the damage is.
    """
    if not (math.isfinite(start) and start >= 0):
        raise ValueError(f"start is {start}: it must be 0 seconds or more.")
    if fps is not None and not (math.isfinite(fps) and 0.001 <= fps <= 100_000):
        raise ValueError(f"fps is {fps}: it must be a positive number of frames a second.")
    begin = Fraction(start).limit_denominator(1_000_000)
    shown = iter_shown(path, begin)
    return _from_start(shown, begin) if fps is None else _at_rate(shown, begin, _as_rate(fps))


def _as_rate(fps: float) -> Fraction:
    """Give 30000/1001 for 29.97003, and the like."""
    return Fraction(fps).limit_denominator(1001)


def _from_start(shown: Iterator[Shown], start: Fraction) -> Iterator[np.ndarray]:
    held: Shown | None = None
    for frame in shown:
        if held is not None and frame.time > start + TOLERANCE:
            yield held.picture()
        held = frame
    if held is not None and start < held.end - TOLERANCE:
        yield held.picture()


def _at_rate(shown: Iterator[Shown], start: Fraction, fps: Fraction) -> Iterator[np.ndarray]:
    held: Shown | None = None
    picture: np.ndarray | None = None
    target = start
    count = 0
    for frame in shown:
        while held is not None and target + TOLERANCE < frame.time:
            picture = held.picture() if picture is None else picture
            yield picture
            count += 1
            target = start + count / fps
        held, picture = frame, None
    while held is not None and target < held.end - TOLERANCE:
        picture = held.picture() if picture is None else picture
        yield picture
        count += 1
        target = start + count / fps


def read_frames(path: str | Path, *, start: float = 0.0, frames: int | None = None, fps: float | None = None) -> np.ndarray:
    """Read uint8 frames (T, H, W, 3) RGB, exact by timestamp; see `iter_frames` for start and fps.

    frames: at most this many, fewer when the video ends; None reads to the end.
    Raises FileNotFoundError or ValueError when the source cannot be read or ends before `start`.
    """
    return np.stack(_listed(path, start, frames, fps))


def _listed(path: str | Path, start: float, frames: int | None, fps: float | None) -> list[np.ndarray]:
    if frames is not None and frames < 1:
        raise ValueError(f"{frames} frames were asked for: the number must be 1 or more, or None for all.")
    listed = list(islice(iter_frames(path, start=start, fps=fps), frames))
    if not listed:
        raise ValueError(f"{path} ends before {start} s: choose an earlier start.")
    return listed


def read_video(
    path: str | Path,
    *,
    start: float = 0.0,
    frames: int | None = None,
    fps: float | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Read a video tensor float32 (1, C, T, H, W) in [-1, 1]; see `read_frames`, and `resize_frames` for size (H, W)."""
    pixels = read_frames(path, start=start, frames=frames, fps=fps)
    if size is not None:
        pixels = resize_frames(pixels, size)
    return rearrange(to_video(pixels), "C T H W -> 1 C T H W")


def resize_frames(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale uint8 frames (T, H, W, 3) until they just cover `size` (height, width), and crop the centre; antialiased."""
    _check_frames(frames)
    height, width = size
    scale = max(height / frames.shape[1], width / frames.shape[2])
    covering = (max(height, round(frames.shape[1] * scale)), max(width, round(frames.shape[2] * scale)))
    scaled = stretch_frames(frames, covering)
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    return np.ascontiguousarray(scaled[:, top : top + height, left : left + width])


def stretch_frames(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale uint8 frames (T, H, W, 3) to exactly `size` (height, width) without keeping the aspect; antialiased."""
    _check_frames(frames)
    if min(size) < 1:
        raise ValueError(f"The frame size is {tuple(size)}: height and width must be 1 pixel or more.")
    if frames.shape[1:3] == tuple(size):
        return frames
    return np.stack([_stretch(frame, size) for frame in frames])


def _stretch(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    pixels = rearrange(torch.from_numpy(np.ascontiguousarray(frame)), "H W C -> 1 C H W")
    # On uint8 as it is: six times as fast as by way of float and within 1 of it.
    scaled = F.interpolate(pixels, size=tuple(size), mode="bilinear", antialias=True)
    return rearrange(scaled, "1 C H W -> H W C").numpy()


def to_video(frames: np.ndarray) -> Tensor:
    """Turn uint8 frames (T, H, W, 3) into float32 (C, T, H, W) in [-1, 1]."""
    _check_frames(frames)
    pixels = rearrange(torch.from_numpy(np.array(frames)), "T H W C -> C T H W").contiguous()
    return pixels.to(torch.float32) / 127.5 - 1.0


def to_frames(video: Tensor) -> np.ndarray:
    """Turn a video (C, T, H, W) in [-1, 1] into uint8 frames (T, H, W, 3); clamped and rounded."""
    if video.ndim != 4 or video.shape[0] != 3:
        raise ValueError(f"A video tensor of shape {tuple(video.shape)} came: give one clip (3, T, H, W).")
    pixels = ((video.detach().float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return rearrange(pixels, "C T H W -> T H W C").contiguous().cpu().numpy()


def check_video(video: Tensor) -> None:
    """Raise ValueError unless the tensor is float32 (B, 3, T, H, W) with values in [-1, 1]."""
    if video.ndim != 5 or video.shape[1] != 3 or 0 in video.shape:
        raise ValueError(f"A video of shape {tuple(video.shape)} came: it must be (B, 3, T, H, W), all sides 1 or more.")
    if video.dtype != torch.float32:
        raise ValueError(f"A video of {video.dtype} came: it must be torch.float32 in [-1, 1]; vidtok.video.to_video converts.")
    low, high = (value.item() for value in torch.aminmax(video.detach()))
    # Written so that a NaN fails too.
    if not (low >= -1.001 and high <= 1.001):
        raise ValueError(f"A video with values in [{low:.4g}, {high:.4g}] came: they must lie in [-1, 1]; "
                         "vidtok.video.to_video converts 0..255.")  # fmt: skip


def _check_frames(frames: np.ndarray) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"Frames of {frames.dtype} {frames.shape} came: they must be uint8 (T, H, W, 3), RGB, not empty.")


def write_video(path: str | Path, frames: np.ndarray, fps: float, is_lossless: bool = False) -> tuple[int, int]:
    """Write uint8 frames (T, H, W, 3) as open_video does; gives the written (height, width)."""
    _check_frames(frames)
    with open_video(path, (frames.shape[1], frames.shape[2]), fps, is_lossless) as write:
        write(frames)
    return frames.shape[1] + frames.shape[1] % 2, frames.shape[2] + frames.shape[2] % 2


@contextmanager
def open_video(
    path: str | Path, size: tuple[int, int], fps: float, is_lossless: bool = False
) -> Iterator[Callable[[np.ndarray], None]]:
    """Give a function that appends uint8 frames (T, H, W, 3) of size (H, W) to an H.264 mp4 (MPEG-4 part 2 where libx264 is missing).

    The file is complete or not there at all. The codec needs even sides: an odd one is extended by its last row or column, and a line
    says so. The colours are stored at half resolution: never measure on the result. is_lossless: keep every bit, for files to be read
    again; browsers do not play them, and where libx264rgb is missing they are as others are.
    """
    import av

    if not (math.isfinite(fps) and 0.001 <= fps <= 100_000):
        raise ValueError(f"fps is {fps}: it must be a positive number of frames a second.")
    height, width = (side + side % 2 for side in size)
    if (height, width) != tuple(size):
        print(f"{path}: H.264 needs even sides, so {size[0]}x{size[1]} is written as {height}x{width}.")
    pixels = "yuv420p"
    if is_lossless and _has_encoder("libx264rgb"):
        codec, options, pixels = "libx264rgb", {"crf": "0"}, "rgb24"
    else:
        codec, options = ("libx264", {"crf": "16"}) if _has_encoder("libx264") else ("mpeg4", {"qscale": "2"})
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with av.open(str(temporary), "w", format="mp4") as container:
            stream = cast("VideoStream", container.add_stream(codec, rate=_as_rate(fps), options=options))
            stream.width, stream.height, stream.pix_fmt = width, height, pixels

            def write(frames: np.ndarray) -> None:
                _check_frames(frames)
                padding = ((0, height - frames.shape[1]), (0, width - frames.shape[2]), (0, 0))
                for frame in frames:
                    picture = np.ascontiguousarray(np.pad(frame, padding, mode="edge"))
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))

            yield write
            container.mux(stream.encode(None))
        temporary.replace(path)
    except av.FFmpegError as error:
        raise ValueError(f"{path} cannot be written as a video: {error.strerror}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _has_encoder(name: str) -> bool:
    import av

    try:
        av.Codec(name, "w")
    except av.codec.codec.UnknownCodecError:
        return False
    return True


def write_png(path: str | Path, frame: np.ndarray) -> None:
    """Write one uint8 frame (H, W, 3) as a PNG file, without loss."""
    import av

    _check_frames(frame[None])
    encoder = av.CodecContext.create("png", "w")
    assert isinstance(encoder, av.VideoCodecContext)
    encoder.height, encoder.width, encoder.pix_fmt, encoder.time_base = *frame.shape[:2], "rgb24", Fraction(1, 25)
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    packets = [*encoder.encode(picture), *encoder.encode(None)]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(b"".join(bytes(packet) for packet in packets))
