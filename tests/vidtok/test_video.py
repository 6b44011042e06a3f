"""Laws of video reading and writing: exact frames by timestamp, honest errors, round trips."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.frame import PictureType

from vidtok.video import (
    check_video,
    iter_frames,
    probe,
    read_frames,
    read_video,
    resize_frames,
    stretch_frames,
    to_frames,
    to_video,
    write_png,
    write_video,
)

BITS = 8
H, W = 32, 64


def numbered(number: int) -> np.ndarray:
    """A frame that shows its number: bit b is the b-th column of 8 pixels."""
    bits = [255 if number >> bit & 1 else 0 for bit in range(BITS)]
    return np.repeat(np.repeat(np.array(bits, np.uint8)[None, :, None], H, 0), W // BITS, 1).repeat(3, 2)


def number_of(frame: np.ndarray) -> int:
    """Read the number that `numbered` wrote."""
    columns = frame.reshape(H, BITS, W // BITS, 3)[8:-8, :, 2:-2].mean(axis=(0, 2, 3))
    return sum(1 << bit for bit in range(BITS) if columns[bit] > 127)


def numbers(frames: np.ndarray) -> list[int]:
    return [number_of(frame) for frame in frames]


def write_clip(
    path: Path,
    count: int = 40,
    fps: int = 30,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    ticks: Sequence[int] | None = None,
    time_base: Fraction = Fraction(1, 90000),
    faststart: bool = False,
) -> Path:
    """Encode `count` numbered frames; ticks gives their times in units of time_base."""
    try:
        av.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"no encoder {codec} here")
    with av.open(str(path), "w", options={"movflags": "faststart"} if faststart else {}) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width, stream.pix_fmt = H, W, pix_fmt
        if ticks is not None:
            stream.codec_context.time_base = time_base
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
            if ticks is not None:
                frame.pts, frame.time_base = ticks[number], time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


ONE_GOP = {"g": "1000", "bf": "3", "b_strategy": "0", "sc_threshold": "0"}
VARIABLE_TICKS = [int(tick) for tick in np.cumsum([0] + [3000 if index % 3 else 9000 for index in range(39)])]


@pytest.mark.parametrize("start", [0, 1, 7, 8, 20, 39])
def test_frames_of_one_long_group_with_b_frames_are_exact(tmp_path: Path, start: int) -> None:
    clip = write_clip(tmp_path / "one gop.mp4", options=ONE_GOP)
    with av.open(str(clip)) as container:
        kinds = [PictureType(frame.pict_type) for frame in container.decode(video=0)]
    assert kinds.count(PictureType.I) == 1 and PictureType.B in kinds
    assert numbers(read_frames(clip, start=start / 30, frames=4)) == list(range(start, min(start + 4, 40)))


def test_a_start_between_two_frames_gives_the_frame_on_screen(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", options={"g": "5"})
    assert numbers(read_frames(clip, start=11.5 / 30, frames=2)) == [11, 12]


@pytest.mark.parametrize("options", [ONE_GOP, {"g": "6"}])
def test_variable_rate_clips_are_read_by_time(tmp_path: Path, options: dict[str, str]) -> None:
    clip = write_clip(tmp_path / "vfr.mp4", options=options, ticks=VARIABLE_TICKS)
    times = np.array(VARIABLE_TICKS) / 90000
    assert numbers(read_frames(clip)) == list(range(40))
    for start in (0.0, 0.31, 1.0, 1.7):
        shown = int(np.searchsorted(times, start, side="right")) - 1
        assert number_of(read_frames(clip, start=start, frames=1)[0]) == shown
    wanted = [int(np.searchsorted(times, 0.2 + k / 7 + 1e-9, side="right")) - 1 for k in range(10)]
    assert numbers(read_frames(clip, start=0.2, fps=7, frames=10)) == wanted


@pytest.mark.parametrize("name", ["offset.mp4", "offset.mkv", "offset.ts"])
def test_the_offset_of_a_stream_is_subtracted(tmp_path: Path, name: str) -> None:
    clip = write_clip(tmp_path / name, ticks=[450_000 + 3000 * index for index in range(40)])
    assert numbers(read_frames(clip)) == list(range(40))
    assert numbers(read_frames(clip, start=0.5, frames=2)) == [15, 16]


@pytest.mark.parametrize("fps", [7.0, 10.0, 24.0, 30.0, 45.0, 60.0])
def test_resampling_by_time_agrees_with_arithmetic(tmp_path: Path, fps: float) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    frames = numbers(read_frames(clip, fps=fps))
    seconds, rate = Fraction(40, 30), Fraction(fps)
    count = -(-seconds * rate // 1)  # ceiling: as many moments k / fps as lie before the end
    assert frames == [int(k / rate * 30) for k in range(int(count))]


def test_a_rate_like_29_97_resampled_to_itself_changes_nothing(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "ntsc.mp4", ticks=[1001 * index for index in range(40)], time_base=Fraction(1, 30000))
    # The encoder lets the last frame last a thirtieth of a second.
    assert probe(clip).fps == pytest.approx(30000 / 1001, rel=1e-4)
    assert numbers(read_frames(clip, fps=30000 / 1001)) == list(range(40))


FORMATS = [
    ("clip.mp4", "libx264", "yuv420p"),
    ("clip.mov", "libx264", "yuv420p"),
    ("clip.mkv", "libx264", "yuv420p"),
    ("lossless.mkv", "ffv1", "bgr0"),
    ("clip.webm", "libvpx-vp9", "yuv420p"),
    ("clip.avi", "mpeg4", "yuv420p"),
    ("motion-jpeg.avi", "mjpeg", "yuvj420p"),
    ("clip.ts", "libx264", "yuv420p"),
    ("clip.gif", "gif", "rgb8"),
    ("grey.mkv", "ffv1", "gray"),
    ("alpha.mkv", "ffv1", "bgra"),
]


@pytest.mark.parametrize(("name", "codec", "pix_fmt"), FORMATS)
def test_every_container_gives_every_frame_and_its_measures(tmp_path: Path, name: str, codec: str, pix_fmt: str) -> None:
    clip = write_clip(tmp_path / name, fps=25, codec=codec, pix_fmt=pix_fmt)
    frames, info = read_frames(clip), probe(clip)
    assert frames.dtype == np.uint8 and frames.shape == (40, H, W, 3)
    assert numbers(frames) == list(range(40))
    assert numbers(read_frames(clip, start=0.8, frames=2)) == [20, 21]
    # The range too: full-range JPEG colours must not be stretched.
    assert frames.min() <= 12 and frames.max() >= 243
    assert (info.frames, info.height, info.width) == (40, H, W)
    assert info.fps == pytest.approx(25, rel=1e-3) and info.seconds == pytest.approx(1.6, abs=0.05)


def test_a_folder_of_images_is_a_video_in_natural_order(tmp_path: Path) -> None:
    folder = tmp_path / "run=1 left"
    for number in range(12):
        write_png(folder / f"frame{number}.png", numbered(number))
    assert numbers(read_frames(folder)) == list(range(12))
    assert numbers(read_frames(folder, start=0.16, fps=12.5)) == [4, 6, 8, 10]
    assert (probe(folder).frames, probe(folder).fps) == (12, 25.0)


def test_an_image_name_with_a_percent_sign_is_a_name(tmp_path: Path) -> None:
    write_png(tmp_path / "im%d.png", numbered(3))
    write_png(tmp_path / "im1.png", numbered(1))
    assert numbers(read_frames(tmp_path / "im%d.png")) == [3]


def test_images_of_two_sizes_in_one_folder_are_refused(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", numbered(0))
    write_png(tmp_path / "b.png", numbered(1)[:, :40])
    with pytest.raises(ValueError, match=r"b\.png is 32x40 and the first image of the folder is 32x64"):
        read_frames(tmp_path)


@pytest.mark.parametrize("channels", [None, 1, 3, 4])
def test_arrays_are_read_in_colour_and_grey(tmp_path: Path, channels: int | None) -> None:
    array = np.stack([numbered(number) for number in range(5)])[..., 0]
    if channels is not None:
        array = np.repeat(array[..., None], channels, -1)
    np.save(tmp_path / "clip.npy", array)
    assert numbers(read_frames(tmp_path / "clip.npy", start=0.04)) == [1, 2, 3, 4]
    assert probe(tmp_path / "clip.npy").frames == 5


@pytest.mark.parametrize(("shape", "dtype"), [((2, 8, 8, 3), "float32"), ((2, 8), "uint8"), ((0, 8, 8, 3), "uint8")])
def test_arrays_that_are_no_video_are_refused(tmp_path: Path, shape: tuple[int, ...], dtype: str) -> None:
    np.save(tmp_path / "clip.npy", np.zeros(shape, dtype))
    with pytest.raises(ValueError, match=r"clip\.npy holds .* a video is uint8 \(T, H, W, 3\)"):
        probe(tmp_path / "clip.npy")


@pytest.mark.parametrize("name", ["a=b c.mp4", "über,{x}.mp4", "time 10:30.mp4", "frame%03d.mp4"])
def test_any_file_name_works(tmp_path: Path, name: str) -> None:
    frames = np.stack([numbered(number) for number in range(6)])
    assert write_video(tmp_path / name, frames, 12.5) == (H, W)
    assert numbers(read_frames(tmp_path / name)) == list(range(6))
    assert probe(tmp_path / name).fps == 12.5


@pytest.mark.parametrize(("height", "width"), [(33, 64), (32, 65), (33, 65), (1, 1)])
def test_odd_sizes_are_padded_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], height: int, width: int) -> None:
    frames = np.full((3, height, width, 3), 90, np.uint8)
    written = write_video(tmp_path / "odd.mp4", frames, 10)
    assert written == (height + height % 2, width + width % 2)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"{height}x{width} is written as {written[0]}x{written[1]}" in said
    back = read_frames(tmp_path / "odd.mp4")
    assert back.shape == (3, *written, 3)
    assert np.abs(back.astype(int) - 90).max() <= 3


def test_even_sizes_are_written_silently_and_nothing_else_is_left(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_video(tmp_path / "clip.mp4", np.stack([numbered(number) for number in range(4)]), 30)
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_png_is_lossless(tmp_path: Path) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)
    write_png(tmp_path / "frame.png", frame)
    assert np.array_equal(read_frames(tmp_path / "frame.png")[0], frame)


@pytest.mark.parametrize("name", ["cut.mkv", "cut.avi", "cut.mp4", "cut-faststart.mp4"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_a_file_cut_off_midway_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, part: float) -> None:
    codec = "mpeg4" if name.endswith("avi") else "libx264"
    clip = write_clip(tmp_path / name, codec=codec, options={"g": "10"}, faststart="faststart" in name)
    clip.write_bytes(clip.read_bytes()[: int(clip.stat().st_size * part)])
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as caught:
        probe(clip)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        read_frames(clip)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("content", [b"this is a text and not a video\n" * 50, b"", bytes(range(256)) * 40])
def test_other_content_under_a_video_name_is_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes
) -> None:
    (tmp_path / "notes.mp4").write_bytes(content)
    for action in (probe, read_frames, lambda path: next(iter_frames(path))):
        with pytest.raises(ValueError, match=r"notes\.mp4 (is empty|cannot be read as a video)") as caught:
            action(tmp_path / "notes.mp4")
        assert not isinstance(caught.value, av.FFmpegError)
    assert capfd.readouterr() == ("", "")


def test_sound_alone_is_not_a_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match="holds no video stream"):
        probe(tmp_path / "song.mp4")


@pytest.mark.parametrize("name", ["film.mp4", "film.mkv", "film.avi"])
def test_sound_beside_the_pictures_changes_nothing(tmp_path: Path, name: str) -> None:
    with av.open(str(tmp_path / name), "w") as container:
        sound, pictures = container.add_stream("aac", rate=16000), container.add_stream("mpeg4", rate=25)
        pictures.height, pictures.width, pictures.pix_fmt = H, W, "yuv420p"
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 32000), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        container.mux(sound.encode(silence))
        for number in range(40):
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(numbered(number), format="rgb24")))
        container.mux(pictures.encode(None))
        container.mux(sound.encode(None))
    assert numbers(read_frames(tmp_path / name)) == list(range(40))
    assert numbers(read_frames(tmp_path / name, start=1.2)) == list(range(30, 40))
    assert (probe(tmp_path / name).frames, probe(tmp_path / name).fps) == (40, 25)


def test_missing_files_and_wrong_moments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.mp4 does not exist"):
        read_frames(tmp_path / "nothing.mp4")
    with pytest.raises(ValueError, match="a folder without images"):
        probe(tmp_path)
    clip = write_clip(tmp_path / "clip.mp4")
    with pytest.raises(ValueError, match="ends before 9 s: choose an earlier start"):
        read_frames(clip, start=9)
    with pytest.raises(ValueError, match="start is -1"):
        read_frames(clip, start=-1)
    with pytest.raises(ValueError, match="fps is 0"):
        read_frames(clip, fps=0)
    with pytest.raises(ValueError, match="0 frames were asked for"):
        read_frames(clip, frames=0)
    with pytest.raises(ValueError, match="fps is nan"):
        write_video(tmp_path / "new.mp4", np.zeros((1, 2, 2, 3), np.uint8), float("nan"))
    with pytest.raises(ValueError, match=r"Frames of float64 \(1, 2, 2, 3\) came"):
        write_video(tmp_path / "new.mp4", np.zeros((1, 2, 2, 3)), 10)


def test_a_video_tensor_is_the_frames_in_minus_one_to_one(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    video = read_video(clip, frames=5)
    assert video.shape == (1, 3, 5, H, W) and video.dtype == torch.float32
    check_video(video)
    assert np.array_equal(to_frames(video[0]), read_frames(clip, frames=5))
    assert read_video(clip, frames=2, size=(16, 16)).shape == (1, 3, 2, 16, 16)


def test_to_frames_undoes_to_video_for_every_value() -> None:
    frames = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    video = to_video(frames)
    assert video.min() == -1 and video.max() == 1
    assert np.array_equal(to_frames(video), frames)
    assert to_frames(torch.full((3, 1, 1, 1), 1.7)).item(0) == 255


@pytest.mark.parametrize(("size", "cut"), [((20, 20), "width"), ((20, 60), "height"), ((40, 80), "none"), ((90, 60), "width")])
def test_resizing_covers_and_crops_the_centre(size: tuple[int, int], cut: str) -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 80)[None, :, None], (40, 80, 3))
    resized = resize_frames(ramp.astype(np.uint8)[None], size)
    assert resized.shape == (1, *size, 3)
    # The centre stays the centre, and the cut sides lose the ends of the ramp equally.
    assert abs(int(resized[0, :, size[1] // 2 - 1 : size[1] // 2 + 1].mean()) - 127) <= 2
    assert (resized[0, 0, 0, 0] > 20) == (cut == "width")


def test_scaling_down_is_antialiased() -> None:
    checkered = ((np.indices((64, 64)).sum(0) % 2) * 255).astype(np.uint8)[None, ..., None].repeat(3, -1)
    stretched = stretch_frames(checkered, (8, 16))
    assert stretched.shape == (1, 8, 16, 3)
    assert np.abs(stretched.astype(int) - 127).max() <= 4


@pytest.mark.parametrize(
    ("video", "reason"),
    [
        (torch.zeros(3, 2, 4, 4), r"shape \(3, 2, 4, 4\)"),
        (torch.zeros(1, 1, 2, 4, 4), r"shape \(1, 1, 2, 4, 4\)"),
        (torch.zeros(1, 3, 2, 4, 4, dtype=torch.uint8), "uint8"),
        (torch.full((1, 3, 2, 4, 4), 255.0), r"\[255, 255\].*to_video converts"),
        (torch.full((1, 3, 2, 4, 4), torch.nan), r"\[nan, nan\]"),
    ],
)
def test_the_border_check_says_what_came(video: torch.Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_video(video)


def test_a_lossless_video_gives_every_bit_back(tmp_path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), dtype=np.uint8)
    write_video(tmp_path / "exact.mp4", frames, 10, is_lossless=True)
    write_video(tmp_path / "small.mp4", frames, 10)
    assert np.array_equal(np.stack(list(iter_frames(tmp_path / "exact.mp4"))), frames)
    assert not np.array_equal(np.stack(list(iter_frames(tmp_path / "small.mp4"))), frames)
