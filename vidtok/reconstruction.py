"""One video through the tokenizer and back, written beside its figures."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from vidtok.metrics import CodeMeter, FrameMeter, frames_at_once, psnr_by_frame, ssim_by_frame
from vidtok.options import ReconstructOptions
from vidtok.tokenizer import Tokenizer, check_decoder, choose_tokenizer, decode_pieces, encode_pieces
from vidtok.video import probe, read_frames, resize_frames, to_frames, to_video, write_video


def reconstruct_file(options: ReconstructOptions) -> dict[str, float]:
    """Write reconstruction.mp4, side_by_side.mp4 (left the input) and metrics.json into options.output; gives the metrics."""
    tokenizer = choose_tokenizer(options.checkpoint, options.tokenizer)
    check_decoder(tokenizer)
    tokenizer.to("cuda" if torch.cuda.is_available() else "cpu")
    info = probe(options.input)
    frames = read_frames(options.input, frames=options.max_frames, fps=options.fps)
    if options.size is not None:
        frames = resize_frames(frames, (options.size[0], options.size[1]))
    _say(options, len(frames), frames.shape[1:3], (info.height, info.width))
    # Views of what is written: a long film as uint8 lies in memory once.
    side_by_side = np.concatenate([frames, frames], axis=2)
    frames, decoded = np.split(side_by_side, 2, axis=2)
    metrics = _reconstruct(tokenizer, frames, decoded)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    fps = options.fps or info.fps
    write_video(output / "reconstruction.mp4", decoded, fps)
    write_video(output / "side_by_side.mp4", side_by_side, fps)
    (output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    print(f"{metrics['psnr_db_mean_of_frames']:.2f} dB PSNR over {len(frames)} frames; see {output / 'side_by_side.mp4'}")
    return metrics


def _reconstruct(tokenizer: Tokenizer, frames: np.ndarray, decoded: np.ndarray) -> dict[str, float]:
    """Fill decoded (T, H, W, 3), give the figures; as floats, only one piece of the frames exists at a time."""
    # Continuous latents have no ids to count or to go by.
    codes = CodeMeter(tokenizer.codebook_factors) if tokenizer.codebook_factors else None
    psnr, ssim = FrameMeter(), FrameMeter()
    at = 0
    for reconstruction in _pieces(tokenizer, frames, codes):
        end = at + reconstruction.shape[2]
        video = to_video(frames[at:end])[None]
        psnr.update(psnr_by_frame(reconstruction, video))
        ssim.update(ssim_by_frame(reconstruction, video))
        decoded[at:end] = to_frames(reconstruction[0])
        at = end
    return {
        "psnr_db_mean_of_frames": psnr.mean(),
        "ssim_mean_of_frames": ssim.mean(),
        "frames": len(frames),
        **({} if codes is None else codes.summary()),
    }


def _pieces(tokenizer: Tokenizer, frames: np.ndarray, codes: CodeMeter | None) -> Iterator[Tensor]:
    """Yield the reconstruction (1, 3, m, H, W) piece by piece, on the CPU."""
    count, height, width = frames.shape[:3]
    if codes is None:
        yield tokenizer.reconstruct(to_video(frames)[None].to(tokenizer.device)).cpu()
        return
    step = frames_at_once(height, width)
    marks = [*range(0, count, step), count]
    pieces = (to_video(frames[at:end])[None].to(tokenizer.device) for at, end in pairwise(marks))
    indices = encode_pieces(tokenizer, track(pieces, description="encoding", total=len(marks) - 1, transient=True))
    codes.update(indices)
    latent_frames = max(1, step // tokenizer.stride_t)
    for video in track(
        decode_pieces(tokenizer, indices, (count, height, width), latent_frames),
        description="decoding",
        total=-(-indices.shape[1] // latent_frames),
        transient=True,
    ):
        yield video.cpu()


def _say(options: ReconstructOptions, used: int, size: tuple[int, ...], original: tuple[int, int]) -> None:
    notes = [f"first {used} frames at {size[1]}x{size[0]}, size=[HEIGHT,WIDTH] and max_frames=N make it faster"]
    if tuple(size) != original:
        notes.append(f"{original[1]}x{original[0]} scaled and cropped to {size[1]}x{size[0]}")
    print(f"input {options.input}: " + ", ".join(notes))
