"""VMAF through the libvmaf filter of an ffmpeg program on this machine: nothing is downloaded, no lossy file is written or read.

Both clips go as raw RGB bytes through one pipe. Source: Li et al., Toward a Practical Perceptual Video Quality Metric, Netflix 2016; model
vmaf_v0.6.1, which is built into libvmaf. It was fitted to people before a television: below about 200 pixels it ranks, and no more.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from einops import repeat
from torch import Tensor

from vidtok.metrics import check_pair
from vidtok.video import to_frames

MODEL = "vmaf_v0.6.1"
LEAST_SIDE = 24  # libvmaf crashes at 16 pixels
_HELP = "install the extra that brings one, pip install 'vidtok-vidgpt[vmaf]', or leave VMAF out"


def vmaf_by_frame(video: Tensor, reference: Tensor, ffmpeg: str | Path | None = None) -> Tensor:
    """VMAF of every frame, 0 to 100; identical frames reach 97 to 100, and a clip's first frame less, because nothing moves before it.

    video, reference: (B, C, T, H, W) in [-1, 1]. Gives float64 (B, T). Frames are rounded to 8 bits and turned into luma by BT.709,
    limited range, which is all that VMAF sees. ffmpeg: the program; None takes that of imageio-ffmpeg, else the one on the search path.
    Put the last given frame before both clips and drop its score, and the first predicted frame counts like the others.
    Raises ValueError in one sentence where there is no such program, or no libvmaf in it.
    """
    check_pair(video, reference)
    height, width = video.shape[-2:]
    if min(height, width) < LEAST_SIDE:
        raise ValueError(_too_small(height, width))
    program = str(ffmpeg or find_ffmpeg())
    _check_has_vmaf(program)
    clips = zip(video, reference, strict=True)
    return torch.stack([_score(program, _rgb(clip), _rgb(real)) for clip, real in clips])


def check_vmaf(height: int, width: int) -> None:
    """Measure two frames of noise: raises ValueError, before any work, where VMAF fails on this machine or of frames of this size."""
    noise = torch.rand(2, 1, 3, 2, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vmaf_by_frame(noise[0], noise[1])


def find_ffmpeg() -> str:
    """Give the path of an ffmpeg program; raises ValueError where there is none."""
    try:
        import imageio_ffmpeg
    except ImportError:
        found = shutil.which("ffmpeg")
    else:
        found = imageio_ffmpeg.get_ffmpeg_exe()
    if found is None:
        raise ValueError(f"VMAF needs an ffmpeg program with libvmaf and none is here: {_HELP}.")
    return found


def _too_small(height: int, width: int) -> str:
    return f"VMAF got frames of {height} x {width} pixels and needs {LEAST_SIDE} x {LEAST_SIDE}: use larger frames."


@cache
def _check_has_vmaf(program: str) -> None:
    try:
        listed = subprocess.run([program, "-hide_banner", "-filters"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"{program} does not run as an ffmpeg program ({error}): {_HELP}.") from error
    if " libvmaf " not in listed:
        raise ValueError(f"{program} was built without libvmaf: {_HELP}.")


def _rgb(clip: Tensor) -> np.ndarray:
    return to_frames(repeat(clip, "1 T H W -> C T H W", C=3) if len(clip) == 1 else clip)


def _score(program: str, frames: np.ndarray, reference: np.ndarray) -> Tensor:
    """Score uint8 frames (T, H, W, 3) of one clip; gives float64 (T,)."""
    height, width = frames.shape[1:3]
    # One picture above the other, so that a single pipe carries both and neither can wait for the other.
    stacked = np.concatenate([reference, frames], axis=1)
    luma = "scale=out_color_matrix=bt709:out_range=tv,format=yuv444p"
    graph = (
        f"split[both][again];[both]crop={width}:{height}:0:{height}:exact=1,{luma}[distorted];"
        f"[again]crop={width}:{height}:0:0:exact=1,{luma}[real];"
        f"[distorted][real]libvmaf=model=version={MODEL}:log_fmt=json:log_path=vmaf.json:n_threads=1"
    )
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{2 * height}", "-r", "25", "-i", "pipe:0"]
    command = [program, "-hide_banner", "-loglevel", "error", *source, "-lavfi", graph, "-f", "null", "-"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, input=stacked.tobytes(), capture_output=True, cwd=folder)
        log = Path(folder) / "vmaf.json"
        if done.returncode or not log.is_file():
            reason = (done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise ValueError(f"{program} could not measure VMAF ({reason}): try another ffmpeg, or leave VMAF out.")
        scores = [frame["metrics"]["vmaf"] for frame in json.loads(log.read_text())["frames"]]
    if len(scores) != len(frames):
        raise ValueError(
            f"{program} gave {len(scores)} VMAF scores for {len(frames)} frames: try another ffmpeg, or leave VMAF out."
        )
    return torch.tensor(scores, dtype=torch.float64)
