"""One video through the tokenizer and back, written beside its figures."""

import json
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from vidtok.folders import load_model
from vidtok.metrics import CodeMeter, FrameMeter, frames_at_once, psnr_by_frame, ssim_by_frame
from vidtok.model import VidTokModel
from vidtok.options import ReconstructOptions
from vidtok.video import probe, read_frames, resize_frames, to_frames, to_video, write_video


def reconstruct_file(options: ReconstructOptions) -> dict[str, float]:
    """Write reconstruction.mp4, side_by_side.mp4 (left the input) and metrics.json into options.output; gives the metrics."""
    model = load_model(VidTokModel, options.checkpoint)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    info = probe(options.input)
    frames = read_frames(options.input, frames=options.max_frames, fps=options.fps)
    valid = 1 + (len(frames) - 1) // model.config.stride_t * model.config.stride_t
    frames = _fit(frames[:valid], options.size, model.config.stride_s)
    _say(options, len(frames), frames.shape[1:3], (info.height, info.width))
    # Views of what is written: a long film as uint8 lies in memory once.
    side_by_side = np.concatenate([frames, frames], axis=2)
    frames, decoded = np.split(side_by_side, 2, axis=2)
    metrics = _reconstruct(model, frames, decoded)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    fps = options.fps or info.fps
    write_video(output / "reconstruction.mp4", decoded, fps)
    write_video(output / "side_by_side.mp4", side_by_side, fps)
    (output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    print(f"{metrics['psnr_db_mean_of_frames']:.2f} dB PSNR over {len(frames)} frames; see {output / 'side_by_side.mp4'}")
    return metrics


def _reconstruct(model: VidTokModel, frames: np.ndarray, decoded: np.ndarray) -> dict[str, float]:
    """Fill decoded (T, H, W, 3), give the figures; as floats, only one chunk of frames exists at a time."""
    # Frame-wise tokens do not depend on their neighbours, so a few frames at a time keep memory flat; causal ones need the whole clip.
    chunk = frames_at_once(*frames.shape[1:3]) if model.config.stride_t == 1 else len(frames)
    codes, psnr, ssim = CodeMeter(model.config.codebook_size), FrameMeter(), FrameMeter()
    for at in track(range(0, len(frames), chunk), description="reconstructing", transient=True):
        video = to_video(frames[at : at + chunk])[None]
        indices = model.encode(video.to(model.device))
        reconstruction = model.decode(indices).cpu()
        codes.update(indices)
        psnr.update(psnr_by_frame(reconstruction, video))
        ssim.update(ssim_by_frame(reconstruction, video))
        decoded[at : at + chunk] = to_frames(reconstruction[0])
    return {
        "psnr_db_mean_of_frames": psnr.mean(),
        "ssim_mean_of_frames": ssim.mean(),
        "frames": len(frames),
        **codes.summary(),
    }


def _fit(frames: np.ndarray, size: list[int] | None, stride: int) -> np.ndarray:
    height, width = size or frames.shape[1:3]
    target = (height // stride * stride, width // stride * stride)
    if size is not None and target != (height, width):
        raise ValueError(f"size=[{height},{width}] is no multiple of stride_s={stride}: use size=[{target[0]},{target[1]}]")
    if min(target) == 0:
        raise ValueError(
            f"frames of {height}x{width} are smaller than one token of {stride}x{stride}: give size=[{stride},{stride}] or more"
        )
    return resize_frames(frames, target)


def _say(options: ReconstructOptions, used: int, size: tuple[int, ...], original: tuple[int, int]) -> None:
    notes = [f"first {used} frames at {size[1]}x{size[0]}, size=[HEIGHT,WIDTH] and max_frames=N make it faster"]
    if tuple(size) != original:
        notes.append(f"{original[1]}x{original[0]} scaled and cropped to {size[1]}x{size[0]}")
    print(f"input {options.input}: " + ", ".join(notes))
