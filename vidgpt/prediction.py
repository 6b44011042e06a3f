"""Predict the next frames of one video file and write everything that shows what was done."""

import json
import re
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from vidgpt.decoding import PLANS
from vidgpt.inputs import Context, read_actions, read_context
from vidgpt.options import PredictOptions
from vidgpt.report import strip_image
from vidgpt.rollout import Predictor
from vidgpt.sampling import SamplingOptions
from vidtok.run.checkpoints import write_text
from vidtok.tokenizer import check_decoder
from vidtok.video import to_frames, write_png, write_video

RECORD_FILE = "prediction.json"
# What a record may name: it is read from disk, and what it names is deleted.
_OURS = re.compile(r"frames/frame_\d{4,}\.png|prediction(_\d{2,})?\.mp4|strip\.png|tokens\.safetensors|prediction\.json")


def predict_file(options: PredictOptions) -> dict[str, object]:
    """Write prediction.mp4, frames/*.png, tokens.safetensors, prediction.json and strip.png; gives what prediction.json holds.

    Of several samples, prediction.mp4 and frames/ are of the first, prediction_01.mp4 ... of the others. Files of a former
    prediction in that folder are replaced, any other file is left alone. Raises ValueError, before any work where it can.
    """
    _check_output(options)
    sampling = SamplingOptions(**asdict(options.sampling))
    predictor = Predictor.from_pretrained(
        options.checkpoint, allow_torchscript=options.allow_torchscript, decoder=options.decoder
    )
    check_decoder(predictor.tokenizer)
    predictor.check_window(options.context, options.future)
    context = read_context(options.input, predictor.card, options.context, options.future, options.start)
    print(context.note)
    actions = _actions(options, predictor, context)
    tokens = predictor.samples(predictor.encode(context.video), options.samples)
    started = time.monotonic()
    stream = predictor.stream(tokens, predictor.latent_frames(options.future), options.seed, sampling, options.decoding, actions)
    steps = predictor.latent_frames(options.future)
    future = torch.stack(list(track(stream, description="predicting frames", total=steps, transient=True)), dim=1)
    seconds = time.monotonic() - started
    given = context.video.shape[2]
    video = predictor.decode(torch.cat([tokens, future], dim=1)).cpu()[:, :, : given + options.future]
    output = Path(options.output)
    record = _record(options, predictor, context, seconds)
    _replace_record(output, record)
    _write(output, options, predictor, context, video, tokens, future)
    print(
        f"{options.future} frames x {options.samples} in {seconds:.1f} s; see {output / 'strip.png'} and {output / 'prediction.mp4'}"
    )
    return record


def _file_names(options: PredictOptions) -> list[str]:
    """Name every file of a prediction, relative to its folder."""
    videos = [_video_name(sample) for sample in range(options.samples)]
    return [*videos, *map(_frame_name, range(options.future)), "strip.png", "tokens.safetensors", RECORD_FILE]


def _video_name(sample: int) -> str:
    return "prediction.mp4" if sample == 0 else f"prediction_{sample:02d}.mp4"


def _frame_name(index: int) -> str:
    return f"frames/frame_{index:04d}.png"


def _former_files(output: Path) -> set[str]:
    """Name the files that the folder's record says a prediction wrote; none without a record."""
    try:
        record = json.loads((output / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    files = record.get("files") if isinstance(record, dict) else None
    return {name for name in files if isinstance(name, str) and _OURS.fullmatch(name)} if isinstance(files, list) else set()


def _check_output(options: PredictOptions) -> None:
    """Raise ValueError when writing the output would lose or mix with a file that no prediction wrote, the input above all."""
    output, source = Path(options.output), Path(options.input).resolve()
    for place in (output / "frames", output, *output.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(f"output={output} cannot be a folder, because {place} is a file: give another output folder")
    names, former = _file_names(options), _former_files(output)
    if any(source in (path.resolve(), path.parent.resolve()) for path in (output / name for name in {*names, *former})):
        raise ValueError(f"input={options.input} lies where output={output} is written: give another output folder")
    foreign = [output / name for name in names if name not in former and (output / name).exists()]
    if foreign:
        raise ValueError(f"{foreign[0]} is there already, and no prediction of this folder wrote it: give another output folder")


def _replace_record(output: Path, record: dict[str, object]) -> None:
    """Delete the files of the former prediction, a longer one perhaps, and say which come instead."""
    (output / "frames").mkdir(parents=True, exist_ok=True)
    for name in _former_files(output) - {RECORD_FILE}:
        (output / name).unlink(missing_ok=True)
    # Before the files: what an interruption leaves is then known as ours.
    write_text(output / RECORD_FILE, json.dumps(record, indent=1) + "\n")


def _actions(options: PredictOptions, predictor: Predictor, context: Context) -> Tensor | None:
    if not predictor.layout.num_actions:
        if options.actions is not None:
            raise ValueError("actions= was given, but this model was trained without actions: leave it away")
        return None
    if options.actions is None:
        raise ValueError("this model was trained with actions: give actions=FILE, one whole number a frame, context and future")
    actions = read_actions(options.actions, predictor.layout.num_actions)
    needed = predictor.card.latent_frames_in(context.video.shape[2]) + predictor.latent_frames(options.future)
    if actions.shape[1] != needed:
        raise ValueError(f"actions {options.actions} has {actions.shape[1]} entries, context and future need {needed}")
    return actions.expand(options.samples, -1)


def _write(
    output: Path, options: PredictOptions, predictor: Predictor, context: Context, video: Tensor, tokens: Tensor, future: Tensor
) -> None:
    given, fps = context.video.shape[2], predictor.card.fps
    real = to_frames(context.video[0])
    rows = {}
    for sample in range(options.samples):
        predicted = to_frames(video[sample, :, given:])
        write_video(output / _video_name(sample), np.concatenate([real, predicted]), fps)
        rows["predicted" if options.samples == 1 else f"sample {sample}"] = np.concatenate([real, predicted])
    for index, frame in enumerate(to_frames(video[0, :, given:])):
        write_png(output / _frame_name(index), frame)
    if context.truth is not None:
        rows = {"real": np.concatenate([real, to_frames(context.truth[0])]), **rows}
    write_png(output / "strip.png", strip_image(rows, given))
    save_file({"context": tokens.cpu().contiguous(), "future": future.cpu().contiguous()}, output / "tokens.safetensors")


def _record(options: PredictOptions, predictor: Predictor, context: Context, seconds: float) -> dict[str, object]:
    future = predictor.latent_frames(options.future)
    return {
        **asdict(options),
        "context_frames_used": context.video.shape[2],
        "context_first_frame": context.first_frame,
        "input_note": context.note,
        "fps": predictor.card.fps,
        "tokenizer_fingerprint": predictor.card.tokenizer_fingerprint,
        "decoding_seconds": round(seconds, 3),
        "frames_per_second": round(options.future * options.samples / max(seconds, 1e-9), 3),
        "forward_passes_per_frame": future * PLANS[options.decoding].passes_per_frame(predictor.layout) / options.future,
        "torch_version": torch.__version__,
        "files": _file_names(options),
    }
