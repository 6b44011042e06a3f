"""One video through the tokenizer and back, written beside its figures, as it is read.

Memory does not grow with its length, unless the tokenizer must see the whole clip: see encode_stream and decode_stream.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from vidtok.folders import OutputFolder
from vidtok.metrics import CodeMeter, FrameMeter, frames_at_once, psnr_by_frame, ssim_by_frame
from vidtok.options import ReconstructOptions
from vidtok.run.processes import in_precision
from vidtok.run.run_folder import trained_size
from vidtok.tokenizer import Tokenizer, check_decoder, check_tiles, choose_tokenizer, decode_stream, encode_stream
from vidtok.video import VideoInfo, iter_frames, open_video, probe, resize_frames, to_frames, to_video

RECORD_FILE = "reconstruction.json"
FILES = ("reconstruction.mp4", "side_by_side.mp4", "metrics.json")
MUCH_LARGER = 2  # times a side of the frames of training
_OURS = re.compile("|".join(map(re.escape, (*FILES, RECORD_FILE))))


class Figures:
    """What a reconstruction is measured by, piece by piece."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        # Continuous latents have no ids to count.
        self.codes = CodeMeter(tokenizer.codebook_factors) if tokenizer.codebook_factors else None
        self.psnr, self.ssim = FrameMeter(), FrameMeter()
        self.frames = 0

    def count(self, codes: Iterable[Tensor]) -> Iterator[Tensor]:
        """Count ids as they pass."""
        for part in codes:
            if self.codes is not None:
                self.codes.update(part)
            yield part

    def compare(self, reconstruction: Tensor, frames: np.ndarray) -> None:
        """Add clips (1, 3, m, H, W) of frames uint8 (m, H, W, 3)."""
        video = to_video(frames)[None]
        self.psnr.update(psnr_by_frame(reconstruction, video))
        self.ssim.update(ssim_by_frame(reconstruction, video))
        self.frames += len(frames)

    def summary(self) -> dict[str, float]:
        """Give metrics.json."""
        return {
            "psnr_db_mean_of_frames": self.psnr.mean(),
            "ssim_mean_of_frames": self.ssim.mean(),
            "frames": self.frames,
            **({} if self.codes is None else self.codes.summary()),
        }


def reconstruct_file(options: ReconstructOptions) -> dict[str, float]:
    """Write reconstruction.mp4, side_by_side.mp4 (left the input) and metrics.json into options.output; gives the metrics.

    reconstruction.json there names them, so that they are replaced by a later run, and no other file is. Raises ValueError.
    """
    folder = OutputFolder(Path(options.output), RECORD_FILE, _OURS)
    folder.check(FILES, input=options.input)
    tokenizer = choose_tokenizer(options.checkpoint, options.tokenizer)
    check_decoder(tokenizer)
    tokenizer.to("cuda" if torch.cuda.is_available() else "cpu")
    check_tiles(tokenizer, options.tile)
    info = probe(options.input)
    pieces = _read(options, info)
    first = next(pieces, None)
    if first is None:
        raise ValueError(f"input={options.input} shows no frame: give a video with one or more")
    height, width = first.shape[1:3]
    _say(options, (height, width), (info.height, info.width))
    figures, fps = Figures(tokenizer), options.fps or info.fps
    pieces = iter(track(chain([first], pieces), description="reconstructing", transient=True))
    with (
        open_video(folder.path / FILES[0], (height, width), fps) as write,
        open_video(folder.path / FILES[1], (height, 2 * width), fps) as write_pair,
    ):
        for frames, reconstruction in _reconstructed(tokenizer, pieces, options, figures):
            figures.compare(reconstruction, frames)
            decoded = to_frames(reconstruction[0])
            write(decoded)
            write_pair(np.concatenate([frames, decoded], axis=2))
        # The films have their names once they are whole: a failure on the way here leaves what was there.
        folder.replace(FILES, asdict(options))
    metrics = figures.summary()
    (folder.path / FILES[2]).write_text(json.dumps(metrics, indent=1) + "\n")
    pair = folder.path / FILES[1]
    print(f"{metrics['psnr_db_mean_of_frames']:.2f} dB PSNR over {metrics['frames']} frames; see {pair}")
    return metrics


def _read(options: ReconstructOptions, info: VideoInfo) -> Iterator[np.ndarray]:
    """Yield the frames uint8 (m, H, W, 3), at their final size, as many as are worked on at a time."""
    size = None if options.size is None else (options.size[0], options.size[1])
    count = options.chunk_frames or frames_at_once(*(size or (info.height, info.width)))
    frames = islice(iter_frames(options.input, fps=options.fps), options.max_frames)
    while piece := list(islice(frames, count)):
        yield np.stack(piece) if size is None else resize_frames(np.stack(piece), size)


def _reconstructed(
    tokenizer: Tokenizer, pieces: Iterable[np.ndarray], options: ReconstructOptions, figures: Figures
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Yield frames uint8 (m, H, W, 3) and what they become (1, 3, m, H, W), on the CPU, as soon as the tokenizer gives them."""
    device, waiting = tokenizer.device, list[np.ndarray]()

    def seen() -> Iterator[Tensor]:
        for piece in pieces:
            waiting.extend(piece)
            yield to_video(piece)[None].to(device)

    cut = options.chunk_frames, options.tile
    videos = decode_stream(tokenizer, figures.count(encode_stream(tokenizer, seen(), *cut)), *cut)
    while True:
        # Not around the loop: what is done with the frames is measured in fp32.
        with in_precision(options.precision, device):
            video = next(videos, None)
        # Where nothing waits, what still comes is padding.
        if video is None or not waiting:
            return
        frames = np.stack(waiting[: video.shape[2]])
        del waiting[: video.shape[2]]
        yield frames, video[:, :, : len(frames), : frames.shape[1], : frames.shape[2]].float().cpu()


def _say(options: ReconstructOptions, size: tuple[int, int], original: tuple[int, int]) -> None:
    notes = [f"at most {options.max_frames} frames of {size[0]}x{size[1]}, size=[HEIGHT,WIDTH] and max_frames=N make it faster"]
    if size != original:
        notes.append(f"{original[0]}x{original[1]} scaled and cropped to {size[0]}x{size[1]}")
    print(f"input {options.input}: " + ", ".join(notes))
    trained = None if options.checkpoint is None else trained_size(options.checkpoint)
    if trained is not None and any(side > MUCH_LARGER * known for side, known in zip(size, trained, strict=True)):
        print(
            f"this tokenizer was trained on frames of {trained[0]}x{trained[1]}, these are {size[0]}x{size[1]}: their quality may differ "
            f"from training's, size=[{trained[0]},{trained[1]}] gives what it knows"
        )
