"""One video through the tokenizer and back, written beside its figures."""

import json
from pathlib import Path

import numpy as np
import torch

from vidtok.folders import load_model
from vidtok.metrics import CodeMeter, psnr_by_frame, ssim_by_frame
from vidtok.model import VidTokModel
from vidtok.options import ReconstructOptions
from vidtok.video import probe, read_frames, resize_frames, to_frames, to_video, write_video


def reconstruct_file(options: ReconstructOptions) -> dict[str, float]:
    """Write reconstruction.mp4, side_by_side.mp4 (left the input) and metrics.json into options.output; gives the metrics."""
    model = load_model(VidTokModel, options.checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    info = probe(options.input)
    frames = read_frames(options.input, frames=options.max_frames, fps=options.fps)
    valid = 1 + (len(frames) - 1) // model.config.stride_t * model.config.stride_t
    frames = _fit(frames[:valid], options.size, model.config.stride_s)
    _say(options, len(frames), frames.shape[1:3], (info.height, info.width))
    video = to_video(frames)[None]
    # Frame-wise tokens do not depend on their neighbours, so a few frames at a time keep memory flat; causal ones need the whole clip.
    chunk = 16 if model.config.stride_t == 1 else len(frames)
    codes, parts = CodeMeter(model.config.codebook_size), []
    for part in video.split(chunk, dim=2):
        indices = model.encode(part.to(device))
        codes.update(indices.cpu())
        parts.append(model.decode(indices).cpu())
    reconstruction = torch.cat(parts, dim=2)
    metrics = {
        "psnr_db_mean_of_frames": float(psnr_by_frame(reconstruction, video).mean()),
        "ssim_mean_of_frames": float(ssim_by_frame(reconstruction, video).mean()),
        "frames": len(frames),
        **codes.summary(),
    }
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    fps, decoded = options.fps or info.fps, to_frames(reconstruction[0])
    write_video(output / "reconstruction.mp4", decoded, fps)
    write_video(output / "side_by_side.mp4", np.concatenate([frames, decoded], axis=2), fps)
    (output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    print(f"{metrics['psnr_db_mean_of_frames']:.2f} dB PSNR over {len(frames)} frames; see {output / 'side_by_side.mp4'}")
    return metrics


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
    notes = [f"first {used} frames"]
    if tuple(size) != original:
        notes.append(f"{original[1]}x{original[0]} scaled and cropped to {size[1]}x{size[0]}")
    print(f"input {options.input}: " + ", ".join(notes))
