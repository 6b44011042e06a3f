"""VMAF through an ffmpeg program: what it measures where there is one, and what is said where there is none."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vidtok.metrics import psnr_by_frame
from vidtok.video import to_frames
from vidtok.video_metrics.vmaf import check_vmaf, find_ffmpeg, vmaf_by_frame


def program(path: Path, body: str) -> str:
    path.write_text(f"#!{sys.executable}\nimport sys\n{body}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


LISTS = "if '-filters' in sys.argv: print(' .. libvmaf  VV->V  x'); sys.exit()\n"


def test_both_clips_reach_the_program_as_raw_frames_one_above_the_other(tmp_path, moving) -> None:
    real = moving(2, 3, 24)
    video = (real + 0.3).clamp(-1, 1)
    # Stands in for ffmpeg: scores a frame with the difference of its two halves, in levels.
    body = LISTS + (
        "import json, numpy as np\n"
        "size = sys.argv[sys.argv.index('-s') + 1]\n"
        "width, height = map(int, size.split('x'))\n"
        "frames = np.frombuffer(sys.stdin.buffer.read(), np.uint8).reshape(-1, height, width, 3).astype(float)\n"
        "scores = (frames[:, height // 2:] - frames[:, :height // 2]).mean((1, 2, 3))\n"
        "json.dump({'frames': [{'metrics': {'vmaf': x}} for x in scores]}, open('vmaf.json', 'w'))\n"
    )
    scores = vmaf_by_frame(video, real, program(tmp_path / "ffmpeg", body))
    expected = [(to_frames(a).astype(float) - to_frames(b)).mean((1, 2, 3)) for a, b in zip(video, real, strict=True)]
    torch.testing.assert_close(scores, torch.from_numpy(np.stack(expected)))


def test_programs_that_cannot_measure_are_refused_in_one_sentence(tmp_path, moving, monkeypatch) -> None:
    clip = moving(1, 2, 24)
    with pytest.raises(ValueError, match="24 x 24: use larger frames"):
        vmaf_by_frame(clip[..., :20], clip[..., :20])
    with pytest.raises(ValueError, match="does not run"):
        vmaf_by_frame(clip, clip, tmp_path / "missing")
    with pytest.raises(ValueError, match=r"without libvmaf: install the extra .*\[vmaf\]"):
        vmaf_by_frame(clip, clip, program(tmp_path / "plain", "print(' .. ssim')\n"))
    with pytest.raises(ValueError, match=r"could not measure VMAF \(out of luck\)"):
        vmaf_by_frame(clip, clip, program(tmp_path / "broken", LISTS + "sys.exit('out of luck')\n"))
    with pytest.raises(ValueError, match="0 VMAF scores for 2 frames"):
        vmaf_by_frame(clip, clip, program(tmp_path / "short", LISTS + "open('vmaf.json', 'w').write('{\"frames\": []}')\n"))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="none is here"):
        find_ffmpeg()


def test_a_program_that_says_it_can_and_cannot_is_found_before_any_work(tmp_path, monkeypatch) -> None:
    broken = program(tmp_path / "broken", LISTS + "sys.exit('no such model')\n")
    monkeypatch.setattr("vidtok.video_metrics.vmaf.find_ffmpeg", lambda: broken)
    with pytest.raises(ValueError, match=r"could not measure VMAF \(no such model\): try another ffmpeg"):
        check_vmaf(32, 24)
    with pytest.raises(ValueError, match="use larger frames"):
        check_vmaf(32, 23)
    works = (
        "import json\nsys.stdin.buffer.read()\njson.dump({'frames': [{'metrics': {'vmaf': 1.0}}] * 2}, open('vmaf.json', 'w'))\n"
    )
    monkeypatch.setattr("vidtok.video_metrics.vmaf.find_ffmpeg", lambda: program(tmp_path / "works", LISTS + works))
    check_vmaf(32, 24)


def test_vmaf_is_best_for_the_clip_itself_and_falls_with_noise(moving, tmp_path) -> None:
    pytest.importorskip("imageio_ffmpeg", reason="the vmaf extra is not installed")
    real = moving(1, 6, 64)
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    videos = [(real + amount * noise).clamp(-1, 1) for amount in (0.0, 0.1, 0.3, 0.6)]
    scores = [vmaf_by_frame(video, real) for video in videos]
    means = [score.mean().item() for score in scores]
    assert means[0] > 95 and means == sorted(means, reverse=True) and psnr_by_frame(videos[0], real).min() == 100
    # The same through two raw files, which no pipe and no crop of ours can have mixed up.
    for name, clip in (("video", videos[2]), ("real", real)):
        (tmp_path / f"{name}.rgb").write_bytes(to_frames(clip[0]).tobytes())
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "64x64", "-i"]
    luma = "scale=out_color_matrix=bt709:out_range=tv,format=yuv444p"
    graph = f"[0]{luma}[a];[1]{luma}[b];[a][b]libvmaf=log_fmt=json:log_path=log.json"
    inputs = [*source, "video.rgb", *source, "real.rgb"]
    subprocess.run([find_ffmpeg(), "-v", "error", *inputs, "-lavfi", graph, "-f", "null", "-"], cwd=tmp_path, check=True)
    expected = [frame["metrics"]["vmaf"] for frame in json.loads((tmp_path / "log.json").read_text())["frames"]]
    assert scores[2][0].tolist() == pytest.approx(expected, abs=1e-4)
